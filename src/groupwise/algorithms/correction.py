"""Weights for tokens that an inference engine sampled with other numbers than the learner computes.

The ratio is pi_old / pi_rollout: the learner's probability of the token at the start of the step over the one it was
sampled with. At the sequence level it is the product over the row's trained tokens.
"""

import torch
from torch import Tensor

from groupwise.algorithms.ratios import bounded_exp, token_log_ratio


def mismatch_ratio(old_logprobs_BT: Tensor, rollout_logprobs_BT: Tensor, mask_BT: Tensor, level: str) -> Tensor:
    """pi_old / pi_rollout, float [B, T], of each "token" or of its "sequence"."""
    log_ratio_BT = token_log_ratio(old_logprobs_BT, rollout_logprobs_BT, mask_BT)
    if level == "sequence":
        log_ratio_BT = log_ratio_BT.sum(1, keepdim=True).expand_as(log_ratio_BT)
    return bounded_exp(log_ratio_BT)


def none(ratio_BT: Tensor, low: float, high: float) -> Tensor:
    """1 for every token."""
    return torch.ones_like(ratio_BT)


def truncate(ratio_BT: Tensor, low: float, high: float) -> Tensor:
    """min(ratio, high): truncated importance sampling, TIS; low is not used."""
    return ratio_BT.clamp(max=high)


def mask_above(ratio_BT: Tensor, low: float, high: float) -> Tensor:
    """ratio where it is at most high, else 0: masked importance sampling, MIS."""
    return torch.where(ratio_BT <= high, ratio_BT, 0)


def mask_outside(ratio_BT: Tensor, low: float, high: float) -> Tensor:
    """ratio where it lies in [low, high], else 0: IcePop's double-sided mask (arXiv 2510.18855)."""
    return torch.where((ratio_BT >= low) & (ratio_BT <= high), ratio_BT, 0)
