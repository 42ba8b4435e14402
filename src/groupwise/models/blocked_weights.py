"""Linear layers on copies of their weights in a blocked layout, while decoding: up to twice as fast on a CPU, most with few rows.

The copies take the weights' memory once more, for as long as a rollout takes.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from groupwise.kernels.blocked import blocked_matmul_kernel, to_blocked
from groupwise.models.adapters import linear_layers, linear_weight
from groupwise.models.patches import Forwards, has_own_forward, is_hooked, patched


class BlockedWeights:
    """A context in which linear layers run on blocked copies of their weights; see `LanguageModel.blocked_weights`."""

    def __init__(self, forwards: Forwards, decoder: Any = None, linears: Forwards = ()) -> None:
        """`linears`: forwards of layers inside the decoder, which are patched in only while it runs packed sequences."""
        self._forwards, self._decoder, self._linears = forwards, decoder, linears

    def __enter__(self) -> None:
        self._patched = patched(self._forwards)
        self._patched.__enter__()
        if self._decoder is not None:
            self._decoder.linears = self._linears

    def __exit__(self, *error: Any) -> None:
        if self._decoder is not None:
            self._decoder.linears = ()
        self._patched.__exit__(*error)


def blocked_forwards(modules: list[Any]) -> Forwards:
    """Forwards on blocked copies of their weights, adapters included, for those of the modules that are float32 linear layers."""
    kernel = blocked_matmul_kernel()
    layers = [layer for layer in linear_layers(modules) if kernel is not None and _is_plain(layer)]
    return [(layer, partial(_linear, layer, kernel, to_blocked(linear_weight(layer)))) for layer in layers]


def is_blocked(module: Any) -> bool:
    """Whether a linear layer runs on a blocked copy of its weight now, and no hook observes it."""
    return isinstance(vars(module).get("forward"), partial) and module.forward.func is _linear and not is_hooked(module)


def _is_plain(layer: Any) -> bool:
    return bool(layer.weight.dtype == torch.float32) and not has_own_forward(layer)


def _linear(layer: Any, kernel: Any, blocked: Tensor, x: Tensor) -> Tensor:
    if not torch.is_inference_mode_enabled() or torch.is_autocast_enabled("cpu") or x.dtype != layer.weight.dtype:
        return type(layer).forward(layer, x)  # type: ignore[no-any-return]
    output: Tensor = kernel(x, blocked, layer.bias, layer.out_features)
    return output
