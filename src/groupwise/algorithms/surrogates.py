"""Surrogate losses per token, to minimise, and where each one's limit changed the gradient.

A surrogate takes `Terms` and returns (token_loss_BT, clipped_BT). To add one, write a function, or a frozen dataclass with
settings of its own, and name it in a recipe: surrogate = "my_file.py:MySurrogate".
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from groupwise.algorithms.part import Part
from groupwise.algorithms.ratios import bounded_exp, row_mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a surrogate may read; all [B, T]."""

    logprobs_BT: Tensor
    """log pi_theta of the sampled tokens; carries the gradient."""
    old_logprobs_BT: Tensor
    """log pi_old of the sampled tokens."""
    log_ratio_BT: Tensor
    """From the algorithm's ratio: per token, or the sequence's; carries the gradient."""
    advantages_BT: Tensor
    low_BT: Tensor
    """Lower bound on the ratio."""
    high_BT: Tensor
    """Upper bound on the ratio."""
    mask_BT: Tensor
    """bool, True where a token is trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate(Part):
    """Base of the surrogates below."""

    reads_bounds: ClassVar[bool] = False
    """Whether it uses Terms.low_BT and high_BT; otherwise the algorithm's bounds must be "none"."""
    reads_ratio: ClassVar[bool] = True
    """Whether it uses Terms.log_ratio_BT; otherwise the algorithm's ratio must be "token", the default."""
    one_ratio_per_sequence: ClassVar[bool] = False
    """Whether it reduces each row to one ratio, which cannot carry advantages that differ between tokens."""
    zero_advantage_is_idle: ClassVar[bool] = True
    """Whether a token with advantage 0 adds nothing to the gradient, so that a row of them need not be run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip(Surrogate):
    """-min(ratio A, clip(ratio, low, high) A) (PPO, arXiv 1707.06347, equation 7)."""

    reads_bounds: ClassVar[bool] = True
    ratio_cap: float | None = None
    """The largest ratio, whatever the bounds and the sign of the advantage (DCPO)."""
    dual_clip: float | None = None
    """The largest ratio where the advantage is negative (arXiv 1912.09729)."""

    def contradictions(self) -> Iterable[tuple[str, bool, str]]:
        yield "dual_clip", self.dual_clip is not None and self.dual_clip <= 1, "must be above 1"
        yield "ratio_cap", self.ratio_cap is not None and self.ratio_cap <= 1, "must be above 1"

    def __call__(self, terms: Terms) -> tuple[Tensor, Tensor]:
        advantages, high = terms.advantages_BT, terms.high_BT
        ratio = bounded_exp(terms.log_ratio_BT)
        if self.ratio_cap is not None:
            high = high.clamp(max=self.ratio_cap)
        clipped = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < terms.low_BT))
        for cap in (self.ratio_cap, self.dual_clip):
            if cap is not None:
                clipped = clipped | ((advantages < 0) & (ratio > cap))
        if self.ratio_cap is not None:
            ratio = ratio.clamp(max=self.ratio_cap)
        if self.dual_clip is not None:
            ratio = torch.where(advantages < 0, ratio.clamp(max=self.dual_clip), ratio)
        within = torch.minimum(torch.maximum(ratio, terms.low_BT), high)
        return -torch.minimum(ratio * advantages, within * advantages), clipped


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyGradient(Surrogate):
    """-A log pi_theta (REINFORCE): no ratio, nothing clipped."""

    reads_ratio: ClassVar[bool] = False

    def __call__(self, terms: Terms) -> tuple[Tensor, Tensor]:
        return -terms.advantages_BT * terms.logprobs_BT, torch.zeros_like(terms.mask_BT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cispo(Surrogate):
    """-sg(min(ratio, ratio_cap)) A log pi_theta: every token keeps a gradient (MiniMax-M1, arXiv 2506.13585, equation 4)."""

    ratio_cap: float | None = None
    """The largest ratio; absolute, such as 5.0."""

    def contradictions(self) -> Iterable[tuple[str, bool, str]]:
        yield "ratio_cap", self.ratio_cap is None, "the surrogate cispo needs one, such as 5.0"
        yield "ratio_cap", self.ratio_cap is not None and self.ratio_cap <= 1, "must be above 1"

    def __call__(self, terms: Terms) -> tuple[Tensor, Tensor]:
        ratio = bounded_exp(terms.log_ratio_BT.detach())
        capped = ratio.clamp(max=self.ratio_cap)
        return -capped * terms.advantages_BT * terms.logprobs_BT, (capped < ratio) & (terms.advantages_BT != 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sapo(Surrogate):
    """-4/tau sigmoid(tau (ratio - 1)) A, tau by the sign of A: a smooth gate, nothing clipped (arXiv 2511.20347)."""

    gate_positive: float = 1.0
    """tau where A > 0."""
    gate_negative: float = 1.05
    """tau elsewhere."""

    def contradictions(self) -> Iterable[tuple[str, bool, str]]:
        for key in ("gate_positive", "gate_negative"):
            yield key, getattr(self, key) == 0, "must be above 0"

    def __call__(self, terms: Terms) -> tuple[Tensor, Tensor]:
        tau = torch.full_like(terms.log_ratio_BT, self.gate_negative).masked_fill(terms.advantages_BT > 0, self.gate_positive)
        gate = 4 / tau * torch.sigmoid(tau * (bounded_exp(terms.log_ratio_BT) - 1))
        return -gate * terms.advantages_BT, torch.zeros_like(terms.mask_BT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gmpo(Surrogate):
    """-A times the geometric mean of the row's clipped token ratios (GMPO, arXiv 2507.20673, equation 4).

    A token's log ratio is clipped where that tightens the objective: above for A > 0, below for A < 0.
    """

    reads_bounds: ClassVar[bool] = True
    one_ratio_per_sequence: ClassVar[bool] = True

    def __call__(self, terms: Terms) -> tuple[Tensor, Tensor]:
        advantages, log_ratio = terms.advantages_BT, terms.log_ratio_BT
        low, high = terms.low_BT.log(), terms.high_BT.log()
        cut = torch.where(advantages > 0, torch.minimum(log_ratio, high), torch.maximum(log_ratio, low))
        clipped = ((advantages > 0) & (log_ratio > high)) | ((advantages < 0) & (log_ratio < low))
        return -bounded_exp(row_mean(cut, terms.mask_BT)) * advantages, clipped


@dataclass(frozen=True, slots=True, kw_only=True)
class Dppo(Surrogate):
    """-ratio A, without the tokens that moved further than `divergence_limit` the way A pushes (DPPO, arXiv 2602.04879)."""

    divergence_limit: float = 0.2
    """The largest |pi_theta - pi_old|, in probability."""

    def __call__(self, terms: Terms) -> tuple[Tensor, Tensor]:
        moved = terms.logprobs_BT.detach().exp() - terms.old_logprobs_BT.exp()
        clipped = moved * terms.advantages_BT.sign() > self.divergence_limit
        return torch.where(clipped, 0, -bounded_exp(terms.log_ratio_BT) * terms.advantages_BT), clipped


@dataclass(frozen=True, slots=True, kw_only=True)
class Vespo(Surrogate):
    """-sg[w^k e^(lambda (1 - w))] A log pi_theta, w the product of the row's token ratios (arXiv 2602.10693, eq. 20).

    The ratio of the whole sequence's probabilities, without a root. k and lambda go by the sign of A.
    """

    one_ratio_per_sequence: ClassVar[bool] = True
    power_positive: float = 2.0
    """k where A >= 0: how fast a completion that has become less likely loses its gradient."""
    decay_positive: float = 3.0
    """lambda where A >= 0: how fast one that has become more likely does."""
    power_negative: float = 3.0
    """k where A < 0."""
    decay_negative: float = 2.0
    """lambda where A < 0."""

    def contradictions(self) -> Iterable[tuple[str, bool, str]]:
        for key in ("decay_positive", "decay_negative"):
            yield key, getattr(self, key) == 0, "must be above 0, or nothing would bound the gradient of a large ratio"

    def __call__(self, terms: Terms) -> tuple[Tensor, Tensor]:
        log_w_B1 = torch.where(terms.mask_BT, terms.log_ratio_BT.detach(), 0).sum(1, keepdim=True)
        negative_BT = terms.advantages_BT < 0
        power_BT = torch.full_like(terms.log_ratio_BT, self.power_positive).masked_fill(negative_BT, self.power_negative)
        decay_BT = torch.full_like(terms.log_ratio_BT, self.decay_positive).masked_fill(negative_BT, self.decay_negative)
        # In logarithms: w alone may overflow where the kernel is 0.
        kernel_BT = (power_BT * log_w_B1 + decay_BT * (1 - bounded_exp(log_w_B1))).exp()
        return -kernel_BT * terms.advantages_BT * terms.logprobs_BT, torch.zeros_like(terms.mask_BT)
