"""What an algorithm adds to a task's reward."""

from torch import Tensor


def soft_overlong_penalty(lengths_B: Tensor, max_length: int, cache_length: int) -> Tensor:
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), float [B] from 0 to -1.

    0 up to max_length - cache_length tokens, then linearly down to -1 at max_length, and -1 beyond.

    Args:
        lengths_B: int [B], tokens of each completion.
        max_length: the generation cap.
        cache_length: over how many tokens the penalty grows; 0: none up to the cap.
    """
    over_B = lengths_B.double() - (max_length - cache_length)
    if cache_length == 0:
        return -(over_B > 0).double()
    return -(over_B / cache_length).clamp(0, 1)


def adaptive_coefficient(coefficient: float, kl: float, target: float) -> float:
    """Doubled when the KL exceeds 1.5 target, halved below target / 1.5 (PPO-Penalty, arXiv 1707.06347, section 4)."""
    if kl > 1.5 * target:
        return coefficient * 2
    return coefficient / 2 if kl < target / 1.5 else coefficient
