"""Attention over packed sequences on a GPU where `training_varlen` cannot run: flex attention with a mask of who sees whom."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from groupwise.models.attention.attend import PLAIN, AttentionForm

RECOMPILE_LIMIT = 64
Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query token, key token) -> bool: whether the query attends to the key."""


def visible(prompt_lengths: Tensor, prompts_R: Tensor, lengths_R: Tensor, device: Any, window: int = 0) -> Visible:
    """Each token attends to its own row up to itself, and to all of its prompt; within a sliding window if it is not 0.

    Arguments as of `PackedRows`.
    """
    rows = torch.arange(len(prompt_lengths) + len(lengths_R))
    lengths = torch.cat([prompt_lengths, lengths_R])
    row_N = rows.repeat_interleave(lengths).to(device)
    prompt_N = torch.cat([rows[: len(prompt_lengths)], prompts_R]).repeat_interleave(lengths).to(device)

    def seen(_batch: Tensor, _head: Tensor, token: Tensor, other: Tensor) -> Tensor:
        own, of_prompt = row_N[other] == row_N[token], row_N[other] == prompt_N[token]
        return (own | of_prompt) & (other <= token)

    if not window:
        return seen
    before_R = torch.cat([torch.zeros_like(prompt_lengths), prompt_lengths[prompts_R]])
    first_N = (lengths.cumsum(0) - lengths - before_R).repeat_interleave(lengths)
    position_N = (torch.arange(len(first_N)) - first_N).to(device)
    hidden_N = position_N - window  # a tensor, since a number that the mask captures would be compiled as a dynamic one
    """The last position before each token's window."""

    def seen_in_window(batch: Tensor, head: Tensor, token: Tensor, other: Tensor) -> Tensor:
        return seen(batch, head, token, other) & (position_N[other] > hidden_N[token])

    return seen_in_window


def block_mask(visible: Visible, N: int, device: Any) -> BlockMask:
    mask: BlockMask = _compiled(create_block_mask, device)(visible, None, None, N, N, device=device)
    return mask


def attention(
    query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, mask: BlockMask, scale: float, form: AttentionForm = PLAIN
) -> Tensor:
    """The attention output of each token, [N, H, D]. The window is that of the mask; that of `form` is not read."""
    query, key, value = (x.transpose(0, 1)[None] for x in (query_NHD, key_NKD, value_NKD))
    settings: dict[str, Any] = {"block_mask": mask, "scale": scale, "enable_gqa": query_NHD.shape[1] != key_NKD.shape[1]}
    if query.device.type != "cpu":  # its other kernel, for few queries, does not compile for some shapes
        settings["kernel_options"] = {"FORCE_USE_FLEX_ATTENTION": True}
    if form.softcap:
        settings["score_mod"] = _capped(form.softcap, query_NHD.shape[1], query.device)
    run = _compiled(flex_attention, query.device)
    if form.sinks_H is None:
        output: Tensor = run(query, key, value, **settings)
        return output[0].transpose(0, 1)
    output, lse_1HN = _with_log_sum_exp(run, query, key, value, **settings)
    # The sink enlarges the softmax's denominator: e^lse / (e^lse + e^sink) of the weight is left for the keys.
    share_HN = torch.sigmoid(lse_1HN[0] - form.sinks_H.to(lse_1HN.dtype)[:, None])
    return (output[0] * share_HN[..., None].to(output.dtype)).transpose(0, 1)


def _with_log_sum_exp(run: Any, *tensors: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """The output of flex attention and the log-sum-exp of the scores, [1, H, N]."""
    if not hasattr(flex, "AuxRequest"):  # PyTorch before 2.9
        output, lse_1HN = run(*tensors, **settings, return_lse=True)
        return output, lse_1HN
    output, auxiliary = run(*tensors, **settings, return_aux=flex.AuxRequest(lse=True))
    return output, auxiliary.lse


@functools.cache
def _capped(softcap: float, heads: int, device: torch.device) -> Callable[..., Tensor]:
    softcap_H = torch.full((heads,), softcap, device=device)  # a number here would be compiled as a dynamic one, which fails

    def capped(score: Tensor, _batch: Tensor, head: Tensor, _token: Tensor, _other: Tensor) -> Tensor:
        return softcap_H[head] * torch.tanh(score / softcap_H[head])

    return capped


def _compiled(function: Any, device: Any) -> Any:
    """Compiled, since uncompiled its memory would grow with N squared; as it is on a CPU, where only tests run it."""
    return function if torch.device(device).type == "cpu" else _compile(function)


@functools.cache
def _compile(function: Any) -> Any:
    settings: dict[str, Any] = {"dynamic": True, "fullgraph": True}
    # Beyond the limit PyTorch would run it uncompiled. It recompiles for gradients or none, few tokens or many, and each dtype.
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        settings["recompile_limit"] = RECOMPILE_LIMIT
    else:  # older PyTorch has one limit for the whole process
        config: Any = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, RECOMPILE_LIMIT)
    return torch.compile(function, **settings)
