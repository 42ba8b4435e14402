"""One decode step through all layers of a decoder in a single call: decode_step.cpp."""

from collections.abc import Callable

from groupwise.kernels.compiled import function, library

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


def step_kernel(head_size: int, *, bf16_weights: bool = False) -> Callable[..., None] | None:
    """decode_step() of decode_step.cpp, compiled for one head size; None if it cannot be compiled.

    It takes the arguments of the C function in its order, all float32; with `bf16_weights` the matrices are those of
    `to_blocked_bf16`, and the inputs of each matmul are rounded to bfloat16.
    """
    kernels = library("decode_step", f"-DHEAD_SIZE={head_size}", *(["-DBFLOAT16_WEIGHTS"] if bf16_weights else []))
    return None if kernels is None else function(kernels, "decode_step", tensors=17, numbers=5, sizes=12)
