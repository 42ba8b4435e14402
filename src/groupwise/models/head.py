"""The output layer, log-softmax and entropy in one: a block of the vocabulary at a time, for all tokens.

No more than `LOGITS_AT_ONCE` logits exist at once, in the forward pass or in the backward, which computes them again. Each
block of the output matrix is read once a pass, and its gradient is written once.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from groupwise.kept import KeptTokens
from groupwise.kernels.blocked import BLOCK
from groupwise.kernels.blocked_bf16 import blocked_matmul_bf16
from groupwise.models.adapters import active_layer
from groupwise.models.bfloat16 import RoundedWeights, is_plain_linear
from groupwise.models.cut import NEVER, CutLogits
from groupwise.models.gradients import gradient_of, sum_in_place
from groupwise.models.patches import is_observed

LOGITS_AT_ONCE = {"cpu": 2**20}
"""Logits [tokens, block] held at a time, by device; more tokens make the block smaller, so memory does not grow with V."""
ELSEWHERE = 2**27
"""The same on other devices."""
TOKENS_AT_ONCE = 32
"""At least, where the output layer is not a plain Linear: each chunk then has a gradient of the whole matrix."""
WIDTH = 64
"""Blocks of the vocabulary are a multiple of it: a matmul into rows of 4,096 runs half as fast again as into rows of 4,194."""

NEGLIGIBLE = -80.0
"""Below the largest logit: e^-80 adds nothing to a sum of at least 1, in float64 either. Where it underflows, exp is 5 times as
slow on a CPU, and nearly all logits of a small kept set would."""


@dataclass(frozen=True, slots=True)
class LogitShape:
    """What happens to the output layer's scores before the softmax: logit z = cap tanh(multiplier score / cap) / temperature."""

    multiplier: float
    cap: float | None
    temperature: float

    @classmethod
    def of(cls, module: Any, temperature: float) -> "LogitShape":
        """As the model's configuration says; `LanguageModel` checks it against the model's own logits."""
        config = module.config.get_text_config()
        factors = (getattr(config, name, None) or 1.0 for name in ("logit_scale", "lm_head_multiplier"))
        multiplier = math.prod(factors) / (getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
        return cls(multiplier, cap, temperature)

    def __call__(self, scores: Tensor) -> Tensor:
        if self.cap:
            return torch.tanh(scores * (self.multiplier / self.cap)) * (self.cap / self.temperature)
        factor = self.multiplier / self.temperature
        return scores if factor == 1 else scores * factor

    def backward(self, gradient: Tensor, z: Tensor) -> Tensor:
        """The gradient with respect to the scores, from that with respect to z."""
        if self.cap:
            gradient = gradient * (1 - (z * (self.temperature / self.cap)) ** 2)
        factor = self.multiplier / self.temperature
        return gradient if factor == 1 else gradient * factor


def logits(module: Any, hidden_NH: Tensor, temperature: float = 1.0) -> Tensor:
    """The logits over the temperature, in float32 or wider, from the last hidden states."""
    scores: Tensor = module.get_output_embeddings()(hidden_NH)
    return LogitShape.of(module, temperature)(scores.to(torch.promote_types(scores.dtype, torch.float32)))


def token_logprobs(
    module: Any,
    hidden_NH: Tensor,
    targets_N: Tensor,
    temperature: float,
    entropy_gradient: bool = False,
    rounded: RoundedWeights | None = None,
    kept: KeptTokens | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `targets_N` and entropies, from the last hidden states; differentiable, the entropy on demand.

    Args:
        rounded: run matmuls in bfloat16, on its copy of the output matrix; the logits are float32.
        kept: of the N targets: the softmax runs over their kept sets alone. None: over the whole vocabulary.

    Returns:
        (logprobs_N, entropy_N), in float32 or the hidden states' dtype if that is wider, in nats.
    """
    layer = active_layer(module.get_output_embeddings())
    if type(layer) is not torch.nn.Linear or is_observed(layer):
        return _through_any_layer(module, hidden_NH, targets_N, temperature, entropy_gradient, kept)
    kind = hidden_NH.device.type
    copy = None if rounded is None or not is_plain_linear(layer) else rounded.weight(layer.weight)
    if copy is not None:
        hidden_NH = hidden_NH.to(torch.bfloat16)
    elif torch.is_autocast_enabled(kind):
        hidden_NH = hidden_NH.to(torch.get_autocast_dtype(kind))
    shape = LogitShape.of(module, temperature)
    cut = None if kept is None else CutLogits(kept, hidden_NH.device)
    arguments = hidden_NH, layer.weight, layer.bias, targets_N, shape, entropy_gradient, copy, cut
    output: tuple[Tensor, Tensor] = _Head.apply(*arguments)  # type: ignore[no-untyped-call]
    return output


class _Head(torch.autograd.Function):
    """z: the logits over the temperature. The softmax runs over blocks: each new maximum rescales the sums so far."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        shape: LogitShape,
        entropy_gradient: bool,
        copy: Tensor | None,
        cut: CutLogits | None,
    ) -> tuple[Tensor, Tensor]:
        """`copy`: the matrix as `to_blocked_bf16` makes it, for hidden states in bfloat16. `cut`: what the softmax leaves out."""
        total_N = hidden_NH.new_zeros(len(hidden_NH), dtype=torch.promote_types(hidden_NH.dtype, torch.float32))
        moment_N, of_target_N = torch.zeros_like(total_N), torch.zeros_like(total_N)
        top_N = torch.full_like(total_N, NEVER)
        for _, z_NV, inside_N, column_N1, cut_NV in _blocks(hidden_NH, weight_VH, bias_V, targets_N, shape, copy, cut):
            of_target_N = torch.where(inside_N, z_NV.gather(1, column_N1)[:, 0], of_target_N)
            if cut_NV is not None:
                z_NV.masked_fill_(cut_NV, NEVER)  # in a block that is cut as a whole, sums that the next maximum sets to 0
            higher_N = torch.maximum(top_N, z_NV.amax(1))
            shrink_N = (top_N - higher_N).exp()
            moment_N = shrink_N * (moment_N + total_N * (top_N - higher_N))
            z_NV -= higher_N[:, None]
            if cut_NV is not None:
                z_NV.clamp_(min=NEGLIGIBLE)
            weights_NV = z_NV.exp()
            total_N = shrink_N * total_N + weights_NV.sum(1)  # of exp(z - top)
            moment_N = moment_N + z_NV.mul_(weights_NV).sum(1)  # of (z - top) exp(z - top)
            top_N = higher_N
        logs_N, entropy_N = top_N + total_N.log(), total_N.log() - moment_N / total_N
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_N)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N, logs_N, entropy_N)
        ctx.shape, ctx.entropy_gradient, ctx.copy, ctx.cut = shape, entropy_gradient, copy, cut
        ctx.parameter = weight_VH if sum_in_place(weight_VH) else None
        return of_target_N - top_N - total_N.log(), entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NH, weight_VH, bias_V, targets_N, logs_N, entropy_N = ctx.saved_tensors
        d_logprobs_N, d_entropy_N = gradients
        d_hidden_NH = torch.zeros_like(hidden_NH, dtype=logs_N.dtype)  # summed over many blocks, so wide
        d_weight_VH = None
        if ctx.needs_input_grad[1]:
            d_weight_VH = torch.zeros_like(weight_VH) if ctx.parameter is None else gradient_of(ctx.parameter)
        d_bias_V = torch.empty_like(bias_V) if bias_V is not None and ctx.needs_input_grad[2] else None
        mean_N = logs_N - entropy_N  # E[z] under the distribution
        blocks = _blocks(hidden_NH, weight_VH, bias_V, targets_N, ctx.shape, ctx.copy, ctx.cut)
        for block, z_NV, inside_N, column_N1, cut_NV in blocks:
            d_NV = (z_NV - logs_N[:, None]).exp_()  # probabilities p, then the gradient with respect to z
            if cut_NV is not None:
                d_NV.masked_fill_(cut_NV, 0)
            if ctx.entropy_gradient:
                d_NV *= -(d_logprobs_N[:, None] + d_entropy_N[:, None] * (z_NV - mean_N[:, None]))
            else:
                d_NV *= -d_logprobs_N[:, None]
            d_NV.scatter_add_(1, column_N1, torch.where(inside_N, d_logprobs_N, 0)[:, None])
            d_NV = ctx.shape.backward(d_NV, z_NV).to(hidden_NH.dtype)
            _add_matmul(d_hidden_NH, d_NV, weight_VH[block].to(d_NV.dtype))
            if d_weight_VH is not None:
                _add_matmul(d_weight_VH[block], d_NV.t(), hidden_NH)
            if d_bias_V is not None:
                d_bias_V[block] = d_NV.sum(0)
        returned = d_weight_VH if ctx.parameter is None else None
        return d_hidden_NH.to(hidden_NH.dtype), returned, d_bias_V, None, None, None, None, None


def _add_matmul(to: Tensor, a: Tensor, b: Tensor) -> None:
    if to.dtype == a.dtype:
        to.addmm_(a, b)
    else:
        to += a @ b


def _blocks(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    shape: LogitShape,
    copy: Tensor | None,
    cut: CutLogits | None,
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor | None]]:
    """(block of the vocabulary, z of all tokens there [N, block], whether their targets lie there [N], and where [N, 1], and what
    the softmax leaves out there [N, block]).

    The column is any for a target elsewhere. A list of those inside would have to be counted, which makes the CPU wait for a GPU.
    """
    size = _at_once(hidden_NH) // max(1, len(hidden_NH))
    size = max(1, size if size < WIDTH else size // WIDTH * WIDTH)
    if copy is not None:
        size = max(BLOCK, size // BLOCK * BLOCK)
    cuts = itertools.repeat(None) if cut is None else cut.blocks(len(weight_VH), size)
    for start, cut_NV in zip(range(0, len(weight_VH), size), cuts, strict=False):  # repeat has no end
        block = slice(start, start + size)
        bias = None if bias_V is None else bias_V[block]
        if copy is not None:
            columns = min(size, len(weight_VH) - start)
            scores_NV = blocked_matmul_bf16(hidden_NH, copy[start // BLOCK : -(-(start + columns) // BLOCK)], bias, columns)
        else:
            dtype = hidden_NH.dtype
            bias = None if bias is None else bias.to(dtype)
            scores_NV = torch.nn.functional.linear(hidden_NH, weight_VH[block].to(dtype), bias)
        z_NV = shape(scores_NV.to(torch.promote_types(scores_NV.dtype, torch.float32)))
        column_N = targets_N - start
        inside_N = (column_N >= 0) & (column_N < z_NV.shape[1])
        yield block, z_NV, inside_N, column_N.clamp(0, z_NV.shape[1] - 1)[:, None], cut_NV


def _at_once(hidden_NH: Tensor) -> int:
    return LOGITS_AT_ONCE.get(hidden_NH.device.type, ELSEWHERE)


def _through_any_layer(
    module: Any, hidden_NH: Tensor, targets_N: Tensor, temperature: float, entropy_gradient: bool, kept: KeptTokens | None
) -> tuple[Tensor, Tensor]:
    """Fallback for an output layer that is no plain Linear, or that hooks observe: a few tokens at a time, with recomputation."""

    def chunk(hidden_CH: Tensor, targets_C: Tensor, start: int) -> tuple[Tensor, Tensor]:
        z_CV = logits(module, hidden_CH, temperature)
        if kept is not None:
            cut = CutLogits(kept.slice(start, start + len(z_CV)), z_CV.device)
            z_CV = z_CV.masked_fill(next(cut.blocks(z_CV.shape[1], z_CV.shape[1])), NEVER)
        logprobs_CV = torch.log_softmax(z_CV, dim=-1)
        of_targets_C = logprobs_CV.gather(1, targets_C[:, None])[:, 0]
        if not entropy_gradient:
            logprobs_CV = logprobs_CV.detach()
        return of_targets_C, -(logprobs_CV.exp() * logprobs_CV).sum(-1)

    size = max(TOKENS_AT_ONCE, _at_once(hidden_NH) // module.config.get_text_config().vocab_size)
    pieces = [
        checkpoint(chunk, hidden, targets, i * size, use_reentrant=False, preserve_rng_state=False)
        for i, (hidden, targets) in enumerate(zip(torch.split(hidden_NH, size), torch.split(targets_N, size), strict=True))
    ]
    logprobs, entropies = zip(*pieces, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)
