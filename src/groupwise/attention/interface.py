"""Our attention in a Hugging Face decoder: run on one flat sequence of tokens, its attention layers call back here."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

NAME = "groupwise"


class Attend(Protocol):
    def __call__(self, layer: int, query_HND: Tensor, key_KND: Tensor, value_KND: Tensor, scale: float) -> Tensor:
        """What each of N tokens gathers, [N, H, D]; K key-value heads serve H query heads."""
        ...


_attend: ContextVar[Attend] = ContextVar("groupwise_attend")


def _interface(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None, **extra: Any
) -> tuple[Tensor, None]:
    """The form that transformers calls; anything that changes plain attention is refused, and found out by `packs`."""
    for name in ("softcap", "s_aux", "sliding_window", "position_bias"):
        if extra.get(name) is not None:
            raise NotImplementedError(f"attention with {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not torch.compiler.is_compiling():
        return _run(module.layer_idx, query, key, value, scale), None
    run = _outside_graph if torch.is_grad_enabled() else _in_graph
    return run(module.layer_idx, query, key, value, scale), None


def _run(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return _attend.get()(layer, query[0], key[0], value[0], scale)[None]


_outside_graph = torch.compiler.disable(_run)  # type: ignore[no-untyped-call]
"""With gradients the graph breaks here, since the attention has its own backward pass."""
_in_graph = torch.library.custom_op("groupwise::attend", _run, mutates_args=())
"""Without gradients, one node of the graph; what it writes is the cache, which the graph knows nothing of."""


@_in_graph.register_fake
def _(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return query.transpose(1, 2).new_empty(query.transpose(1, 2).shape)


AttentionInterface.register(NAME, _interface)


@contextmanager
def attending(decoder: Any, attend: Attend) -> Iterator[None]:
    """Run the decoder's attention layers through `attend`."""
    config = decoder.config
    before = config._attn_implementation
    token = _attend.set(attend)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _attend.reset(token)


def recomputing(decoder: Any) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For torch's checkpoint: what surrounds a layer's first run, and its second, in the backward pass."""
    attend = _attend.get(None)
    return nullcontext(), nullcontext() if attend is None else attending(decoder, attend)


def run_packed(decoder: Any, tokens_N: Tensor, positions_N: Tensor, attend: Attend) -> Tensor:
    """The last hidden states [N, H] of flat tokens."""
    with attending(decoder, attend):
        output = decoder(input_ids=tokens_N[None], position_ids=positions_N[None], use_cache=False)
    hidden_NH: Tensor = output.last_hidden_state[0]
    return hidden_NH
