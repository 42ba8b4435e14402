"""What lies between a layer's matrix products, each in one pass through the memory, with its gradient: layers.cpp.

In PyTorch every operation of a norm reads and writes all of its input, which takes longer than the sums. All of it is for
float32 on the CPU.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from groupwise.kernels.compiled import function, library

_PARTS = 16
"""As in layers.cpp: a weight's gradient is summed in so many parts."""


@functools.cache
def kernels() -> Any:
    """The functions of layers.cpp; None where it cannot be compiled."""
    compiled = library("layers")
    if compiled is None:
        return None
    shapes = {"norm": (4, 2, 2), "norm_backward": (6, 1, 2), "rotate": (6, 2, 4), "rotate_backward": (8, 1, 3)}
    shapes |= {"gated": (3, 0, 4), "gated_backward": (5, 0, 2)}
    functions: dict[str, Callable[..., None]] = {name: function(compiled, name, *shape) for name, shape in shapes.items()}
    return SimpleNamespace(**functions)


def norm(x: Tensor, weight: Tensor, epsilon: float, offset: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * (weight + offset), over the last dimension; of x [..., D]."""
    return _run(_Norm, x.contiguous(), weight.contiguous(), epsilon, offset)


def rotated(x_NX: Tensor, cos_ND: Tensor, sin_ND: Tensor, weight_D: Tensor | None, epsilon: float, offset: float) -> Tensor:
    """Rotary embedding of heads that lie side by side, [N, H, D]: the two halves of each turn with each other.

    Each is first normed as in `norm` if weight is given.
    """
    return _run(_Rotated, _rows(x_NX), cos_ND.contiguous(), sin_ND.contiguous(), weight_D, epsilon, offset)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of [..., D]."""
    return _run(_Gated, _rows(gate), _rows(up)).view(gate.shape)


def _run(operation: Any, *arguments: Any) -> Tensor:
    # Through autograd a call takes three times as long as the kernel does for the few rows of a step of generation.
    output: Tensor = operation.apply(*arguments) if torch.is_grad_enabled() else operation.forward(None, *arguments)
    return output


def _rows(x: Tensor) -> Tensor:
    """[..., D] as [N, D]. Without gradients its rows may lie apart, as those of a part of a wider product do."""
    x_ND = x.flatten(0, -2)
    return x_ND if x_ND.stride(1) == 1 and not torch.is_grad_enabled() else x_ND.contiguous()


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, offset: float) -> Tensor:
        D = x.shape[-1]
        output, inverse = torch.empty_like(x), x.new_empty(x.numel() // D)
        kernels().norm(x, weight, output, inverse, offset, epsilon, len(inverse), D)
        if ctx is not None:
            ctx.save_for_backward(x, weight, inverse)
            ctx.offset = offset
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        D = x.shape[-1]
        d_x, d_weight = torch.empty_like(x), weight.new_zeros(_PARTS, D)
        kernels().norm_backward(gradient.contiguous(), x, weight, inverse, d_x, d_weight, ctx.offset, len(inverse), D)
        return d_x, d_weight.sum(0), None, None


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_NX: Tensor, cos_ND: Tensor, sin_ND: Tensor, weight_D: Tensor | None, epsilon: float, offset: float
    ) -> Tensor:
        N, D = cos_ND.shape
        output_NHD = x_NX.new_empty(N, x_NX.shape[1] // D, D)
        inverse_NH = x_NX.new_empty(output_NHD.shape[:2])
        sizes = *output_NHD.shape, x_NX.stride(0)
        kernels().rotate(x_NX, weight_D, cos_ND, sin_ND, output_NHD, inverse_NH, offset, epsilon, *sizes)
        if ctx is not None:  # without a norm the gradient needs no input
            ctx.save_for_backward(None if weight_D is None else x_NX, cos_ND, sin_ND, weight_D, inverse_NH)
            ctx.offset = offset
        return output_NHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NHD: Tensor) -> tuple[Tensor | None, ...]:
        x_NX, cos_ND, sin_ND, weight_D, inverse_NH = ctx.saved_tensors
        gradient_NHD = gradient_NHD.contiguous()
        d_x = torch.empty_like(gradient_NHD)
        d_weight = None if weight_D is None else weight_D.new_zeros(_PARTS, len(weight_D))
        saved = x_NX, weight_D, cos_ND, sin_ND, inverse_NH
        kernels().rotate_backward(gradient_NHD, *saved, d_x, d_weight, ctx.offset, *gradient_NHD.shape)
        return d_x.flatten(1), None, None, None if d_weight is None else d_weight.sum(0), None, None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        output = gate.new_empty(gate.shape)
        kernels().gated(gate, up, output, *gate.shape, gate.stride(0), up.stride(0))
        if ctx is not None:
            ctx.save_for_backward(gate, up)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        kernels().gated_backward(gradient.contiguous(), gate, up, d_gate, d_up, *gate.shape)
        return d_gate, d_up
