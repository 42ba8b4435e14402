"""Weights laid out as oneDNN's matrix products want them: up to twice as fast on a CPU, most where rows are few.

They take the weights' memory once more, for as long as a rollout takes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

TOGETHER = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
"""Layers of one module that are given the same input."""


class PackedWeights:
    """A context in which, in inference mode, the model's float32 linear layers run on copies of their weights, made once here.

    Nothing changes on other devices and where PyTorch has no oneDNN. A decoder that is compiled stays as it is, for the
    compiler must see its layers.
    """

    def __init__(self, model: Any) -> None:
        onednn = torch.backends.mkldnn
        usable = model.device.type == "cpu" and onednn.is_available() and onednn.enabled  # type: ignore[no-untyped-call]
        compiled = model.base_model._compiled_call_impl is not None
        modules = [model.get_output_embeddings()] if compiled else list(model.modules())
        layers = {layer for layer in modules if usable and _plain(layer)}
        products: list[list[Any]] = []
        for names in TOGETHER:
            sets = ([getattr(module, name, None) for name in names] for module in modules)
            products += [found for found in sets if all(layer in layers for layer in found) and _alike(found)]
        products += [[layer] for layer in layers.difference(*products)]
        self._forwards: list[tuple[Any, Callable[[Tensor], Tensor]]] = []
        for found in products:
            self._forwards += [(layer, partial(product, layer)) for product in [_Product(found)] for layer in found]

    def __enter__(self) -> None:
        for layer, forward in self._forwards:
            layer.forward = forward

    def __exit__(self, *_: object) -> None:
        for layer, _forward in self._forwards:
            vars(layer).pop("forward", None)  # the class's own is seen again


def _plain(layer: Any) -> bool:
    own = "forward" in vars(layer)  # what somebody else has put in place stays there
    return type(layer) is torch.nn.Linear and layer.weight.dtype == torch.float32 and not own


def _alike(layers: list[Any]) -> bool:
    return all(layer.bias is None and layer.in_features == layers[0].in_features for layer in layers)


class _Product:
    """Layers that are given the same input: one product for all of them, when the first is asked; the others find theirs."""

    def __init__(self, layers: list[torch.nn.Linear]) -> None:
        self._bias = layers[0].bias
        self._copy = torch.ops.mkldnn._reorder_linear_weight(torch.cat([layer.weight.detach() for layer in layers]))
        self._sizes = {layer: layer.out_features for layer in layers}
        self._input: Tensor | None = None
        self._left: dict[torch.nn.Linear, Tensor] = {}

    def __call__(self, layer: torch.nn.Linear, x: Tensor) -> Tensor:
        if not torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu") or x.dtype != layer.weight.dtype:
            return torch.nn.functional.linear(x, layer.weight, layer.bias)
        if x is not self._input or layer not in self._left:
            output: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._copy, self._bias, "none", [], "")
            if len(self._sizes) == 1:
                return output
            parts = torch.split(output, list(self._sizes.values()), -1)
            self._input, self._left = x, dict(zip(self._sizes, parts, strict=True))
        found = self._left.pop(layer)
        if not self._left:
            self._input = None  # nothing is kept for longer than it is needed
        return found
