"""How far the policy has moved from the one that sampled: log importance ratios, per token or per sequence.

GRPO and PPO weigh each token by its own ratio; GSPO (arXiv 2507.18071, equations 7 and 14) weighs every token by the
geometric mean of its sequence's ratios.
"""

import math

import torch
from torch import Tensor


def token_log_ratio(logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log pi_theta(o_t) - log pi_old(o_t), float [B, T]; 0 where masked."""
    zero = torch.zeros_like(logprobs_BT)
    return torch.where(mask_BT, logprobs_BT, zero) - torch.where(mask_BT, old_logprobs_BT, zero)


def row_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over each row's trained tokens, [B, 1]; 0 for a row without any."""
    return torch.where(mask_BT, values_BT, 0).sum(1, keepdim=True) / mask_BT.sum(1, keepdim=True).clamp(min=1)


def sequence_log_ratio(logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean of the row's token log ratios, on every trained token of the row (GSPO, equation 7); float [B, T], 0 where masked.

    The mean runs over trained tokens only, so the output of a tool does not dilute it.
    """
    log_ratio_BT = token_log_ratio(logprobs_BT, old_logprobs_BT, mask_BT)
    return torch.where(mask_BT, row_mean(log_ratio_BT, mask_BT), 0)


def sequence_token_log_ratio(logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The sequence's value, but each token's gradient only through its own log-probability (GSPO-token, equation 14)."""
    value_BT = sequence_log_ratio(logprobs_BT, old_logprobs_BT, mask_BT).detach()
    own_BT = torch.where(mask_BT, logprobs_BT, 0)
    return value_BT + (own_BT - own_BT.detach())


def bounded_exp(log_BT: Tensor) -> Tensor:
    """exp, saturating where its square would overflow the dtype (e^44 in float32, e^354 in float64), gradient 0 beyond."""
    limit = math.log(torch.finfo(log_BT.dtype).max) / 2
    return log_BT.clamp(-limit, limit).exp()
