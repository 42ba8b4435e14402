"""Linear layers in bfloat16 on a CPU: weights and inputs are rounded to it, sums, outputs and everything between are float32.

What torch.autocast would also do in bfloat16 (norms, RoPE, SwiGLU, attention) stays on the float32 kernels, which are faster than
PyTorch's in bfloat16. Sampler and learner round at the same places, so their log-probabilities hardly differ. The bfloat16 copies
take half the memory of the weights. Only Linear layers run in bfloat16: the experts of a mixture, and the convolutions and
recurrences of recurrent layers, stay in float32, and so do in generation the absorbed projections of latent attention.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from groupwise.kernels.blocked_bf16 import blocked_matmul_bf16, to_blocked_bf16, why_not_bf16
from groupwise.models.adapters import is_lora, linear_layers, linear_weight
from groupwise.models.patches import Forwards, is_observed


class RoundedWeights:
    """bfloat16 copies of weight matrices in the blocked layout, made when first needed. Meanwhile no weight may change."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._latest: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    def weight(self, weight_NK: Tensor) -> Tensor:
        """The copy of a matrix, as `to_blocked_bf16` makes it."""
        if id(weight_NK) not in self._copies:
            with torch.no_grad():
                self._copies[id(weight_NK)] = weight_NK, to_blocked_bf16(weight_NK)  # kept alive, so that its id stays its own
        return self._copies[id(weight_NK)][1]

    def input(self, x: Tensor) -> Tensor:
        """An input in bfloat16, rounded once for layers that follow each other on the same tensor (Q, K and V; gate and up)."""
        if x.is_inference():  # without a version that would tell of a change in place
            return x.to(torch.bfloat16).contiguous()
        if self._latest is not None and self._latest[0]() is x and self._latest[1] == x._version:
            return self._latest[2]
        rounded = x.detach().to(torch.bfloat16).contiguous()
        self._latest = weakref.ref(x), x._version, rounded
        return rounded


class Bfloat16:
    """The forward and backward passes of one model in bfloat16."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.copies: RoundedWeights | None = None
        """Inside `running`: the copies of the weights."""
        self._held: RoundedWeights | None = None
        """Inside `held`: the copies that all forward passes share."""

    def why_not(self) -> str | None:
        """Why the kernels cannot run this model's linear layers in bfloat16, with float32 between them; None if they can."""
        decoder = self._decoder
        if not decoder.on_cpu:
            return f"C++ kernels run on a CPU, and the model is on {decoder.device}"
        if decoder.dtype != torch.float32:
            return f"the kernels round float32 weights, and the model's are {decoder.dtype}"
        if decoder.compiled:
            return "torch.compile generates its own code"
        if not (decoder.backend.layer_kernels and decoder.backend.blocked_weights):
            return "the backend is set to run layers without C++"
        return "the model runs in padded batches" if not decoder.packs() else why_not_bf16()

    def rounds_to(self, dtype: torch.dtype | None) -> bool:
        """Whether generating in this dtype is rounding weights and inputs of float32 matmuls."""
        return dtype == torch.bfloat16 and self.why_not() is None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within: no weight changes, so that copies are made once for all forward passes."""
        self._held = RoundedWeights()
        try:
            yield
        finally:
            self._held = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within: the decoder's linear layers run in bfloat16; for its output layer there is a copy among `copies`."""
        decoder = self._decoder
        self.copies = RoundedWeights() if self._held is None else self._held
        decoder.linears = rounded_forwards(list(decoder.module.modules()), self.copies)
        try:
            yield
        finally:
            self.copies, decoder.linears = None, ()


def rounded_weights(decoder: Any, head: list[Any], *, packed: bool) -> tuple[Forwards, Any, Forwards]:
    """The arguments of `BlockedWeights` for a rollout in bfloat16: forwards of the output layer, the decoder, those inside it.

    `packed`: it runs packed sequences; otherwise the decoder is called as it is, and forwards inside it are among the first.
    """
    copies = RoundedWeights()
    of_head, inside = _merged_forwards(head, copies), _merged_forwards(list(decoder.module.modules()), copies)
    return (of_head, decoder, inside) if packed else ([*of_head, *inside], None, [])


def rounded_forwards(modules: list[Any], rounded: RoundedWeights) -> Forwards:
    """Forwards on bfloat16 copies of their weights for those of the modules that are plain float32 Linear layers."""
    return [(module, partial(_linear, module, rounded)) for module in modules if is_plain_linear(module)]


def _merged_forwards(modules: list[Any], rounded: RoundedWeights) -> Forwards:
    """The same for generation: layers with adapters run on one rounded copy of W + s B A."""
    layers = linear_layers(modules)
    plain = [layer for layer in layers if not is_lora(layer)]
    adapted = [layer for layer in layers if is_lora(layer) and not is_observed(layer) and layer.in_features % 2 == 0]
    adapted = [layer for layer in adapted if layer.weight.dtype == torch.float32]
    merged = [(layer, partial(_merged, layer, rounded, to_blocked_bf16(linear_weight(layer)))) for layer in adapted]
    return [*rounded_forwards(plain, rounded), *merged]


def _merged(layer: Any, rounded: RoundedWeights, blocked: Tensor, x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or torch.is_grad_enabled():
        return type(layer).forward(layer, x)  # type: ignore[no-any-return]
    return blocked_matmul_bf16(rounded.input(x), blocked, layer.bias, layer.out_features)


def is_plain_linear(module: Any) -> bool:
    """Whether it is a Linear layer in float32 that nobody observes, with an even number of input features."""
    plain = type(module) is torch.nn.Linear and not is_observed(module)
    return plain and module.weight.dtype == torch.float32 and module.in_features % 2 == 0


def _linear(layer: torch.nn.Linear, rounded: RoundedWeights, x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        return torch.nn.functional.linear(x, layer.weight, layer.bias)
    if not torch.is_grad_enabled():
        return blocked_matmul_bf16(rounded.input(x), rounded.weight(layer.weight), layer.bias, layer.out_features)
    output: Tensor = _Linear.apply(x, layer.weight, layer.bias, rounded)  # type: ignore[no-untyped-call]
    return output


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, rounded: RoundedWeights) -> Tensor:
        x16 = rounded.input(x)
        ctx.save_for_backward(x16, weight_NK)
        return blocked_matmul_bf16(x16, rounded.weight(weight_NK), bias_N, len(weight_NK))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x16, weight_NK = ctx.saved_tensors
        d_x = d_weight = d_bias = None
        gradient16 = gradient.to(torch.bfloat16).flatten(0, -2)
        if ctx.needs_input_grad[0]:
            d_x = (gradient16 @ weight_NK.to(torch.bfloat16)).float().view(x16.shape)
        if ctx.needs_input_grad[1]:
            d_weight = (gradient16.t() @ x16.flatten(0, -2)).float()
        if ctx.needs_input_grad[2]:
            d_bias = gradient.flatten(0, -2).sum(0)
        return d_x, d_weight, d_bias, None
