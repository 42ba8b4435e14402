"""Bounds on the importance ratio within which a token still teaches."""

import math

import torch
from torch import Tensor


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
