"""Bounds on the importance ratio outside which a token's gradient is cut."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from groupwise.algorithms.part import Part


def fixed_bounds(old_logprobs_BT: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """1 - low and 1 + high for every token, float [B, T] each (PPO, arXiv 1707.06347; decoupled in DAPO, arXiv 2503.14476)."""
    return torch.full_like(old_logprobs_BT, 1 - low), torch.full_like(old_logprobs_BT, 1 + high)


def exponential_bounds(old_logprobs_BT: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """e^-low and e^high for every token: bounds on the log ratio (GMPO, arXiv 2507.20673)."""
    return torch.full_like(old_logprobs_BT, math.exp(-low)), torch.full_like(old_logprobs_BT, math.exp(high))


def dynamic_bounds(old_logprobs_BT: Tensor, low: float, high: float, cap: float = 10.0) -> tuple[Tensor, Tensor]:
    """Bounds that widen as the token's old probability q falls (DCPO, arXiv 2509.02333, equation 7).

    1/2 + 1/2 sqrt(max(1 - 4 low / q, 0)) and min(cap, 1/2 + 1/2 sqrt(1 + 4 high / q)), float [B, T] each. For
    q <= 4 low the derivation asks for no lower bound; the paper imposes 1/2 there, and so does this.
    """
    q_BT = old_logprobs_BT.exp().clamp(min=torch.finfo(old_logprobs_BT.dtype).tiny)
    low_BT = 0.5 + 0.5 * (1 - 4 * low / q_BT).clamp(min=0).sqrt()
    high_BT = 0.5 + 0.5 * (1 + 4 * high / q_BT).sqrt()
    return low_BT, high_BT.clamp(max=cap)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed(Part):
    """`fixed_bounds` as a part."""

    clip_low: float = 0.2
    """How far the ratio may fall below 1."""
    clip_high: float = 0.2
    """How far it may rise above 1."""

    def contradictions(self) -> Iterable[tuple[str, bool, str]]:
        yield "clip_low", self.clip_low > 1, "a ratio cannot fall below 0, so 1 is the most"

    def __call__(self, old_logprobs_BT: Tensor) -> tuple[Tensor, Tensor]:
        return fixed_bounds(old_logprobs_BT, self.clip_low, self.clip_high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exponential(Part):
    """`exponential_bounds` as a part."""

    clip_low: float = 0.2
    """How far the log ratio may fall below 0."""
    clip_high: float = 0.2
    """How far it may rise above 0."""

    def __call__(self, old_logprobs_BT: Tensor) -> tuple[Tensor, Tensor]:
        return exponential_bounds(old_logprobs_BT, self.clip_low, self.clip_high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dynamic(Part):
    """`dynamic_bounds` as a part."""

    clip_low: float = 0.16
    """The lower bound is the ratio rho at which q rho (1 - rho) has grown to this, q the token's old probability."""
    clip_high: float = 0.2
    """The upper bound is the ratio rho at which q rho (rho - 1) has grown to this."""
    ratio_cap: float | None = None
    """The largest upper bound; DCPO: 10."""

    token_ratio_only: ClassVar[bool] = True
    """The bounds follow from a token's own probability, so they bound no sequence's ratio."""

    def __call__(self, old_logprobs_BT: Tensor) -> tuple[Tensor, Tensor]:
        cap = math.inf if self.ratio_cap is None else self.ratio_cap
        return dynamic_bounds(old_logprobs_BT, self.clip_low, self.clip_high, cap)


def unbounded(old_logprobs_BT: Tensor) -> tuple[Tensor, Tensor]:
    """0 and infinity for every token: nothing is clipped."""
    return torch.zeros_like(old_logprobs_BT), torch.full_like(old_logprobs_BT, math.inf)
