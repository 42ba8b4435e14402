"""Which groups are worth an update: the `selection` part of an algorithm, by which dynamic sampling fills a batch.

A selection takes the `Results` of one group and returns whether it is trained on.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from groupwise.algorithms.advantages import group_sums
from groupwise.algorithms.part import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What the completions of one group got; those that count in its baseline."""

    rewards_G: Tensor
    """float [G], the task's own."""
    correct_G: Tensor | None = None
    """bool [G]; None: the reward is graded, and nothing says what is right."""

    @property
    def rate(self) -> float:
        """The pass rate; the mean reward where it is graded."""
        values_G = self.rewards_G if self.correct_G is None else self.correct_G
        return float(values_G.double().mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed(Part):
    """0 < #correct < G (DAPO, arXiv 2503.14476, equation 11); of graded rewards, a standard deviation above a threshold."""

    spread_above: float = 0.0
    """For graded rewards: their population standard deviation must be larger."""

    def __call__(self, results: Results) -> bool:
        values_G = results.rewards_G.double() if results.correct_G is None else results.correct_G.double()
        varied = bool(values_G.max() > values_G.min())  # exact, where a computed deviation may round
        return varied and (results.correct_G is not None or float(values_G.std(correction=0)) > self.spread_above)


@dataclass(frozen=True, slots=True, kw_only=True)
class Band(Part):
    """band_low <= pass rate <= band_high; of graded rewards, their mean."""

    band_low: float = 0.2
    """The lowest pass rate, or mean reward, of a group that is kept."""
    band_high: float = 0.8
    """The highest."""

    def contradictions(self) -> Iterable[tuple[str, bool, str]]:
        yield "band_low", self.band_low > self.band_high, "is above band_high, so no group would be kept"

    def __call__(self, results: Results) -> bool:
        return self.band_low <= results.rate <= self.band_high


def mixed_groups(correct_B: Tensor, group_ids_B: Tensor) -> Tensor:
    """DAPO's condition 0 < #correct < G (arXiv 2503.14476, equation 11), bool [B]: True where the row's group has both outcomes.

    Args:
        correct_B: bool [B]. Decide on correctness, not on a shaped reward: a length penalty would let groups through
            that are all correct.
        group_ids_B: int [B].
    """
    ids, group_B = torch.unique(group_ids_B, return_inverse=True)
    right = group_sums(correct_B.double(), group_B, len(ids))
    wrong = group_sums(1 - correct_B.double(), group_B, len(ids))
    return ((right > 0) & (wrong > 0))[group_B]
