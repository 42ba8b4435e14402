"""Attention in training over packed sequences, forward and backward, on the CPU: packed_attention.cpp.

Packed: the tokens of all sequences are concatenated without padding. A prompt that several completions share occurs only once.
"""

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from groupwise.kernels.compiled import function, library, unavailable

SET_TOKENS = 256
"""A set of completions that one thread processes has at least this many tokens, and at least as many as their prompt."""


@functools.cache
def attention_kernels(head_size: int) -> Any:
    """The functions of packed_attention.cpp for one head size; None if it cannot be compiled."""
    loaded = library(*_source(head_size))
    if loaded is None:
        return None
    counts = {"attend": (11, 2, 5), "attend_backward": (16, 2, 6), "sink_gradient": (5, 0, 2)}
    return SimpleNamespace(**{name: function(loaded, name, *count) for name, count in counts.items()})


def _source(head_size: int) -> tuple[str, str]:
    return "packed_attention", f"-DHEAD_SIZE={head_size}"


def unsupported(query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor) -> str | None:
    """Why `packed_attention` cannot run on these tensors, which must have one dtype; None if it can."""
    if query_NHD.device.type != "cpu":
        return f"the kernel runs on the CPU only, not on {query_NHD.device.type}"
    if query_NHD.dtype != torch.float32:
        return f"the kernel needs float32, not {query_NHD.dtype}"
    size = query_NHD.shape[2]
    if key_NKD.shape != value_NKD.shape or key_NKD.shape[2] != size:
        sizes = f"{size}, {key_NKD.shape[2]} and {value_NKD.shape[2]}"
        return f"the kernel needs queries, keys and values of one head size, and as many values as keys; head sizes are {sizes}"
    reason = unavailable(*_source(size))
    return None if reason is None else f"the kernel could not be compiled: {reason}"


def packed_attention(
    query_NHD: Tensor,
    key_NKD: Tensor,
    value_NKD: Tensor,
    rows: "PackedRows",
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Causal attention of each token to its own sequence and to all of its prompt; differentiable, also in the sinks.

    Args:
        query_NHD: H query heads of N tokens; H / K of them share a key-value head. All three tensors must be contiguous, and
            `unsupported` must return None for them.
        rows: where the sequences lie among the N tokens.
        scale: factor of the scores before the softmax.
        window: a token sees the last so many tokens of its sequence (prompt and completion), itself included; 0: all.
        softcap: soft cap c of the scaled scores, c tanh(score / c); 0: none.
        sinks_H: for each query head a logit that takes part in the softmax and has no value.

    Returns:
        The attention output, [N, H, D].
    """
    sinks = None if sinks_H is None else sinks_H.to(query_NHD.dtype).contiguous()
    form = window, softcap
    output: Tensor = _Attention.apply(query_NHD, key_NKD, value_NKD, sinks, rows, scale, *form)  # type: ignore[no-untyped-call]
    return output


class PackedRows:
    """The layout of packed rows, P prompts followed by R completions, each of which attends to one of the prompts.

    A row is one sequence. Rows are grouped into sets, each of which one thread processes: a prompt by itself, or completions of
    one prompt.
    """

    def __init__(self, prompt_lengths: Tensor, prompts_R: Tensor, lengths_R: Tensor) -> None:
        """Lay out the rows and divide them into sets.

        Args:
            prompt_lengths: int64 [P], tokens of each prompt.
            prompts_R: int64, the index of each completion's prompt.
            lengths_R: int64, tokens of each completion.
        """
        P = len(prompt_lengths)
        self.lengths = torch.cat([prompt_lengths, lengths_R])
        """Tokens of each row."""
        self.starts = self.lengths.cumsum(0) - self.lengths
        """First token of each row."""
        self.prompts = torch.cat([torch.full((P,), -1), prompts_R])
        """The row of each row's prompt; -1 for prompts themselves."""
        prefix = torch.cat([torch.zeros(P, dtype=torch.long), prompt_lengths[prompts_R]])
        self.max_keys = int((prefix + self.lengths).max())
        """The most keys that a token attends to."""
        sets = self._sets(prompts_R.tolist(), lengths_R.tolist(), prompt_lengths.tolist())
        # Start the longest sets first, so that no thread is still busy with a long one when the others have finished.
        work = (self.lengths * (prefix + self.lengths / 2)).tolist()
        sets.sort(key=lambda rows: -sum(work[row] for row in rows))
        self.order = torch.tensor([row for rows in sets for row in rows])
        """The rows of all sets, one set after another."""
        self.sets = torch.tensor([0, *(len(rows) for rows in sets)]).cumsum(0)
        """Set s consists of the rows order[sets[s]:sets[s + 1]]."""
        set_prompt_lengths = prefix[self.order[self.sets[:-1]]]
        self.prompt_offsets = set_prompt_lengths.cumsum(0) - set_prompt_lengths
        """In the backward pass each set has its own copy of its prompt's gradients: where it begins, in tokens."""
        self.prompt_tokens = int(set_prompt_lengths.sum())
        """Tokens of all these copies."""

    @staticmethod
    def _sets(prompts: list[int], lengths: list[int], prompt_lengths: list[int]) -> list[list[int]]:
        P = len(prompt_lengths)
        sets = [[prompt] for prompt in range(P)]
        tokens: dict[int, int] = {}
        open_set: dict[int, list[int]] = {}
        for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            if prompt not in open_set or tokens[prompt] >= max(SET_TOKENS, prompt_lengths[prompt]):
                tokens[prompt], open_set[prompt] = 0, []
                sets.append(open_set[prompt])
            open_set[prompt].append(P + row)
            tokens[prompt] += length
        return sets


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        rows: PackedRows,
        scale: float,
        window: int,
        softcap: float,
    ) -> Tensor:
        output, log_sum_exp = torch.empty_like(query), query.new_empty(query.shape[:2])
        layout = rows.starts, rows.lengths, rows.prompts, rows.order, rows.sets
        sizes = len(rows.sets) - 1, query.shape[1], key.shape[1], rows.max_keys, window
        tensors = query, key, value, sinks, output, log_sum_exp
        attention_kernels(query.shape[2]).attend(*tensors, *layout, scale, softcap, *sizes)
        ctx.save_for_backward(query, key, value, sinks, output, log_sum_exp)
        ctx.rows, ctx.scale, ctx.window, ctx.softcap = rows, scale, window, softcap
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, output, log_sum_exp = ctx.saved_tensors
        gradient, rows, kernels = gradient.contiguous(), ctx.rows, attention_kernels(query.shape[2])
        d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        d_prompts = key.new_zeros(2, rows.prompt_tokens, *key.shape[1:])
        d_sinks = None if sinks is None else torch.empty_like(sinks)
        layout = rows.starts, rows.lengths, rows.prompts, rows.order, rows.sets, rows.prompt_offsets
        sizes = len(rows.sets) - 1, query.shape[1], key.shape[1], rows.max_keys, ctx.window, rows.prompt_tokens
        kernels.attend_backward(
            gradient,
            output,
            query,
            key,
            value,
            log_sum_exp,
            d_query,
            d_key,
            d_value,
            d_prompts,
            *layout,
            ctx.scale,
            ctx.softcap,
            *sizes,
        )
        if d_sinks is not None:
            kernels.sink_gradient(gradient, output, log_sum_exp, sinks, d_sinks, *query.shape[:2])
        return d_query, d_key, d_value, d_sinks, None, None, None, None
