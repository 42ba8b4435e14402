"""Products with weights that are copied into panels once, instead of being taken apart anew in each: panels.cpp."""

from collections.abc import Callable

import torch
from torch import Tensor

from groupwise.kernels.compiled import function, library

PANEL = 32
"""Rows of a weight that lie side by side; as in panels.h."""


def in_panels(weight_NK: Tensor) -> Tensor:
    """[N / PANEL, K, PANEL], zeros after the last row; a copy."""
    N, K = weight_NK.shape
    padded = torch.nn.functional.pad(weight_NK.detach(), (0, 0, 0, -N % PANEL))
    return padded.reshape(-1, PANEL, K).transpose(1, 2).contiguous()


def product_kernel() -> Callable[[Tensor, Tensor, Tensor | None, int], Tensor] | None:
    """A function (x [..., K], panels, bias [N] or None, N) -> x W^T + bias, [..., N]; None where there is none.

    All float32 on the CPU. A row's numbers are the same bits whatever rows are beside it, and with any number of threads.
    """
    kernels = library("panels")
    if kernels is None:
        return None
    kernel = function(kernels, "product", tensors=4, numbers=0, sizes=3)

    def product(x: Tensor, panels: Tensor, bias: Tensor | None, N: int) -> Tensor:
        x, K = x.contiguous(), panels.shape[1]
        assert x.shape[-1] == K and x.dtype == torch.float32, "the kernel is told where to read"
        y = x.new_empty(*x.shape[:-1], N)
        kernel(x, panels, bias, y, x.numel() // K, K, N)
        return y

    return product
