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


def step_kernel(head_size: int) -> Callable[..., None] | None:
    """decode_step() of decode_step.cpp, compiled for one head size, float32 only; None if it cannot be compiled.

    It takes the arguments of the C function in its order.
    """
    kernels = library("decode_step", f"-DHEAD_SIZE={head_size}")
    return None if kernels is None else function(kernels, "decode_step", tensors=17, numbers=5, sizes=12)
