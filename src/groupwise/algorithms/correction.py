"""Importance-sampling corrections, for tokens that an inference engine sampled with other log-probabilities than the learner's.

The ratio is pi_old / pi_rollout: the learner's probability of the token at the start of the step over the one it was
sampled with. At the sequence level it is the product over the row's trained tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from groupwise.algorithms.part import Part, one_of
from groupwise.algorithms.ratios import bounded_exp, token_log_ratio


def mismatch_ratio(old_logprobs_BT: Tensor, rollout_logprobs_BT: Tensor, mask_BT: Tensor, level: str) -> Tensor:
    """pi_old / pi_rollout, float [B, T], of each "token" or of its "sequence"."""
    log_ratio_BT = token_log_ratio(old_logprobs_BT, rollout_logprobs_BT, mask_BT)
    if level == "sequence":
        log_ratio_BT = log_ratio_BT.sum(1, keepdim=True).expand_as(log_ratio_BT)
    return bounded_exp(log_ratio_BT)


def no_correction(old_logprobs_BT: Tensor, rollout_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """1 for every token."""
    return torch.ones_like(old_logprobs_BT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction(Part):
    """Base of the corrections below: (old_logprobs_BT, rollout_logprobs_BT, mask_BT) -> importance weights [B, T]."""

    correction_level: Literal["token", "sequence"] = "token"
    """Whether the ratio is each token's, or the product over the row's trained tokens."""
    correction_high: float = 2.0
    """The largest ratio."""

    def contradictions(self) -> Iterable[tuple[str, bool, str]]:
        yield one_of(self, "correction_level", ("token", "sequence"))

    def __call__(self, old_logprobs_BT: Tensor, rollout_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return self.weigh(mismatch_ratio(old_logprobs_BT, rollout_logprobs_BT, mask_BT, self.correction_level))

    def weigh(self, ratio_BT: Tensor) -> Tensor:
        """The importance weight of each ratio."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncate(Correction):
    """min(ratio, correction_high): truncated importance sampling, TIS."""

    def weigh(self, ratio_BT: Tensor) -> Tensor:
        return ratio_BT.clamp(max=self.correction_high)


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskAbove(Correction):
    """ratio where it is at most correction_high, else 0: masked importance sampling, MIS."""

    def weigh(self, ratio_BT: Tensor) -> Tensor:
        return torch.where(ratio_BT <= self.correction_high, ratio_BT, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskOutside(Correction):
    """ratio where it lies in [correction_low, correction_high], else 0: IcePop's double-sided mask (arXiv 2510.18855)."""

    correction_low: float = 0.5
    """The smallest ratio."""

    def contradictions(self) -> Iterable[tuple[str, bool, str]]:
        yield from Correction.contradictions(self)
        yield "correction_low", self.correction_low > self.correction_high, "is above correction_high, so nothing would count"

    def weigh(self, ratio_BT: Tensor) -> Tensor:
        within_BT = (ratio_BT >= self.correction_low) & (ratio_BT <= self.correction_high)
        return torch.where(within_BT, ratio_BT, 0)
