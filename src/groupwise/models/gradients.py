"""Gradients of the vocabulary's matrices, added in place to what `parameter.grad` holds already.

Autograd would hold up to three gradients of such a matrix at once where it is both embedding and output layer: the sum so
far, and one from each use. They are most of the memory of a small model with a large vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GradientCheckpointingLayer

from groupwise.models.patches import has_own_forward, is_compiled, patched

_in_place: ContextVar[bool] = ContextVar("groupwise_gradients_in_place", default=False)


@contextmanager
def gradients_in_place(module: Any) -> Iterator[None]:
    """Within: backward() of what is run adds to `parameter.grad` itself, for the output layer and plain embeddings.

    For the learner's own updates only: torch.autograd.grad would see no gradient of these parameters.
    """
    # In a layer that is checkpointed, the second run in the backward pass would find the embedding's own forward again.
    layers = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
    inside = {inner for layer in layers for inner in layer.modules()}
    plain = (inner for inner in module.modules() if inner not in inside and _is_plain(inner))
    embeddings = [] if is_compiled(module) else list(plain)
    token = _in_place.set(True)
    try:
        with patched((embedding, partial(_embed, embedding)) for embedding in embeddings):
            yield
    finally:
        _in_place.reset(token)


def _is_plain(module: Any) -> bool:
    changed = has_own_forward(module) or type(module) is not torch.nn.Embedding
    return not (changed or module.max_norm or module.scale_grad_by_freq or module.sparse)


def sum_in_place(parameter: Tensor) -> bool:
    """Whether this parameter's gradient is to be added to parameter.grad, and not returned to autograd.

    Not below float32, where many small additions to a large sum would be lost; and not where the parameter has hooks that
    wait for its gradient.
    """
    wide = parameter.dtype in (torch.float32, torch.float64)
    hooked = bool(parameter._backward_hooks) or bool(getattr(parameter, "_post_accumulate_grad_hooks", None))
    return _in_place.get() and wide and parameter.is_leaf and parameter.requires_grad and not hooked


def gradient_of(parameter: Tensor) -> Tensor:
    """parameter.grad, made if there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _embed(embedding: torch.nn.Embedding, tokens: Tensor) -> Tensor:
    weight_VH = embedding.weight
    if not sum_in_place(weight_VH):
        return torch.nn.functional.embedding(tokens, weight_VH, embedding.padding_idx)
    output: Tensor = _Embed.apply(tokens, weight_VH, embedding.padding_idx)  # type: ignore[no-untyped-call]
    return output


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight_VH: Tensor, padding: int | None) -> Tensor:
        ctx.tokens, ctx.weight_VH, ctx.padding = tokens, weight_VH, padding
        return torch.nn.functional.embedding(tokens, weight_VH)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        trained = torch.ones_like(ctx.tokens, dtype=torch.bool) if ctx.padding is None else ctx.tokens != ctx.padding
        sum_VH, tokens_N, gradient_NH = gradient_of(ctx.weight_VH), ctx.tokens[trained], gradients[0][trained]
        # Each of the two adds in the same order every time on its device.
        if sum_VH.device.type == "cpu":
            sum_VH.index_add_(0, tokens_N, gradient_NH)
        else:
            sum_VH.index_put_((tokens_N,), gradient_NH, accumulate=True)
        return None, None, None
