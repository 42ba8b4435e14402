"""Weights laid out as oneDNN's matrix products want them: up to twice as fast on a CPU, most where rows are few."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor


@contextmanager
def packed_weights(model: Any) -> Iterator[None]:
    """Within, in inference mode: the model's float32 linear layers run on copies of their weights, made here.

    Nothing changes on other devices and where PyTorch has no oneDNN. A decoder that is compiled stays as it is, for the
    compiler must see its layers.
    """
    usable = model.device.type == "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    compiled = model.base_model._compiled_call_impl is not None
    modules = [model.get_output_embeddings()] if compiled else model.modules()
    layers = [layer for layer in modules if usable and type(layer) is torch.nn.Linear and layer.weight.dtype == torch.float32]
    for layer in layers:
        copy = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        layer.forward = partial(_forward, layer, copy)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)  # the class's own is seen again


def _forward(layer: torch.nn.Linear, weight: Tensor, x: Tensor) -> Tensor:
    if not torch.is_inference_mode_enabled():  # someone else, between two of the sampler's tokens
        return torch.nn.functional.linear(x, layer.weight, layer.bias)
    output: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, "none", [], "")
    return output
