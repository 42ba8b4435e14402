"""Our attention in transformers' attention registry: the attention layers of a decoder on packed sequences call back here."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface

from groupwise.models.attention.attend import PLAIN, Attend, AttentionForm, current_attend
from groupwise.models.attention.latent import absorbed
from groupwise.models.patches import Forwards, patched

NAME = "groupwise"


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """The signature that transformers calls.

    Raises:
        NotImplementedError: the layer has another kind of attention. The decoder's trial catches it, and the fallback is taken.
    """
    if attention_mask is not None:
        raise NotImplementedError("attention with a mask of its own")
    if extra.get("position_bias") is not None:
        raise NotImplementedError("attention with a position bias")
    if extra.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise NotImplementedError("attention that is not causal")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    settings = scale, sliding_window or 0, softcap or 0.0, s_aux
    if not torch.compiler.is_compiling():
        output = absorbed(module, lambda q, k, v: _run(module.layer_idx, q, k, v, *settings), query, key)
        return _run(module.layer_idx, query, key, value, *settings) if output is None else output, None
    run = _outside_graph if torch.is_grad_enabled() else _in_graph
    return run(module.layer_idx, query, key, value, *settings), None


def _run(
    layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float, sinks: Tensor | None
) -> Tensor:
    plain = not (window or softcap) and sinks is None
    form = PLAIN if plain else AttentionForm(window=window, softcap=softcap, sinks_H=sinks)
    size, value_size = key.shape[-1], value.shape[-1]
    # Zeros added to queries and keys change no score, zeros added to values are cut off again: kernels see one head size.
    query, key, value = (pad(x, (0, max(size, value_size) - x.shape[-1])) for x in (query, key, value))
    query_NHD, key_NKD, value_NKD = (x[0].transpose(0, 1) for x in (query, key, value))
    output_NHD = current_attend.get()(layer, query_NHD, key_NKD, value_NKD, scale, form)
    return output_NHD[None, ..., :value_size]


_outside_graph = torch.compiler.disable(_run)  # type: ignore[no-untyped-call]
"""With gradients the compiled graph breaks here, since the attention has its own backward pass."""
_in_graph = torch.library.custom_op("groupwise::attend", _run, mutates_args=())
"""Without gradients it is one node of the graph. What it writes is the KV cache, which the graph does not see."""


@_in_graph.register_fake
def _(
    layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int, softcap: float, sinks: Tensor | None
) -> Tensor:
    output = query.transpose(1, 2)
    return output.new_empty(*output.shape[:-1], value.shape[-1])


AttentionInterface.register(NAME, _attention)


@contextmanager
def attending(decoder: Any, attend: Attend, forwards: Forwards = ()) -> Iterator[None]:
    """Within: the decoder's attention layers run through `attend`, and the given modules run the given forwards."""
    config = decoder.config
    parts = [part for name in getattr(config, "sub_configs", {}) if (part := getattr(config, name, None)) is not None]
    before = [(part, part._attn_implementation) for part in (config, *parts)]
    token = current_attend.set(attend)
    config._attn_implementation = NAME
    try:
        with patched(forwards):
            yield
    finally:
        for part, implementation in before:  # setting that of the whole has set those of its parts
            part._attn_implementation = implementation
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
