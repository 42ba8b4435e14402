"""Whether a sampler has the learner's weights, by the log-probabilities of a given text."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.15}
"""Nats, the median over the text. It says nothing of a few tokens that a router of a mixture of experts sent elsewhere."""

SMALL = 20
"""Differences of the tolerance over this are not looked at."""


def tolerance_in(*dtypes: torch.dtype) -> float:
    """What rounding can explain where the learner, the sampler and its cache compute in these."""
    return max(TOLERANCES.get(dtype, TOLERANCES[torch.float32]) for dtype in dtypes)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probe:
    """The log-probabilities of a text as the learner computes them."""

    tokens: Tensor
    """int64 [L]."""
    logprobs: Tensor
    """float32 [L - 1], see `Learner.probe`."""
    others: tuple[Tensor, ...] = field(default=())
    """The same of weights that were published before, which a sampler may still have."""
    tolerance: float = TOLERANCES[torch.float32]
    """Nats, see `tolerance_in`."""

    def problem(self, found: Tensor) -> str | None:
        """Why a sampler that computes `found` (float32 [L - 1]) has other weights; None: it has these."""
        if not torch.isfinite(found).all():
            return "its log-probabilities are not finite"
        gap = float((found - self.logprobs).abs().median())
        if gap > self.tolerance:
            return f"its log-probabilities differ by {gap:.2g} nats (the median), and rounding explains {self.tolerance:g}"
        # Rounding errors point nowhere: where the difference leads most of the way to older weights, it has those.
        away = _distance(found, self.logprobs)
        if gap > self.tolerance / SMALL and any(_distance(found, other) < away / 2 for other in self.others):
            return "its log-probabilities are those of weights that were published before"
        return None


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).double().square().mean().sqrt())
