"""Attention of one layer in one decode step, over the KV cache: decode_attention.cpp."""

from collections.abc import Callable

import torch

from groupwise.kernels.compiled import function, library

_TYPES = {torch.float32: "float", torch.bfloat16: "BFloat16", torch.float16: "Float16"}
_PAIRS = {*((torch.float32, cache) for cache in _TYPES), (torch.bfloat16, torch.bfloat16)}
"""Dtypes of queries and of the KV cache that the kernel can run in."""


def decode_kernel(head_size: int, dtype: torch.dtype, cache_dtype: torch.dtype | None = None) -> Callable[..., None] | None:
    """decode_attention() of decode_attention.cpp, compiled for one head size and these dtypes.

    It takes the arguments of the C function in its order: tensors, the softmax scale and the soft cap, sizes. Attention sinks
    are always float32.

    Args:
        head_size: size of queries, keys and values.
        dtype: of queries, new keys and values, and outputs.
        cache_dtype: of the KV cache; `dtype` if None.

    Returns:
        None unless the dtypes are both bfloat16, or `dtype` is float32 and `cache_dtype` float32, bfloat16 or float16; or if the
        kernel cannot be compiled.
    """
    cache_dtype = cache_dtype or dtype
    if (dtype, cache_dtype) not in _PAIRS:
        return None
    kernels = library("decode_attention", *flags(head_size, dtype, cache_dtype))
    return None if kernels is None else function(kernels, "decode_attention", tensors=13, numbers=2, sizes=8)


def flags(head_size: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> tuple[str, ...]:
    """Compiler flags of decode_attention.h."""
    narrow = ["-DSIXTEEN_BITS"] if cache_dtype != torch.float32 else []
    return f"-DHEAD_SIZE={head_size}", f"-DELEMENT={_TYPES[dtype]}", f"-DCACHE_ELEMENT={_TYPES[cache_dtype]}", *narrow
