"""Log-probabilities and entropies of completion tokens, with each prompt run once."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GradientCheckpointingLayer

from groupwise.attention import Packed, packs, recomputing, run_packed
from groupwise.config import LearnerSection
from groupwise.learner.gradients import gradients_in_place
from groupwise.learner.head import token_logprobs
from groupwise.models import left_pad, positions
from groupwise.types import Batch


def completion_logprobs(
    model: Any, batch: Batch, *, temperature: float = 1.0, share_prompts: bool = True, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """The policy's log-probability of each completion token, and the entropy of the distribution it was drawn from.

    Args:
        model: a Hugging Face causal language model.
        batch: rows to score; their advantages are not read.
        temperature: logits are divided by it, as the sampler's were.
        share_prompts: run each prompt once, its gradient flowing from every completion, instead of once per row.
        entropy_gradient: whether the entropy is differentiable.

    Returns:
        (logprobs_BT, entropy_BT), float32, in nats; 0 after a row's end.
    """
    hidden_NH = completion_hidden(model, batch, share_prompts)
    inside_BT = inside_rows(batch)
    logprobs_N, entropy_N = token_logprobs(model, hidden_NH, batch.tokens_BT[inside_BT], temperature, entropy_gradient)
    zeros_BT = torch.zeros(batch.tokens_BT.shape, device=logprobs_N.device)
    return zeros_BT.masked_scatter(inside_BT, logprobs_N), zeros_BT.masked_scatter(inside_BT, entropy_N)


@contextmanager
def running(model: Any, settings: LearnerSection) -> Iterator[None]:
    """How the learner runs a model: products in the settings' precision, gradients of the largest matrices added in place,
    layers checkpointed if the settings say so."""
    rough = settings.precision == "bfloat16"
    training = torch.is_grad_enabled()
    with (
        torch.autocast(model.device.type, torch.bfloat16, enabled=rough),
        gradients_in_place(model) if training else nullcontext(),
        _checkpointing(model) if training and settings.checkpointing else nullcontext(),
    ):
        yield


_checkpointed: ContextVar[bool] = ContextVar("groupwise_checkpointed", default=False)


@contextmanager
def _checkpointing(model: Any) -> Iterator[None]:
    """Within: each layer keeps only its input for the backward pass, and is computed again there.

    Not through transformers' own switch, which asks for training mode and so would bring some models' dropout with it.
    """
    context = partial(recomputing, model.base_model)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, context_fn=context)
    token = _checkpointed.set(True)
    try:
        yield
    finally:
        _checkpointed.reset(token)
        for layer in layers:
            del layer.forward  # the class's own is seen again


def inside_rows(batch: Batch) -> Tensor:
    """bool [B, T], False after a row's end."""
    return torch.arange(batch.tokens_BT.shape[1], device=batch.tokens_BT.device) < batch.lengths_B[:, None]


def completion_hidden(model: Any, batch: Batch, share_prompts: bool) -> Tensor:
    """The last hidden states [N, H] from which the completion tokens are predicted, row after row, without padding."""
    if share_prompts and packs(model):
        return _hidden_packed(model.base_model, batch)
    if _checkpointed.get():  # a cache that keeps its graph cannot be written twice
        share_prompts = False
    hidden_BTH = (_hidden_shared if share_prompts else _hidden_whole)(model.base_model, batch)
    return hidden_BTH[inside_rows(batch)]


def _hidden_packed(decoder: Any, batch: Batch) -> Tensor:
    """Prompts once and completions without padding, on one flat sequence; a row's last token predicts nothing and stays out."""
    prompt_lengths = [len(prompt) for prompt in batch.prompts]
    lengths = batch.lengths_B.tolist()
    layout = Packed(prompt_lengths, batch.group_ids_B, batch.lengths_B - 1, batch.tokens_BT.device)
    rows = [batch.tokens_BT[row, : length - 1] for row, length in enumerate(lengths)]
    hidden_NH = run_packed(decoder, torch.cat([*batch.prompts, *rows]), layout.positions_N, layout)
    prompt_ends = list(itertools.accumulate(prompt_lengths))
    start = prompt_ends[-1]
    index = []
    for prompt, length in zip(batch.group_ids_B.tolist(), lengths, strict=True):
        index += [prompt_ends[prompt] - 1, *range(start, start + length - 1)]
        start += length - 1
    return hidden_NH[torch.tensor(index, device=hidden_NH.device)]


def _hidden_whole(decoder: Any, batch: Batch) -> Tensor:
    """Hidden states [B, T, H] that predict the completion tokens; every row with its own prompt."""
    prompt_PL, mask_PL = left_pad(batch.prompts)
    L = prompt_PL.shape[1]
    tokens_BL = torch.cat([prompt_PL[batch.group_ids_B], batch.tokens_BT[:, :-1]], dim=1)
    mask_BL = torch.cat([mask_PL[batch.group_ids_B], torch.ones_like(batch.tokens_BT[:, :-1])], dim=1)
    output = decoder(input_ids=tokens_BL, attention_mask=mask_BL, position_ids=positions(mask_BL), use_cache=False)
    hidden_BTH: Tensor = output.last_hidden_state[:, L - 1 :]
    return hidden_BTH


def _hidden_shared(decoder: Any, batch: Batch) -> Tensor:
    """The same, each prompt once: its keys and values keep their graph and are read by all its completions."""
    prompt_PL, mask_PL = left_pad(batch.prompts)
    cache = DynamicCache(config=decoder.config)
    output = decoder(
        input_ids=prompt_PL, attention_mask=mask_PL, position_ids=positions(mask_PL), past_key_values=cache, use_cache=True
    )
    last_BH = output.last_hidden_state[batch.group_ids_B, -1:]
    inputs_BT = batch.tokens_BT[:, :-1]
    if inputs_BT.shape[1] == 0:
        return cast(Tensor, last_BH)
    cache.batch_select_indices(batch.group_ids_B)
    mask_BL = torch.cat([mask_PL[batch.group_ids_B], torch.ones_like(inputs_BT)], dim=1)
    output = decoder(
        input_ids=inputs_BT,
        attention_mask=mask_BL,
        position_ids=positions(mask_BL)[:, -inputs_BT.shape[1] :],
        past_key_values=cache,
        use_cache=True,
    )
    return torch.cat([last_BH, output.last_hidden_state], dim=1)
