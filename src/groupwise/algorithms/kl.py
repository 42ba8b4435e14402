"""Estimates of KL(pi_theta || pi_ref) at a sampled token, float [B, T] (http://joschu.net/blog/kl-approx.html).

Under samples of pi_theta, k1 and k3 are unbiased and k2 is not; none of their gradients is the KL's own, except k2's on
average. Multiplying k1 or k3 by the importance ratio (`Algorithm.kl_ratio_weighted`) makes value and gradient unbiased
under samples of pi_old.
"""

from torch import Tensor

from groupwise.algorithms.ratios import bounded_exp


def k1(logprobs_BT: Tensor, ref_logprobs_BT: Tensor) -> Tensor:
    """log pi_theta - log pi_ref."""
    return logprobs_BT - ref_logprobs_BT


def k2(logprobs_BT: Tensor, ref_logprobs_BT: Tensor) -> Tensor:
    """Half the squared difference of log-probabilities."""
    return 0.5 * (logprobs_BT - ref_logprobs_BT) ** 2


def k3(logprobs_BT: Tensor, ref_logprobs_BT: Tensor) -> Tensor:
    """pi_ref / pi_theta - log(pi_ref / pi_theta) - 1, never negative (GRPO, arXiv 2402.03300, equation 4)."""
    log_ratio_BT = ref_logprobs_BT - logprobs_BT
    return bounded_exp(log_ratio_BT) - log_ratio_BT - 1
