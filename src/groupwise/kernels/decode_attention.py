"""Attention of one layer in one decode step, over the KV cache: decode_attention.cpp."""

from collections.abc import Callable

import torch

from groupwise.kernels.compiled import function, library

_FLAGS = {torch.float32: [], torch.bfloat16: ["-DBFLOAT16"]}
"""Compiler flags for each dtype that the kernel can run in."""


def decode_kernel(head_size: int, dtype: torch.dtype) -> Callable[..., None] | None:
    """decode_attention() of decode_attention.cpp, compiled for one head size and dtype.

    It takes the arguments of the C function in its order: tensors, the softmax scale, sizes.

    Returns:
        None if the dtype is neither float32 nor bfloat16, or if the kernel cannot be compiled.
    """
    if dtype not in _FLAGS:
        return None
    kernels = library("decode_attention", f"-DHEAD_SIZE={head_size}", *_FLAGS[dtype])
    return None if kernels is None else function(kernels, "decode_attention", tensors=12, numbers=1, sizes=9)
