"""Attention in training over flat tokens, forward and backward, on the CPU: packed.cpp."""

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from groupwise.kernels.compiled import function, library

SET_TOKENS = 256
"""Rows of a prompt that one thread takes have together at least so many tokens, or as many as the prompt."""


@functools.cache
def _kernels(head_size: int) -> Any:
    """The functions of packed.cpp for heads of this size; None where it cannot be compiled."""
    compiled = library("packed", f"-DHEAD_SIZE={head_size}")
    if compiled is None:
        return None
    shapes = {"attend": (10, 1, 4), "attend_backward": (16, 1, 5)}
    return SimpleNamespace(**{name: function(compiled, name, *shape) for name, shape in shapes.items()})


def has_kernel(query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor) -> bool:
    """Whether `attention` can run on these. They must have one dtype; in some models values are narrower than queries."""
    size = query_NHD.shape[2]
    alike = key_NKD.shape == value_NKD.shape and key_NKD.shape[2] == size
    return alike and query_NHD.device.type == "cpu" and query_NHD.dtype == torch.float32 and _kernels(size) is not None


def attention(query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, rows: "Rows", scale: float) -> Tensor:
    """What each token gathers from its prompt and from its row up to itself, [N, H, D]; H / K query heads share keys and values.

    All contiguous, of a dtype and device that has a kernel.
    """
    output: Tensor = _Attention.apply(query_NHD, key_NKD, value_NKD, rows, scale)  # type: ignore[no-untyped-call]
    return output


class Rows:
    """Rows of flat tokens, one after another: first the prompts, then the completions, each of which looks at one prompt."""

    def __init__(self, prompt_lengths: Tensor, prompts_R: Tensor, lengths_R: Tensor) -> None:
        """int64: tokens of each prompt, and of each completion its prompt and its tokens."""
        P = len(prompt_lengths)
        self.lengths = torch.cat([prompt_lengths, lengths_R])
        self.starts = self.lengths.cumsum(0) - self.lengths
        self.prompts = torch.cat([torch.full((P,), -1), prompts_R])
        seen = torch.cat([torch.zeros(P, dtype=torch.long), prompt_lengths[prompts_R]])
        self.width = int((seen + self.lengths).max())
        sets = self._sets(prompts_R.tolist(), lengths_R.tolist(), prompt_lengths.tolist())
        # The longest work first, so that no thread is left with it at the end.
        work = (self.lengths * (seen + self.lengths / 2)).tolist()
        sets.sort(key=lambda rows: -sum(work[row] for row in rows))
        self.order = torch.tensor([row for rows in sets for row in rows])
        self.sets = torch.tensor([0, *(len(rows) for rows in sets)]).cumsum(0)
        of_prompts = seen[self.order[self.sets[:-1]]]
        self.places = of_prompts.cumsum(0) - of_prompts
        self.of_prompts = int(of_prompts.sum())
        """Tokens of each set's prompt, over the sets."""

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
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: Rows, scale: float) -> Tensor:
        output, sums = torch.empty_like(query), query.new_empty(query.shape[:2])
        of_rows = rows.starts, rows.lengths, rows.prompts, rows.order, rows.sets
        sizes = len(rows.sets) - 1, query.shape[1], key.shape[1], rows.width
        _kernels(query.shape[2]).attend(query, key, value, output, sums, *of_rows, scale, *sizes)
        ctx.save_for_backward(query, key, value, output, sums)
        ctx.rows, ctx.scale = rows, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, sums = ctx.saved_tensors
        rows: Rows = ctx.rows
        d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        of_prompts = key.new_zeros(2, rows.of_prompts, *key.shape[1:])
        of_rows = rows.starts, rows.lengths, rows.prompts, rows.order, rows.sets, rows.places
        sizes = len(rows.sets) - 1, query.shape[1], key.shape[1], rows.width, rows.of_prompts
        _kernels(query.shape[2]).attend_backward(
            gradient.contiguous(),
            output,
            query,
            key,
            value,
            sums,
            d_query,
            d_key,
            d_value,
            of_prompts,
            *of_rows,
            ctx.scale,
            *sizes,
        )
        return d_query, d_key, d_value, None, None
