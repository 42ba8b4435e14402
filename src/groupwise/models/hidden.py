"""Hidden states from which completion tokens are predicted, with each prompt run once where the model allows it."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import GradientCheckpointingLayer

from groupwise.models.attention.registry import recomputing
from groupwise.models.decoder import Decoder
from groupwise.models.padded import right_pad
from groupwise.models.patches import patched
from groupwise.types import Batch


@contextmanager
def checkpointing(decoder: Decoder) -> Iterator[None]:
    """Within: each layer keeps only its input for the backward pass, and is computed again there.

    Not through transformers' own switch, which asks for training mode and so would bring some models' dropout with it.
    """
    context = partial(recomputing, decoder.module, decoder.forwards(), decoder.linears)
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": context}
    layers = [module for module in decoder.module.modules() if isinstance(module, GradientCheckpointingLayer)]
    # Only the outermost: an inner one would be run again without its own checkpoint, after this context has ended.
    inside = {inner for layer in layers for inner in layer.modules() if inner is not layer}
    with patched((layer, partial(checkpoint, layer.forward, **settings)) for layer in layers if layer not in inside):
        yield


def inside_rows(batch: Batch) -> Tensor:
    """bool [B, T], False after a row's end."""
    return torch.arange(batch.tokens_BT.shape[1], device=batch.tokens_BT.device) < batch.lengths_B[:, None]


def completion_hidden(decoder: Decoder, batch: Batch, share_prompts: bool) -> Tensor:
    """The last hidden states [N, H] from which the completion tokens are predicted, row after row, without padding.

    `share_prompts`: run each prompt once, its gradient flowing from every completion, instead of once per row.
    """
    prompt_lengths_P = torch.tensor([len(prompt) for prompt in batch.prompts])
    decoder.check_length(int((prompt_lengths_P[batch.group_ids_B.cpu()] + batch.lengths_B.cpu()).max()))
    if share_prompts and decoder.packs():
        return _packed(decoder, batch)
    return _whole_rows(decoder, batch)[inside_rows(batch)]


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
    """Hidden states [B, T, H] that predict the completion tokens; every row alone with its own copy of the prompt.

    Padding is on the right, where a causal decoder never sees it, whatever its layers keep of earlier tokens.
    """
    prompts = batch.group_ids_B.tolist()
    completions = [batch.tokens_BT[row, : length - 1] for row, length in enumerate(batch.lengths_B.tolist())]
    rows = [torch.cat([batch.prompts[prompt], completion]) for prompt, completion in zip(prompts, completions, strict=True)]
    with patched(decoder.linears):
        hidden_BLH = decoder.module(input_ids=right_pad(rows), use_cache=False).last_hidden_state
    starts_B = torch.tensor([len(batch.prompts[prompt]) - 1 for prompt in prompts], device=hidden_BLH.device)
    position_T = torch.arange(batch.tokens_BT.shape[1], device=hidden_BLH.device)
    index_BT = (starts_B[:, None] + position_T).clamp(max=hidden_BLH.shape[1] - 1)
    hidden_BTH: Tensor = hidden_BLH.gather(1, index_BT[..., None].expand(-1, -1, hidden_BLH.shape[2]))
    return hidden_BTH
