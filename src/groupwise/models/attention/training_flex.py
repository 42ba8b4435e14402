"""Attention over packed sequences on a GPU where `training_varlen` cannot run: flex attention with a mask of who sees whom."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

RECOMPILE_LIMIT = 64
Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query token, key token) -> bool: whether the query attends to the key."""


def visible(prompt_lengths: Tensor, prompts_R: Tensor, lengths_R: Tensor, device: Any) -> Visible:
    """Each token attends to its own row up to itself, and to all of its prompt. Arguments as of `PackedRows`."""
    rows = torch.arange(len(prompt_lengths) + len(lengths_R))
    lengths = torch.cat([prompt_lengths, lengths_R])
    row_N = rows.repeat_interleave(lengths).to(device)
    prompt_N = torch.cat([rows[: len(prompt_lengths)], prompts_R]).repeat_interleave(lengths).to(device)

    def seen(_batch: Tensor, _head: Tensor, token: Tensor, other: Tensor) -> Tensor:
        own, of_prompt = row_N[other] == row_N[token], row_N[other] == prompt_N[token]
        return (own | of_prompt) & (other <= token)

    return seen


def block_mask(visible: Visible, N: int, device: Any) -> BlockMask:
    mask: BlockMask = _compiled(create_block_mask, device)(visible, None, None, N, N, device=device)
    return mask


def attention(query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """The attention output of each token, [N, H, D]."""
    query, key, value = (x.transpose(0, 1)[None] for x in (query_NHD, key_NKD, value_NKD))
    shared = query_NHD.shape[1] != key_NKD.shape[1]
    run = _compiled(flex_attention, query.device)
    output: Tensor = run(query, key, value, block_mask=mask, scale=scale, enable_gqa=shared)
    return output[0].transpose(0, 1)


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
