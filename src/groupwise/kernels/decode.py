"""Attention for one step of generation: decode.cpp."""

from collections.abc import Callable

import torch

from groupwise.kernels.compiled import function, library

_ELEMENTS = {torch.float32: [], torch.bfloat16: ["-DBFLOAT16"]}


def decode_kernel(head_size: int, dtype: torch.dtype) -> Callable[..., None] | None:
    """decode() of decode.cpp for heads of this size and tensors of this dtype; None where there is none.

    It takes its arguments as there: tensors, the scale, and sizes.
    """
    if dtype not in _ELEMENTS:
        return None
    kernels = library("decode", f"-DHEAD_SIZE={head_size}", *_ELEMENTS[dtype])
    return None if kernels is None else function(kernels, "decode", tensors=12, numbers=1, sizes=9)
