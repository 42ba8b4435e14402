"""Token losses to minimise, and where each one's limit changed the gradient.

A surrogate is a function of `Terms` that returns (token_loss_BT, clipped_BT). To add one, write such a function and name
it in a recipe: surrogate = "my_file.py:my_function".
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from groupwise.algorithms.ratios import bounded_exp, row_mean

if TYPE_CHECKING:
    from groupwise.algorithms.algorithm import Algorithm


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a surrogate may read; all [B, T]."""

    logprobs_BT: Tensor
    """log pi_theta of the sampled tokens; carries the gradient."""
    old_logprobs_BT: Tensor
    log_ratio_BT: Tensor
    """From the algorithm's ratio: per token, or the sequence's; carries the gradient."""
    advantages_BT: Tensor
    low_BT: Tensor
    """Lower bound on the ratio."""
    high_BT: Tensor
    """Upper bound on the ratio."""
    mask_BT: Tensor
    """bool, True where a token is trained on."""
    settings: "Algorithm"


def clip(terms: Terms) -> tuple[Tensor, Tensor]:
    """-min(ratio A, clip(ratio, low, high) A) (PPO, arXiv 1707.06347, equation 7).

    `ratio_cap` caps the ratio itself, for both signs of A (DCPO); `dual_clip` caps it where A < 0 (arXiv 1912.09729).
    """
    settings, advantages = terms.settings, terms.advantages_BT
    ratio = bounded_exp(terms.log_ratio_BT)
    clipped = ((advantages > 0) & (ratio > terms.high_BT)) | ((advantages < 0) & (ratio < terms.low_BT))
    for cap in (settings.ratio_cap, settings.dual_clip):
        if cap is not None:
            clipped = clipped | ((advantages < 0) & (ratio > cap))
    if settings.ratio_cap is not None:
        ratio = ratio.clamp(max=settings.ratio_cap)
    if settings.dual_clip is not None:
        ratio = torch.where(advantages < 0, ratio.clamp(max=settings.dual_clip), ratio)
    within = torch.minimum(torch.maximum(ratio, terms.low_BT), terms.high_BT)
    return -torch.minimum(ratio * advantages, within * advantages), clipped


def policy_gradient(terms: Terms) -> tuple[Tensor, Tensor]:
    """-A log pi_theta (REINFORCE): no ratio, nothing clipped."""
    return -terms.advantages_BT * terms.logprobs_BT, torch.zeros_like(terms.mask_BT)


def cispo(terms: Terms) -> tuple[Tensor, Tensor]:
    """-sg(min(ratio, ratio_cap)) A log pi_theta: every token keeps a gradient (MiniMax-M1, arXiv 2506.13585, equation 4)."""
    ratio = bounded_exp(terms.log_ratio_BT.detach())
    capped = ratio.clamp(max=terms.settings.ratio_cap)
    return -capped * terms.advantages_BT * terms.logprobs_BT, (capped < ratio) & (terms.advantages_BT != 0)


def sapo(terms: Terms) -> tuple[Tensor, Tensor]:
    """-4/tau sigmoid(tau (ratio - 1)) A, tau by the sign of A: a smooth gate, nothing clipped (arXiv 2511.20347)."""
    settings = terms.settings
    tau = torch.full_like(terms.log_ratio_BT, settings.gate_negative).masked_fill(terms.advantages_BT > 0, settings.gate_positive)
    gate = 4 / tau * torch.sigmoid(tau * (bounded_exp(terms.log_ratio_BT) - 1))
    return -gate * terms.advantages_BT, torch.zeros_like(terms.mask_BT)


def gmpo(terms: Terms) -> tuple[Tensor, Tensor]:
    """-A times the geometric mean of the row's clipped token ratios (GMPO, arXiv 2507.20673, equation 4).

    A token's log ratio is cut where that tightens the objective: above for A > 0, below for A < 0.
    """
    advantages, log_ratio = terms.advantages_BT, terms.log_ratio_BT
    low, high = terms.low_BT.log(), terms.high_BT.log()
    cut = torch.where(advantages > 0, torch.minimum(log_ratio, high), torch.maximum(log_ratio, low))
    clipped = ((advantages > 0) & (log_ratio > high)) | ((advantages < 0) & (log_ratio < low))
    return -bounded_exp(row_mean(cut, terms.mask_BT)) * advantages, clipped


def dppo(terms: Terms) -> tuple[Tensor, Tensor]:
    """-ratio A, without the tokens that moved further than `divergence_limit` the way A pushes (DPPO, arXiv 2602.04879).

    Further means in probability: |pi_theta - pi_old|.
    """
    moved = terms.logprobs_BT.detach().exp() - terms.old_logprobs_BT.exp()
    clipped = moved * terms.advantages_BT.sign() > terms.settings.divergence_limit
    return torch.where(clipped, 0, -bounded_exp(terms.log_ratio_BT) * terms.advantages_BT), clipped
