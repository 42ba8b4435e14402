"""Completions that the current policy has left too far behind to learn from: the `mask` part of an algorithm.

A mask takes (`Terms`, rollout_logprobs_BT) and returns bool [B, T], False where the surrogate's loss is dropped. Token weights
were fixed before, so what is dropped still counts in the loss's denominators; the KL to the reference and the entropy stay.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from groupwise.algorithms.part import Part
from groupwise.algorithms.ratios import row_mean
from groupwise.algorithms.surrogates import Terms


def keep_all(terms: Terms, rollout_logprobs_BT: Tensor) -> Tensor:
    """True for every token."""
    return torch.ones_like(terms.mask_BT)


@dataclass(frozen=True, slots=True, kw_only=True)
class OffPolicySequence(Part):
    """Drop A < 0 where the row's mean log(pi_rollout / pi_theta) is above a threshold (DeepSeek-V3.2, 2512.02556, eq. 9)."""

    mask_divergence: float | None = None
    """delta, in nats per token; such as 0.5."""

    def contradictions(self) -> Iterable[tuple[str, bool, str]]:
        yield "mask_divergence", self.mask_divergence is None, "the mask off_policy needs one, in nats per token, such as 0.5"

    def __call__(self, terms: Terms, rollout_logprobs_BT: Tensor) -> Tensor:
        moved_B1 = row_mean(rollout_logprobs_BT - terms.logprobs_BT.detach(), terms.mask_BT)
        return ~((terms.advantages_BT < 0) & (moved_B1 > (self.mask_divergence or 0.0)))
