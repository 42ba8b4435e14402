"""Estimates of KL(pi_theta || pi_ref) at a sampled token, float [B, T] (http://joschu.net/blog/kl-approx.html).

Under samples of pi_theta, k1 and k3 are unbiased and k2 is not; none of their gradients is the KL's own, except k2's on
average. Multiplying k1 or k3 by the importance ratio (`Algorithm.kl_ratio_weighted`) makes value and gradient unbiased
under samples of pi_old.
"""

import math

import torch
from torch import Tensor


def k1(logprobs_BT: Tensor, ref_logprobs_BT: Tensor) -> Tensor:
    """log pi_theta - log pi_ref."""
    return logprobs_BT - ref_logprobs_BT


def k2(logprobs_BT: Tensor, ref_logprobs_BT: Tensor) -> Tensor:
    """Half the squared difference of log-probabilities."""
    return 0.5 * (logprobs_BT - ref_logprobs_BT) ** 2


TANGENT_BEYOND = 20.0
"""Log ratio from which `k3` continues as its tangent: e^20 is far beyond any policy that trains, and far from overflow."""
SERIES_BELOW = 0.02
"""Log ratio up to which `k3` is its Taylor series, which does not cancel; five terms are exact to 1e-12 there."""


def k3(logprobs_BT: Tensor, ref_logprobs_BT: Tensor) -> Tensor:
    """pi_ref / pi_theta - log(pi_ref / pi_theta) - 1, never negative (GRPO, arXiv 2402.03300, equation 4).

    Accurate for small differences, where e^d - d - 1 would cancel; and above a log ratio of `TANGENT_BEYOND` the tangent
    there, so that value and gradient stay finite and keep their signs in float32.
    """
    d_BT = ref_logprobs_BT - logprobs_BT
    near_BT = d_BT.clamp(max=TANGENT_BEYOND)
    value_BT = near_BT.expm1() - near_BT + (d_BT - TANGENT_BEYOND).clamp(min=0) * math.expm1(TANGENT_BEYOND)
    small_BT = d_BT.abs() < SERIES_BELOW
    s_BT = torch.where(small_BT, d_BT, 0)
    series_BT = s_BT.square() * (1 / 2 + s_BT * (1 / 6 + s_BT * (1 / 24 + s_BT * (1 / 120 + s_BT / 720))))
    return torch.where(small_BT, series_BT, value_BT)
