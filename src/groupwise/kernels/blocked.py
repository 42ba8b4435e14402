"""Matmul with weights copied once into a blocked (packed-panel) layout, instead of being repacked in every call: blocked.cpp."""

from collections.abc import Callable

import torch
from torch import Tensor

from groupwise.kernels.compiled import function, library

BLOCK = 32
"""Output features that lie side by side in the blocked weight layout; the same as in blocked.h."""


def to_blocked(weight_NK: Tensor) -> Tensor:
    """Copy a weight [N, K] into the blocked (packed-panel) weight layout: BLOCK output features side by side.

    Returns [ceil(N / BLOCK), K, BLOCK], padded with zeros after output feature N.
    """
    N, K = weight_NK.shape
    padded = torch.nn.functional.pad(weight_NK.detach(), (0, 0, 0, -N % BLOCK))
    return padded.reshape(-1, BLOCK, K).transpose(1, 2).contiguous()


def blocked_matmul_kernel() -> Callable[[Tensor, Tensor, Tensor | None, int], Tensor] | None:
    """A function (x [..., K], blocked weight, bias [N] or None, N) -> x W^T + bias, [..., N]; None if it cannot be compiled.

    All float32 on the CPU. Each output row is the same to the bit whatever else is in the batch and however many threads run.
    """
    kernels = library("blocked")
    if kernels is None:
        return None
    kernel = function(kernels, "blocked_matmul", tensors=4, numbers=0, sizes=3)

    def blocked_matmul(x: Tensor, weight: Tensor, bias: Tensor | None, N: int) -> Tensor:
        x, K = x.contiguous(), weight.shape[1]
        assert x.shape[-1] == K and x.dtype == torch.float32, "the kernel reads x as float32 [..., K] without checking"
        y = x.new_empty(*x.shape[:-1], N)
        kernel(x, weight, bias, y, x.numel() // K, K, N)
        return y

    return blocked_matmul
