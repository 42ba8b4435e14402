"""Weights laid out as oneDNN's matrix products want them: up to twice as fast on a CPU, most where rows are few.

They take the weights' memory once more, for as long as a rollout takes.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor


class PackedWeights:
    """A context in which, in inference mode, the model's float32 linear layers run on copies of their weights, made once here.

    Nothing changes on other devices and where PyTorch has no oneDNN. A decoder that is compiled stays as it is, for the
    compiler must see its layers.
    """

    def __init__(self, model: Any) -> None:
        onednn = torch.backends.mkldnn
        usable = model.device.type == "cpu" and onednn.is_available() and onednn.enabled  # type: ignore[no-untyped-call]
        compiled = model.base_model._compiled_call_impl is not None
        modules = [model.get_output_embeddings()] if compiled else model.modules()
        layers = [layer for layer in modules if usable and type(layer) is torch.nn.Linear and layer.weight.dtype == torch.float32]
        self._copies = [(layer, torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())) for layer in layers]

    def __enter__(self) -> None:
        for layer, copy in self._copies:
            layer.forward = partial(_forward, layer, copy)  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        for layer, _copy in self._copies:
            vars(layer).pop("forward", None)  # the class's own is seen again


def _forward(layer: torch.nn.Linear, copy: Tensor, x: Tensor) -> Tensor:
    if not torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu") or x.dtype != layer.weight.dtype:
        return torch.nn.functional.linear(x, layer.weight, layer.bias)
    output: Tensor = torch.ops.mkldnn._linear_pointwise(x, copy, layer.bias, "none", [], "")
    return output
