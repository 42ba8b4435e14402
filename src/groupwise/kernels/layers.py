"""RMSNorm, RoPE and SwiGLU, forward and backward, each in one pass over memory: layers.cpp.

PyTorch runs each of them as several elementwise operations, each of which reads and writes the entire tensor, which takes longer
than the arithmetic. Everything here is float32 on the CPU.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from groupwise.kernels.compiled import function, library

_PARTIAL_SUMS = 16
"""Partial sums of a weight's gradient, which are added up here; the same as in layers.cpp."""


@functools.cache
def layer_kernels() -> Any:
    """The functions of layers.cpp; None if it cannot be compiled."""
    loaded = library("layers")
    if loaded is None:
        return None
    counts = {"rms_norm": (4, 2, 2), "rms_norm_backward": (6, 1, 2), "rope": (6, 2, 4), "rope_backward": (8, 1, 3)}
    counts |= {"swiglu": (3, 0, 4), "swiglu_backward": (5, 0, 2)}
    functions: dict[str, Callable[..., None]] = {name: function(loaded, name, *count) for name, count in counts.items()}
    return SimpleNamespace(**functions)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float) -> Tensor:
    """RMSNorm over the last dimension of x [..., D]: x / sqrt(mean(x^2) + epsilon) * (weight + offset)."""
    return _run(_RMSNorm, x.contiguous(), weight.contiguous(), epsilon, offset)


def rope(x_NX: Tensor, cos_ND: Tensor, sin_ND: Tensor, weight_D: Tensor | None, epsilon: float, offset: float) -> Tensor:
    """Rotary embedding, optionally preceded by the per-head RMSNorm of queries and keys (QK-norm).

    The two halves of each head are rotated together, as in Hugging Face's `rotate_half`.

    Args:
        x_NX: queries or keys of N tokens, their H heads side by side: X = H * D.
        cos_ND: cosines for each token's position; `sin_ND` likewise.
        weight_D: the weight of the norm; None: no norm.
        epsilon: of the norm, as in `rms_norm`; `offset` likewise.

    Returns:
        [N, H, D].
    """
    return _run(_RoPE, _as_matrix(x_NX), cos_ND.contiguous(), sin_ND.contiguous(), weight_D, epsilon, offset)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise, of tensors [..., D]."""
    return _run(_SwiGLU, _as_matrix(gate), _as_matrix(up)).view(gate.shape)


def _run(operation: Any, *arguments: Any) -> Tensor:
    # For the few rows of a decode step a call through autograd takes three times as long as the kernel itself, so it is avoided
    # where no gradient is needed.
    output: Tensor = operation.apply(*arguments) if torch.is_grad_enabled() else operation.forward(None, *arguments)
    return output


def _as_matrix(x: Tensor) -> Tensor:
    """[..., D] as [N, D] with contiguous rows. Without gradients the rows may be strided, as in a slice of a fused QKV output."""
    x_ND = x.flatten(0, -2)
    return x_ND if x_ND.stride(1) == 1 and not torch.is_grad_enabled() else x_ND.contiguous()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, offset: float) -> Tensor:
        D = x.shape[-1]
        output, inverse_rms = torch.empty_like(x), x.new_empty(x.numel() // D)
        layer_kernels().rms_norm(x, weight, output, inverse_rms, offset, epsilon, len(inverse_rms), D)
        if ctx is not None:
            ctx.save_for_backward(x, weight, inverse_rms)
            ctx.offset = offset
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse_rms = ctx.saved_tensors
        D = x.shape[-1]
        d_x, d_weight = torch.empty_like(x), weight.new_zeros(_PARTIAL_SUMS, D)
        saved = x, weight, inverse_rms
        layer_kernels().rms_norm_backward(gradient.contiguous(), *saved, d_x, d_weight, ctx.offset, len(inverse_rms), D)
        return d_x, d_weight.sum(0), None, None


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NX: Tensor, cos_ND: Tensor, sin_ND: Tensor, weight_D: Tensor | None, epsilon: float, offset: float
    ) -> Tensor:
        N, D = cos_ND.shape
        output_NHD = x_NX.new_empty(N, x_NX.shape[1] // D, D)
        inverse_rms_NH = x_NX.new_empty(output_NHD.shape[:2])
        sizes = *output_NHD.shape, x_NX.stride(0)
        layer_kernels().rope(x_NX, weight_D, cos_ND, sin_ND, output_NHD, inverse_rms_NH, offset, epsilon, *sizes)
        if ctx is not None:
            # RoPE is linear: only the gradient of the norm needs the input.
            ctx.save_for_backward(None if weight_D is None else x_NX, cos_ND, sin_ND, weight_D, inverse_rms_NH)
            ctx.offset = offset
        return output_NHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NHD: Tensor) -> tuple[Tensor | None, ...]:
        x_NX, cos_ND, sin_ND, weight_D, inverse_rms_NH = ctx.saved_tensors
        gradient_NHD = gradient_NHD.contiguous()
        d_x = torch.empty_like(gradient_NHD)
        d_weight = None if weight_D is None else weight_D.new_zeros(_PARTIAL_SUMS, len(weight_D))
        saved = x_NX, weight_D, cos_ND, sin_ND, inverse_rms_NH
        layer_kernels().rope_backward(gradient_NHD, *saved, d_x, d_weight, ctx.offset, *gradient_NHD.shape)
        return d_x.flatten(1), None, None, None if d_weight is None else d_weight.sum(0), None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        output = gate.new_empty(gate.shape)
        layer_kernels().swiglu(gate, up, output, *gate.shape, gate.stride(0), up.stride(0))
        if ctx is not None:
            ctx.save_for_backward(gate, up)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        layer_kernels().swiglu_backward(gradient.contiguous(), gate, up, d_gate, d_up, *gate.shape)
        return d_gate, d_up
