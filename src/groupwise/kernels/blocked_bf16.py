"""Matmul with bfloat16 weights in a blocked layout and float32 sums, on CPUs with AVX-512 BF16 instructions: blocked_bf16.cpp."""

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from groupwise.kernels.blocked import BLOCK
from groupwise.kernels.compiled import function, library, unavailable


@functools.cache
def bf16_kernels() -> Any:
    """The functions of blocked_bf16.cpp; None if it cannot be compiled, as on a CPU without these instructions."""
    loaded = library("blocked_bf16")
    if loaded is None:
        return None
    counts = {"to_blocked_bf16": (2, 0, 2), "blocked_matmul_bf16": (4, 0, 3)}
    return SimpleNamespace(**{name: function(loaded, name, *count) for name, count in counts.items()})


def why_not_bf16() -> str | None:
    """Why the kernels cannot run here; None if they can."""
    reason = unavailable("blocked_bf16")
    return None if reason is None else f"no bfloat16 matmul kernels: {reason}"


def to_blocked_bf16(weight_NK: Tensor) -> Tensor:
    """Copy a float32 weight [N, K], rounded to bfloat16, into the blocked layout; K must be even.

    Returns [ceil(N / BLOCK), K / 2, BLOCK, 2], padded with zeros after output feature N.
    """
    N, K = weight_NK.shape
    assert K % 2 == 0 and weight_NK.dtype == torch.float32, "the kernel reads float32 pairs without checking"
    blocked = torch.empty(-(-N // BLOCK), K // 2, BLOCK, 2, dtype=torch.bfloat16)
    bf16_kernels().to_blocked_bf16(weight_NK.detach().contiguous(), blocked, N, K)
    return blocked


def blocked_matmul_bf16(x: Tensor, weight: Tensor, bias: Tensor | None, N: int) -> Tensor:
    """x W^T + bias in float32, [..., N], for x [..., K] in bfloat16, a weight from `to_blocked_bf16` and bias [N] in float32.

    Each output row is the same to the bit whatever else is in the batch and however many threads run.
    """
    x, K = x.contiguous(), 2 * weight.shape[1]
    assert x.shape[-1] == K and x.dtype == torch.bfloat16, "the kernel reads x as bfloat16 [..., K] without checking"
    y = x.new_empty(*x.shape[:-1], N, dtype=torch.float32)
    bf16_kernels().blocked_matmul_bf16(x, weight, bias, y, x.numel() // K, K, N)
    return y
