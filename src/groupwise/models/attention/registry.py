"""Our attention in transformers' attention registry: the attention layers of a decoder on packed sequences call back here."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from groupwise.models.attention.attend import Attend, current_attend
from groupwise.models.patches import Forwards, patched

NAME = "groupwise"


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None, **extra: Any
) -> tuple[Tensor, None]:
    """The signature that transformers calls. Whatever changes plain attention is refused, which the model's trial notices."""
    for name in ("softcap", "s_aux", "sliding_window", "position_bias"):
        if extra.get(name) is not None:
            raise NotImplementedError(f"attention with {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not torch.compiler.is_compiling():
        return _run(module.layer_idx, query, key, value, scale), None
    run = _outside_graph if torch.is_grad_enabled() else _in_graph
    return run(module.layer_idx, query, key, value, scale), None


def _run(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    query_NHD, key_NKD, value_NKD = (x[0].transpose(0, 1) for x in (query, key, value))
    return current_attend.get()(layer, query_NHD, key_NKD, value_NKD, scale)[None]


_outside_graph = torch.compiler.disable(_run)  # type: ignore[no-untyped-call]
"""With gradients the compiled graph breaks here, since the attention has its own backward pass."""
_in_graph = torch.library.custom_op("groupwise::attend", _run, mutates_args=())
"""Without gradients it is one node of the graph. What it writes is the KV cache, which the graph does not see."""


@_in_graph.register_fake
def _(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return query.transpose(1, 2).new_empty(query.transpose(1, 2).shape)


AttentionInterface.register(NAME, _attention)


@contextmanager
def attending(decoder: Any, attend: Attend, forwards: Forwards = ()) -> Iterator[None]:
    """Within: the decoder's attention layers run through `attend`, and the given modules run the given forwards."""
    config = decoder.config
    before = config._attn_implementation
    token = current_attend.set(attend)
    config._attn_implementation = NAME
    try:
        with patched(forwards):
            yield
    finally:
        config._attn_implementation = before
        current_attend.reset(token)


def recomputing(
    decoder: Any, forwards: Forwards, linears: Forwards = ()
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For torch's checkpoint: the contexts of a layer's first run, and of its second, in the backward pass.

    `linears`: those of the forwards that also run in padded batches, through transformers' attention.
    """
    attend = current_attend.get(None)
    return nullcontext(), patched(linears) if attend is None else attending(decoder, attend, forwards)


def run_packed(decoder: Any, tokens_N: Tensor, positions_N: Tensor, attend: Attend, forwards: Forwards = ()) -> Tensor:
    """The last hidden states [N, H] of packed tokens (int64 [N]) at their positions (int64 [N])."""
    with attending(decoder, attend, forwards):
        output = decoder(input_ids=tokens_N[None], position_ids=positions_N[None], use_cache=False)
    hidden_NH: Tensor = output.last_hidden_state[0]
    return hidden_NH
