"""The KV cache of generation and its attention: a prompt's keys kept once for its group, each row's own beside them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from groupwise.kernels.decode_attention import decode_kernel
from groupwise.models.attention.attend import PLAIN, AttentionForm
from groupwise.models.attention.cuda_graphs import FixedSteps
from groupwise.models.attention.decoding_step import OneCallStep, PlanFinder
from groupwise.models.attention.decoding_torch import StepLayout, attend_newest
from groupwise.models.attention.prefill import Extension, Prefill, Restoration
from groupwise.models.attention.training_padded import PaddedLayout
from groupwise.models.decoder import Decoder, HeadShape
from groupwise.models.padded import apart
from groupwise.models.recurrent import RecurrentForward, States

ROWS_AT_ONCE = 16
"""In other dtypes than float32 a step's batch is filled up to a multiple of it, since oneDNN makes and keeps kernels per size."""
SIZES, WINDOW = 8, 128
"""Steps of fixed size have at most so many batch sizes, and read a multiple of so many tokens of the rows' cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """Keys and values of the first T tokens of a sequence, copied out of a cache: [layers, K, T, D] for each stack."""

    keys: list[Tensor]
    values: list[Tensor]

    def __len__(self) -> int:
        return self.keys[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))


@dataclass(slots=True)
class Stack:
    """The KV cache of the layers whose keys have the same shape."""

    prompt_keys: Tensor
    """[layers, prompts, K, L, D]"""
    prompt_values: Tensor
    row_cache: Tensor
    """[layers, 2 (keys, values), rows, K, T, D]"""

    def layer(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors of the C++ struct Cache."""
        return self.row_cache[i], self.prompt_keys[i], self.prompt_values[i]


class DecodingCache:
    """The rows being generated and their prompts. Storage stays compact: the last row moves into a freed slot."""

    joins = True
    """New prompts may join while rows are being generated."""

    def __init__(
        self,
        decoder: Decoder,
        plans: PlanFinder,
        prompts: int,
        prompt_length: int,
        rows: int,
        tokens: int,
        *,
        fixed: bool,
        dtype: torch.dtype | None = None,
    ) -> None:
        """With capacity for so many prompts of up to `prompt_length` tokens, and so many rows of up to `tokens` tokens.

        `fixed`: run steps of a few fixed sizes, which a GPU captures as graphs. `dtype`: of keys and values; None: the decoder's.
        """
        self._decoder = decoder
        self._fixed = fixed
        self._steps = FixedSteps() if fixed else None
        self._dtype = dtype or decoder.dtype
        self._in_kernel = decoder.backend.attention_kernels and not fixed and decoder.on_cpu
        shapes = dict.fromkeys(decoder.shapes.values())
        self._places = {
            layer: (list(shapes).index(shape), [other for other in decoder.shapes if decoder.shapes[other] == shape].index(layer))
            for layer, shape in decoder.shapes.items()
        }
        """Layer -> its stack, and its index there."""
        self._shapes = [(shape, sum(other == shape for other in decoder.shapes.values())) for shape in shapes]
        self._kernels = [self._kernel_of(shape) for shape in shapes]
        self.continues = not decoder.recurrent
        """Whether keys and values of a row can be copied out (`prefix`) and continued (`extend`)."""
        self._plans = plans
        self.capacity = prompts, prompt_length, rows, tokens
        """Prompts, tokens of a prompt, rows, tokens of a row."""
        self.stacks = self._allocate()
        self._width = 0
        """The most rows that a prompt has ever had."""
        self.clear()

    def _kernel_of(self, shape: HeadShape) -> Callable[..., None] | None:
        return decode_kernel(shape.size, self._decoder.dtype, self._dtype) if self._in_kernel else None

    def _allocate(self) -> list[Stack]:
        like = next(self._decoder.module.parameters())
        prompts, prompt_length, rows, tokens = self.capacity
        self._unit = _multiple(max(1, rows // SIZES), ROWS_AT_ONCE)
        rows = _multiple(rows, self._unit) if self._fixed else rows
        self.capacity = prompts, prompt_length, rows, tokens
        stacks = []
        for (shape, layers), kernel in zip(self._shapes, self._kernels, strict=True):
            # Without the kernel padding is read and masked, and 0 times NaN from uninitialised memory would be NaN.
            new = partial(like.new_zeros if kernel is None else like.new_empty, dtype=self._dtype)
            keys, values = (new((layers, prompts, shape.kv_heads, prompt_length, shape.size)) for _ in range(2))
            stacks.append(Stack(keys, values, new((layers, 2, rows, shape.kv_heads, tokens, shape.size))))
        of_layers = [stacks[stack].layer(i) for stack, i in self._places.values()]
        self._addresses = torch.tensor([[cache.data_ptr() for cache in caches] for caches in of_layers])
        """Of each layer's caches, for a step in one call."""
        return stacks

    def reserve(self, prompts: int, prompt_length: int, rows: int, tokens: int) -> None:
        """Grow to at least this capacity, copying what is there."""
        had = self.capacity
        wanted = list(map(max, had, (prompts + self._unshared, prompt_length, rows, tokens)))
        if wanted == list(had):
            return
        for dimension in (0, 2):  # doubled, so that many small requests copy little; on a CPU what is not written costs nothing
            if wanted[dimension] > had[dimension] and self._decoder.on_cpu:
                wanted[dimension] = max(wanted[dimension], 2 * had[dimension])
        P, R, T = len(self.lengths_P), len(self.prompt_R), self._longest
        L = int(self.lengths_P.max()) if P else 0
        before, unit = self.stacks, self._unit
        self.capacity = wanted[0], wanted[1], wanted[2], wanted[3]
        try:
            self.stacks = self._allocate()
        except (RuntimeError, MemoryError):  # the buffers are the old ones
            self.capacity, self._unit = had, unit
            raise
        for old, new in zip(before, self.stacks, strict=True):
            new.prompt_keys[:, :P, :, :L], new.prompt_values[:, :P, :, :L] = (
                old.prompt_keys[:, :P, :, :L],
                old.prompt_values[:, :P, :, :L],
            )
            new.row_cache[:, :, :R, :, :T] = old.row_cache[:, :, :R, :, :T]
        if self._steps is not None:
            self._steps = FixedSteps()  # captured graphs hold the old buffers
        if self._one_call is not None:
            self._one_call.resize(wanted[1] + wanted[3], wanted[2])

    def clear(self) -> None:
        """Forget all prompts and rows, and take the decoder's weights as they are now. Buffers stay."""
        device = self._decoder.device
        self.lengths_P = torch.zeros(0, dtype=torch.long, device=device)
        """Tokens of each prompt."""
        self.prompt_R = torch.zeros(0, dtype=torch.long, device=device)
        """The prompt of each row."""
        self.written_R = torch.zeros(0, dtype=torch.long, device=device)
        """Tokens of each row whose keys are in the cache, the current one included."""
        self._longest = 0
        """Tokens of the longest row, as `written_R` counts them."""
        self._states: dict[Any, States] = {}
        """The states of the rows, by recurrent layer."""
        self._unshared = 0
        """Prompts beyond those that the caller knows of, since `restore` gave each row one of its own."""
        plan = self._plans.find(self._dtype) if self._in_kernel else None
        _, prompt_length, rows, tokens = self.capacity
        size, bf16 = (prompt_length + tokens, rows), self._decoder.bf16_step
        self._one_call = None if plan is None else OneCallStep(self._decoder.module, plan, *size, self._dtype, bf16_weights=bf16)

    def prefill(self, prompts: list[Tensor], counts: list[int]) -> Tensor:
        """Run new prompts, each for `counts` rows; returns the last hidden state of each prompt [p, H]."""
        lengths = [len(prompt) for prompt in prompts]
        nothing = torch.zeros(0, dtype=torch.long)
        packed = self._decoder.packed_attention(lengths, nothing, nothing)
        hidden_NH = self._decoder.run_packed(
            torch.cat(prompts), packed.positions_N, Prefill(self, packed, lengths, counts), generating=True
        )
        self._add(lengths, counts)
        return hidden_NH[self.lengths_P[-len(prompts) :].cumsum(0) - 1]

    def restore(self, prompts: list[Tensor], rows: list[list[Tensor]]) -> Tensor:
        """Add prompts, and for each the rows (at least one token each) that continue it, as if they had been decoded here;
        returns the last hidden state [r, H] of each row."""
        flat = [row for of_prompt in rows for row in of_prompt]
        if self._decoder.recurrent:  # states are known at the ends of prompts only
            whole, counts = apart(prompts, rows)
            self._unshared += len(whole) - len(prompts)
            before = len(self.lengths_P) + len(whole) - self._unshared
            self.reserve(before, max(map(len, whole)), len(self.prompt_R) + len(whole), 1)
            return self.prefill(whole, counts)
        lengths, counts = [len(prompt) for prompt in prompts], [len(of_prompt) for of_prompt in rows]
        lengths_R = torch.tensor([len(row) for row in flat])
        prompt_R = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts))
        packed = self._decoder.packed_attention(lengths, prompt_R, lengths_R)
        attend = Restoration(self, packed, lengths, lengths_R)
        hidden_NH = self._decoder.run_packed(torch.cat([*prompts, *flat]), packed.positions_N, attend, generating=True)
        self._add(lengths, counts)
        self.written_R[-len(flat) :] = lengths_R.to(self.written_R.device)
        self._assign_slots()
        return hidden_NH[sum(lengths) + lengths_R.to(hidden_NH.device).cumsum(0) - 1]

    def write_rows(self, layer: int, layout: PaddedLayout, key_NKD: Tensor, value_NKD: Tensor) -> None:
        """Write the keys and values of new rows, from their first tokens on, behind those of the rows that are there."""
        stack, i = self._places[layer]
        count, longest = layout.shape
        new = slice(len(self.prompt_R), len(self.prompt_R) + count)
        for which, found_NKD in enumerate((key_NKD, value_NKD)):
            self.stacks[stack].row_cache[i, which, new, :, :longest] = layout.rows(found_NKD)

    def write_prompts(self, layer: int, layout: PaddedLayout, key_NKD: Tensor, value_NKD: Tensor) -> None:
        """Write the keys and values of new prompts, laid out as rows, behind those of the prompts that are there."""
        stack, i = self._places[layer]
        count, longest = layout.shape
        new = slice(len(self.lengths_P), len(self.lengths_P) + count)
        self.stacks[stack].prompt_keys[i, new, :, :longest] = layout.rows(key_NKD)
        self.stacks[stack].prompt_values[i, new, :, :longest] = layout.rows(value_NKD)

    def add_states(self, layer: Any, states: States) -> None:
        """The states of new rows of a recurrent layer."""
        self._states[layer] = States.cat([self._states[layer], states]) if layer in self._states else states

    def extend(self, prefixes: list[Prefix], suffixes: list[Tensor], counts: list[int]) -> Tensor:
        """Add prompts whose first tokens are known as prefixes, and run only the rest of them (at least one token each).

        Returns the last hidden state of each [p, H].
        """
        starts, lengths = [len(prefix) for prefix in prefixes], [len(suffix) for suffix in suffixes]
        for slot, prefix in enumerate(prefixes, len(self.lengths_P)):
            for stack, keys, values in zip(self.stacks, prefix.keys, prefix.values, strict=True):
                stack.prompt_keys[:, slot, :, : len(prefix)], stack.prompt_values[:, slot, :, : len(prefix)] = keys, values
        positions = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        attend = Extension(self, starts, lengths)
        hidden_NH = self._decoder.run_packed(
            torch.cat(suffixes), torch.cat(positions).to(suffixes[0].device), attend, generating=True
        )
        self._add([start + length for start, length in zip(starts, lengths, strict=True)], counts)
        return hidden_NH[torch.tensor(attend.ends, device=hidden_NH.device) - 1]

    def prompt_of(self, layer: int, slot: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [K, length, D] of a prompt in a layer's cache."""
        stack, i = self._places[layer]
        return self.stacks[stack].prompt_keys[i, slot, :, :length], self.stacks[stack].prompt_values[i, slot, :, :length]

    def _add(self, lengths: list[int], counts: list[int]) -> None:
        first, device = len(self.lengths_P), self.lengths_P.device
        self.lengths_P = torch.cat([self.lengths_P, self.lengths_P.new_tensor(lengths)])
        of_new = torch.arange(first, first + len(lengths), device=device)
        new_R = of_new.repeat_interleave(torch.tensor(counts, device=device))
        self.prompt_R = torch.cat([self.prompt_R, new_R])
        self.written_R = torch.cat([self.written_R, torch.zeros_like(new_R)])
        self._width = max(self._width, *counts)
        self._assign_slots()

    def prefix(self, row: int) -> Prefix:
        """A copy of a row's keys and values, those of its prompt included."""
        prompt, length, written = int(self.prompt_R[row]), int(self.lengths_P[self.prompt_R[row]]), int(self.written_R[row])
        found = Prefix(keys=[], values=[])
        for stack in self.stacks:
            keys, values = stack.row_cache[:, :, row, :, :written].unbind(1)
            found.keys.append(torch.cat([stack.prompt_keys[:, prompt, :, :length], keys], 2))
            found.values.append(torch.cat([stack.prompt_values[:, prompt, :, :length], values], 2))
        return found

    def step(self, tokens_R: Tensor) -> Tensor:
        """Run one more token of each row; returns hidden states [R, H], which the next step may overwrite."""
        self.written_R, self._longest = self.written_R + 1, self._longest + 1
        if self._one_call is not None:
            return self._one_call(tokens_R, self._addresses, self._of_rows(), self._sizes(self.stacks[0]))
        at, R, pad = self._layout(), len(tokens_R), torch.nn.functional.pad
        if self._steps is None:
            spare = 0 if self._decoder.dtype == torch.float32 else -R % ROWS_AT_ONCE
            return self.run_step(pad(tokens_R, (0, spare)), at)[:R]
        rows, window = _multiple(R, self._unit), min(_multiple(at.window, WINDOW), self.capacity[3])
        at = at.padded(rows, self.capacity[0], self._width, window)
        return self._steps(partial(DecodingCache.run_step, self), pad(tokens_R, (0, rows - R)), at)[:R]

    def _layout(self) -> StepLayout:
        return StepLayout(self.written_R, self.prompt_R, self._slot_R, self.lengths_P, self._most_rows, self._longest)

    def run_step(self, tokens_R: Tensor, at: StepLayout) -> Tensor:
        """The step itself, layer by layer; rows beyond those of the layout only fill up the batch."""
        self._at = replace(at, masks={})  # in a captured graph the masks are computed again from the tensors
        positions_R = at.lengths_P[at.prompt_R] + at.written_R - 1
        positions_R = torch.nn.functional.pad(positions_R, (0, len(tokens_R) - len(positions_R)))
        return self._decoder.run_packed(tokens_R, positions_R, self, generating=True)

    def __call__(
        self, layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scale: float, form: AttentionForm = PLAIN
    ) -> Tensor:
        """The `Attend` of a step."""
        stack, i = self._places[layer]
        new = tuple(x.to(self._decoder.dtype).contiguous() for x in (query_NHD, key_NKD, value_NKD))
        row_cache, prompt_keys, prompt_values = self.stacks[stack].layer(i)
        assert new[1].shape[1:] == new[2].shape[1:] == row_cache.shape[2::2], "the kernel reads and writes without checking"
        output_NHD = torch.zeros_like(new[0])
        kernel = self._kernels[stack]
        if kernel is None:
            R = len(self._at.prompt_R)
            query_RHD, key_RKD, value_RKD = (x[:R] for x in new)
            output_NHD[:R] = attend_newest(
                self._at, row_cache, prompt_keys, prompt_values, query_RHD, key_RKD, value_RKD, scale, form
            )
        else:
            sinks_H = None if form.sinks_H is None else form.sinks_H.float().contiguous()
            cache, sizes = (row_cache, prompt_keys, prompt_values, *self._of_rows()), self._sizes(self.stacks[stack])
            kernel(*new, output_NHD, sinks_H, *cache, scale, form.softcap, query_NHD.shape[1], *sizes, form.window)
        return output_NHD.to(query_NHD.dtype)

    def mix(self, layer: Any, forward: RecurrentForward, hidden_NH: Tensor) -> Tensor:
        """A recurrent layer in a step: one token of each row, whose states it replaces."""
        R = len(self.prompt_R)
        output_RH = forward(hidden_NH[:R, None], self._states[layer])[:, 0]
        return torch.nn.functional.pad(output_RH, (0, 0, 0, len(hidden_NH) - R))

    def _of_rows(self) -> tuple[Tensor, ...]:
        """The tensors of the C++ struct Cache that all layers share."""
        return self.written_R, self.lengths_P, self.prompt_R, self._order_R, self._starts_P

    def _sizes(self, stack: Stack) -> tuple[int, ...]:
        """The numbers of the C++ struct Cache."""
        _, _, rows, K, T, _ = stack.row_cache.shape
        return rows, len(self.lengths_P), K, T, stack.prompt_keys.shape[3], self._most_rows

    def keep(self, keep_R: Tensor) -> Tensor:
        """Drop the other rows, and prompts that lose their last. Returns which row now has each slot, int64 [r]."""
        order_R = self._fill(keep_R, *(stack.row_cache[:, :, :, :, : self._longest].transpose(1, 2) for stack in self.stacks))
        self.written_R, self.prompt_R = self.written_R[order_R], self.prompt_R[order_R]
        for states in self._states.values():
            states.keep(order_R)
        used_P = torch.zeros(len(self.lengths_P), dtype=torch.bool, device=keep_R.device)
        used_P[self.prompt_R] = True
        order_P = self._fill(used_P, *(cache for stack in self.stacks for cache in (stack.prompt_keys, stack.prompt_values)))
        slot_P = torch.empty_like(self.lengths_P)
        slot_P[order_P] = torch.arange(len(order_P), device=keep_R.device)
        self.lengths_P, self.prompt_R = self.lengths_P[order_P], slot_P[self.prompt_R]
        if len(order_R):
            self._assign_slots()
        return order_R

    @staticmethod
    def _fill(keep: Tensor, *caches: Tensor) -> Tensor:
        """Move kept entries (dimension 1) from the end into the slots of dropped ones; returns the old index of each."""
        count = int(keep.sum())
        holes = (~keep[:count]).nonzero()[:, 0]
        movers = keep[count:].nonzero()[:, 0] + count
        for cache in caches if len(movers) else ():
            cache[:, holes] = cache[:, movers]
        order = torch.arange(count, device=keep.device)
        order[holes] = movers
        return order

    def _assign_slots(self) -> None:
        """Which rows have which prompt; computed again whenever rows come or go."""
        counts_P = torch.bincount(self.prompt_R, minlength=len(self.lengths_P))
        self._order_R = self.prompt_R.argsort(stable=True)
        self._starts_P = torch.nn.functional.pad(counts_P.cumsum(0), (1, 0))
        self._most_rows, self._longest = int(counts_P.max()), int(self.written_R.max())
        slot = torch.arange(len(self.prompt_R), device=self.prompt_R.device) - self._starts_P[self.prompt_R[self._order_R]]
        self._slot_R = torch.empty_like(self.prompt_R)
        self._slot_R[self._order_R] = self.prompt_R[self._order_R] * self._most_rows + slot


def _multiple(n: int, of: int) -> int:
    """The next multiple, at least one."""
    return max(1, -(-n // of)) * of
