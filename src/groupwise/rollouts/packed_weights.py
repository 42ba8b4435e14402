"""Linear layers on copies of their weights in panels, while it generates: up to twice as fast on a CPU, most where rows are few.

They take the weights' memory once more, for as long as a rollout takes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from groupwise.attention import packs, plan
from groupwise.kernels.panels import in_panels, product_kernel


class PackedWeights:
    """A context in which, in inference mode, the model's float32 linear layers run on copies of their weights, made once here.

    Nothing changes on other devices and without a C++ compiler. A decoder that is compiled stays as it is, for the compiler must
    see its layers; and so does one whose step of generation is one call, which has copies of its own.
    """

    def __init__(self, model: Any) -> None:
        kernel, decoder = product_kernel() if model.device.type == "cpu" else None, model.base_model
        alone = decoder._compiled_call_impl is not None or (packs(model) and plan(decoder) is not None)
        modules = [model.get_output_embeddings()] if alone else model.modules()
        layers = [layer for layer in modules if kernel is not None and _plain(layer)]
        self._forwards: list[tuple[Any, Callable[[Tensor], Tensor]]] = [
            (layer, partial(_product, layer, kernel, in_panels(layer.weight))) for layer in layers
        ]

    def __enter__(self) -> None:
        for layer, forward in self._forwards:
            layer.forward = forward

    def __exit__(self, *_: object) -> None:
        for layer, _forward in self._forwards:
            vars(layer).pop("forward", None)  # the class's own is seen again


def _plain(layer: Any) -> bool:
    own = "forward" in vars(layer)  # what somebody else has put in place stays there
    return type(layer) is torch.nn.Linear and layer.weight.dtype == torch.float32 and not own


def _product(layer: torch.nn.Linear, kernel: Any, panels: Tensor, x: Tensor) -> Tensor:
    if not torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu") or x.dtype != layer.weight.dtype:
        return torch.nn.functional.linear(x, layer.weight, layer.bias)
    output: Tensor = kernel(x, panels, layer.bias, layer.out_features)
    return output
