"""One decode step through all layers of a decoder in a single call: decode_step.cpp."""

from collections.abc import Callable

import torch

from groupwise.kernels.compiled import function, library
from groupwise.kernels.decode_attention import flags

LAYER_WEIGHTS = (
    "norm",
    "qkv",
    "qkv_bias",
    "query_norm",
    "key_norm",
    "out",
    "out_bias",
    "mlp_norm",
    "gate_up",
    "down",
)
"""The weights of one layer, in the order of the pointers in struct LayerWeights of decode_step.cpp."""


def step_kernel(
    head_size: int, cache_dtype: torch.dtype = torch.float32, *, bf16_weights: bool = False
) -> Callable[..., None] | None:
    """decode_step() of decode_step.cpp, compiled for one head size; None if it cannot be compiled.

    It takes the arguments of the C function in its order. `cache_dtype`, of the KV cache, is float32, bfloat16 or float16.
    Activations and vectors are float32, and so are matrices, in the layout of `to_blocked`; with `bf16_weights` matrices are in
    that of `to_blocked_bf16`, and the inputs of each matmul are rounded to bfloat16.
    """
    settings = flags(head_size, torch.float32, cache_dtype)
    kernels = library("decode_step", *settings, *(["-DBFLOAT16_WEIGHTS"] if bf16_weights else []))
    return None if kernels is None else function(kernels, "decode_step", tensors=16, numbers=6, sizes=11)
