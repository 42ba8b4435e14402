"""Hidden states from which completion tokens are predicted, with each prompt run once where the model allows it."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GradientCheckpointingLayer

from groupwise.models.attention.registry import recomputing
from groupwise.models.decoder import Decoder
from groupwise.models.padded import left_pad, positions
from groupwise.models.patches import patched
from groupwise.types import Batch

_checkpointed: ContextVar[bool] = ContextVar("groupwise_checkpointed", default=False)


@contextmanager
def checkpointing(decoder: Decoder) -> Iterator[None]:
    """Within: each layer keeps only its input for the backward pass, and is computed again there.

    Not through transformers' own switch, which asks for training mode and so would bring some models' dropout with it.
    """
    context = partial(recomputing, decoder.module, decoder.forwards(), decoder.linears)
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": context}
    layers = [module for module in decoder.module.modules() if isinstance(module, GradientCheckpointingLayer)]
    token = _checkpointed.set(True)
    try:
        with patched((layer, partial(checkpoint, layer.forward, **settings)) for layer in layers):
            yield
    finally:
        _checkpointed.reset(token)


def inside_rows(batch: Batch) -> Tensor:
    """bool [B, T], False after a row's end."""
    return torch.arange(batch.tokens_BT.shape[1], device=batch.tokens_BT.device) < batch.lengths_B[:, None]


def completion_hidden(decoder: Decoder, batch: Batch, share_prompts: bool) -> Tensor:
    """The last hidden states [N, H] from which the completion tokens are predicted, row after row, without padding.

    `share_prompts`: run each prompt once, its gradient flowing from every completion, instead of once per row.
    """
    if share_prompts and decoder.packs():
        return _packed(decoder, batch)
    if _checkpointed.get():  # a cache that keeps its graph cannot be written twice
        share_prompts = False
    hidden_BTH = (_shared_prompts if share_prompts else _whole_rows)(decoder, batch)
    return hidden_BTH[inside_rows(batch)]


def _packed(decoder: Decoder, batch: Batch) -> Tensor:
    """Prompts once, then completions, in one packed sequence; a row's last token predicts nothing and is left out."""
    prompt_lengths = [len(prompt) for prompt in batch.prompts]
    lengths = batch.lengths_B.tolist()
    attention = decoder.packed_attention(prompt_lengths, batch.group_ids_B, batch.lengths_B - 1)
    rows = [batch.tokens_BT[row, : length - 1] for row, length in enumerate(lengths)]
    hidden_NH = decoder.run_packed(torch.cat([*batch.prompts, *rows]), attention.positions_N, attention)
    prompt_ends = list(itertools.accumulate(prompt_lengths))
    start = prompt_ends[-1]
    index = []
    for prompt, length in zip(batch.group_ids_B.tolist(), lengths, strict=True):
        index += [prompt_ends[prompt] - 1, *range(start, start + length - 1)]
        start += length - 1
    return hidden_NH[torch.tensor(index, device=hidden_NH.device)]


def _whole_rows(decoder: Decoder, batch: Batch) -> Tensor:
    """Hidden states [B, T, H] that predict the completion tokens; every row with its own copy of the prompt."""
    prompt_PL, mask_PL = left_pad(batch.prompts)
    L = prompt_PL.shape[1]
    tokens_BL = torch.cat([prompt_PL[batch.group_ids_B], batch.tokens_BT[:, :-1]], dim=1)
    mask_BL = torch.cat([mask_PL[batch.group_ids_B], torch.ones_like(batch.tokens_BT[:, :-1])], dim=1)
    output = decoder.module(input_ids=tokens_BL, attention_mask=mask_BL, position_ids=positions(mask_BL), use_cache=False)
    hidden_BTH: Tensor = output.last_hidden_state[:, L - 1 :]
    return hidden_BTH


def _shared_prompts(decoder: Decoder, batch: Batch) -> Tensor:
    """The same, each prompt once: its keys and values keep their graph, and all its completions read them."""
    prompt_PL, mask_PL = left_pad(batch.prompts)
    cache = DynamicCache(config=decoder.config)
    output = decoder.module(
        input_ids=prompt_PL, attention_mask=mask_PL, position_ids=positions(mask_PL), past_key_values=cache, use_cache=True
    )
    last_BH = output.last_hidden_state[batch.group_ids_B, -1:]
    inputs_BT = batch.tokens_BT[:, :-1]
    if inputs_BT.shape[1] == 0:
        return cast(Tensor, last_BH)
    cache.batch_select_indices(batch.group_ids_B)
    mask_BL = torch.cat([mask_PL[batch.group_ids_B], torch.ones_like(inputs_BT)], dim=1)
    output = decoder.module(
        input_ids=inputs_BT,
        attention_mask=mask_BL,
        position_ids=positions(mask_BL)[:, -inputs_BT.shape[1] :],
        past_key_values=cache,
        use_cache=True,
    )
    return torch.cat([last_BH, output.last_hidden_state], dim=1)
