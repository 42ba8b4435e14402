"""What each token counts in the loss: token weights fixed for a whole optimiser step, before micro-batches are cut.

Each function takes (mask_BT, *, group_ids_B, max_length) and returns float64 token weights [B, T], 0 where masked, such that
loss = (weights * token_loss).sum(). A row without a trained token does not count as a sequence. Below, n rows have a trained
token, of |o_i| trained tokens each.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from groupwise.algorithms.advantages import group_sums


def sequence_mean(mask_BT: Tensor, *, group_ids_B: Tensor | None = None, max_length: int | None = None) -> Tensor:
    """1 / (n |o_i|) (GRPO, arXiv 2402.03300, equation 3)."""
    return sequence_sum(mask_BT) / _rows(mask_BT)


def token_mean(mask_BT: Tensor, *, group_ids_B: Tensor | None = None, max_length: int | None = None) -> Tensor:
    """1 / sum |o_i| over the optimiser step (DAPO's code)."""
    mask = mask_BT.double()
    return mask / mask.sum().clamp(min=1)


def prompt_token_mean(mask_BT: Tensor, *, group_ids_B: Tensor | None = None, max_length: int | None = None) -> Tensor:
    """1 / (prompts * tokens of the prompt's group) (DAPO, arXiv 2503.14476, equation 8, literally).

    Raises:
        ValueError: group_ids_B is missing.
    """
    if group_ids_B is None:
        raise ValueError("the aggregation prompt_token_mean needs group_ids_B")
    mask = mask_BT.double()
    ids, group_B = torch.unique(group_ids_B, return_inverse=True)
    tokens = group_sums(mask.sum(1), group_B, len(ids))
    return mask / tokens[group_B].clamp(min=1)[:, None] / (tokens > 0).sum().clamp(min=1)


def sequence_sum(mask_BT: Tensor, *, group_ids_B: Tensor | None = None, max_length: int | None = None) -> Tensor:
    """1 / |o_i| (DCPO's OTM loss, arXiv 2509.02333, section 3.3)."""
    mask = mask_BT.double()
    return mask / mask.sum(1, keepdim=True).clamp(min=1)


def constant(mask_BT: Tensor, *, group_ids_B: Tensor | None = None, max_length: int | None = None) -> Tensor:
    """1 / (n max_length) (Dr.GRPO, arXiv 2503.20783); max_length: T when left out."""
    return mask_BT.double() / (_rows(mask_BT) * (max_length or mask_BT.shape[1]))


def _rows(mask_BT: Tensor) -> Tensor:
    """n, at least 1."""
    return mask_BT.any(1).sum().clamp(min=1)


MODES = {function.__name__: function for function in (sequence_mean, token_mean, prompt_token_mean, sequence_sum, constant)}


def token_weights(
    mask_BT: Tensor,
    mode: str | Callable[..., Tensor],
    *,
    group_ids_B: Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """Token weights w such that loss = (w * token_loss).sum().

    Args:
        mask_BT: bool [B, T], every row of the optimiser step.
        mode: "sequence_mean" (GRPO), "token_mean" (DAPO), "prompt_token_mean", "sequence_sum" (DCPO) or "constant" (Dr.GRPO);
            or such a function, as an algorithm's `aggregation` is.
        group_ids_B: int [B]; needed by "prompt_token_mean".
        max_length: read by "constant"; T when left out.

    Returns:
        float64 [B, T], 0 where masked. A row without a trained token does not count as a sequence.

    Raises:
        ValueError: an unknown mode, or a missing argument.
    """
    if not callable(mode) and mode not in MODES:
        raise ValueError(f"unknown aggregation {mode!r}; known: {', '.join(MODES)}")
    function = mode if callable(mode) else MODES[mode]
    return function(mask_BT, group_ids_B=group_ids_B, max_length=max_length)
