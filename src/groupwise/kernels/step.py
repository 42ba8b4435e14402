"""All layers of a decoder in one call, for a step of generation: step.cpp."""

from collections.abc import Callable

from groupwise.kernels.compiled import function, library

LAYER = (
    "norm",
    "heads",
    "heads_bias",
    "query_norm",
    "key_norm",
    "out",
    "out_bias",
    "second_norm",
    "gate_up",
    "down",
)
"""What a layer's row of pointers points to, as in step.cpp."""


def step_kernel(head_size: int) -> Callable[..., None] | None:
    """step() of step.cpp for heads of this size, all in float32; None where there is none. Arguments as there."""
    kernels = library("step", f"-DHEAD_SIZE={head_size}")
    return None if kernels is None else function(kernels, "step", tensors=17, numbers=5, sizes=12)
