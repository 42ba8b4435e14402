"""The KV cache of generation and its attention: a prompt's keys kept once for its group, each row's own beside them."""

import itertools
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from groupwise.kernels.decode_attention import decode_kernel
from groupwise.models.attention.cuda_graphs import FixedSteps
from groupwise.models.attention.decoding_step import OneCallStep, PlanFinder
from groupwise.models.attention.decoding_torch import StepLayout, attend_newest
from groupwise.models.attention.layers import head_size
from groupwise.models.attention.training_padded import PaddedLayout, ragged
from groupwise.models.decoder import Decoder

ROWS_AT_ONCE = 16
"""In other dtypes than float32 a step's batch is filled up to a multiple of it, since oneDNN makes and keeps kernels per size."""
SIZES, WINDOW = 8, 128
"""Steps of fixed size have at most so many batch sizes, and read a multiple of so many tokens of the rows' cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """Keys and values [layers, K, T, D] of the first T tokens of a sequence, copied out of a cache."""

    keys: Tensor
    values: Tensor

    def __len__(self) -> int:
        return self.keys.shape[2]


class DecodingCache:
    """The rows being generated and their prompts. Storage stays compact: the last row moves into a freed slot."""

    joins = True
    """New prompts may join while rows are being generated."""
    continues = True
    """Keys and values of a row can be copied out (`prefix`) and continued (`extend`)."""

    def __init__(
        self, decoder: Decoder, plans: PlanFinder, prompts: int, prompt_length: int, rows: int, tokens: int, *, fixed: bool
    ) -> None:
        """With capacity for so many prompts of up to `prompt_length` tokens, and so many rows of up to `tokens` tokens.

        `fixed`: run steps of a few fixed sizes, which a GPU captures as graphs. Dtype and device are the decoder's.
        """
        self._decoder = decoder
        self._fixed = fixed
        self._steps = FixedSteps() if fixed else None
        dtype = decoder.dtype
        kernels = decoder.backend.attention_kernels and not fixed and decoder.on_cpu
        self._kernel = decode_kernel(head_size(decoder.config), dtype) if kernels else None
        self._plans = plans
        self.prompt_keys, self.prompt_values, self.row_cache = self._allocate(prompts, prompt_length, rows, tokens)
        self.refresh()
        device = decoder.device
        self.lengths_P = torch.zeros(0, dtype=torch.long, device=device)
        """Tokens of each prompt."""
        self.prompt_R = torch.zeros(0, dtype=torch.long, device=device)
        """The prompt of each row."""
        self.written_R = torch.zeros(0, dtype=torch.long, device=device)
        """Tokens of each row whose keys are in the cache, the current one included."""
        self._longest = 0
        """Tokens of the longest row, as `written_R` counts them."""
        self._width = 0
        """The most rows that a prompt has ever had."""

    def _allocate(self, prompts: int, prompt_length: int, rows: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        config, like = self._decoder.config, next(self._decoder.module.parameters())
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size, layers = head_size(config), config.num_hidden_layers
        self._unit = _multiple(max(1, rows // SIZES), ROWS_AT_ONCE)
        rows = _multiple(rows, self._unit) if self._fixed else rows
        # Without the kernel padding is read and masked, and 0 times NaN from uninitialised memory would be NaN.
        new = like.new_zeros if self._kernel is None else like.new_empty
        keys, values = (new(layers, prompts, heads, prompt_length, size) for _ in range(2))
        return keys, values, new(layers, 2, rows, heads, tokens, size)

    @property
    def capacity(self) -> tuple[int, int, int, int]:
        """Prompts, tokens of a prompt, rows, tokens of a row."""
        return self.prompt_keys.shape[1], self.prompt_keys.shape[3], self.row_cache.shape[2], self.row_cache.shape[4]

    def reserve(self, prompts: int, prompt_length: int, rows: int, tokens: int) -> None:
        """Grow to at least this capacity, copying what is there."""
        had = self.capacity
        wanted = list(map(max, had, (prompts, prompt_length, rows, tokens)))
        if wanted == list(had):
            return
        for dimension in (0, 2):  # doubled, so that many small requests copy little; on a CPU what is not written costs nothing
            if wanted[dimension] > had[dimension] and self._decoder.on_cpu:
                wanted[dimension] = max(wanted[dimension], 2 * had[dimension])
        P, L, R, T = (
            len(self.lengths_P),
            int(self.lengths_P.max()) if len(self.lengths_P) else 0,
            len(self.prompt_R),
            self._longest,
        )
        keys, values, row_cache = self._allocate(*wanted)
        keys[:, :P, :, :L], values[:, :P, :, :L] = self.prompt_keys[:, :P, :, :L], self.prompt_values[:, :P, :, :L]
        row_cache[:, :, :R, :, :T] = self.row_cache[:, :, :R, :, :T]
        self.prompt_keys, self.prompt_values, self.row_cache = keys, values, row_cache
        if self._steps is not None:
            self._steps = FixedSteps()  # captured graphs hold the old buffers
        if self._one_call is not None:
            self._one_call.resize(wanted[1] + wanted[3], wanted[2])

    def refresh(self) -> None:
        """Take the decoder's weights as they are now; keys and values stay those of the weights that made them."""
        plan = self._plans.find() if self._kernel is not None else None
        _, prompt_length, rows, tokens = self.capacity
        size, bf16 = (prompt_length + tokens, rows), self._decoder.bf16_step
        self._one_call = None if plan is None else OneCallStep(self._decoder.module, plan, *size, bf16_weights=bf16)

    def prefill(self, prompts: list[Tensor], counts: list[int]) -> Tensor:
        """Run new prompts, each for `counts` rows; returns the last hidden state of each prompt [p, H]."""
        lengths = [len(prompt) for prompt in prompts]
        nothing = torch.zeros(0, dtype=torch.long)
        attention = self._decoder.packed_attention(lengths, nothing, nothing)
        layout = PaddedLayout(ragged(torch.tensor(lengths), 0), prompts[0].device)
        first, longest = len(self.lengths_P), max(lengths)
        new = slice(first, first + len(prompts))

        def attend(layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scale: float) -> Tensor:
            self.prompt_keys[layer, new, :, :longest] = layout.rows(key_NKD)
            self.prompt_values[layer, new, :, :longest] = layout.rows(value_NKD)
            return attention(layer, query_NHD, key_NKD, value_NKD, scale)

        hidden_NH = self._decoder.run_packed(torch.cat(prompts), attention.positions_N, attend)
        self._add(lengths, counts)
        return hidden_NH[self.lengths_P[first:].cumsum(0) - 1]

    def extend(self, prefixes: list[Prefix], suffixes: list[Tensor], counts: list[int]) -> Tensor:
        """Add prompts whose first tokens are known as prefixes, and run only the rest of them (at least one token each).

        Returns the last hidden state of each [p, H].
        """
        starts, lengths = [len(prefix) for prefix in prefixes], [len(suffix) for suffix in suffixes]
        first, ends = len(self.lengths_P), list(itertools.accumulate(lengths))
        for slot, (prefix, start) in enumerate(zip(prefixes, starts, strict=True), first):
            self.prompt_keys[:, slot, :, :start], self.prompt_values[:, slot, :, :start] = prefix.keys, prefix.values

        def attend(layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scale: float) -> Tensor:
            parts = []
            for slot, (start, length, end) in enumerate(zip(starts, lengths, ends, strict=True), first):
                new, whole = slice(end - length, end), slice(0, start + length)
                keys, values = self.prompt_keys[layer, slot, :, whole], self.prompt_values[layer, slot, :, whole]
                keys[:, start:], values[:, start:] = key_NKD[new].transpose(0, 1), value_NKD[new].transpose(0, 1)
                parts.append(_attend_suffix(query_NHD[new], keys, values, start, scale))
            return torch.cat(parts)

        positions = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        hidden_NH = self._decoder.run_packed(torch.cat(suffixes), torch.cat(positions).to(suffixes[0].device), attend)
        self._add([start + length for start, length in zip(starts, lengths, strict=True)], counts)
        return hidden_NH[torch.tensor(ends, device=hidden_NH.device) - 1]

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
        keys, values = self.row_cache[:, :, row, :, :written].unbind(1)
        return Prefix(
            keys=torch.cat([self.prompt_keys[:, prompt, :, :length], keys], 2),
            values=torch.cat([self.prompt_values[:, prompt, :, :length], values], 2),
        )

    def step(self, tokens_R: Tensor) -> Tensor:
        """Run one more token of each row; returns hidden states [R, H], which the next step may overwrite."""
        self.written_R, self._longest = self.written_R + 1, self._longest + 1
        if self._one_call is not None:
            return self._one_call(tokens_R, *self._cache())
        at, R, pad = self._layout(), len(tokens_R), torch.nn.functional.pad
        if self._steps is None:
            spare = 0 if self.row_cache.dtype == torch.float32 else -R % ROWS_AT_ONCE
            return self.run_step(pad(tokens_R, (0, spare)), at)[:R]
        rows, window = _multiple(R, self._unit), min(_multiple(at.window, WINDOW), self.row_cache.shape[4])
        at = at.padded(rows, self.prompt_keys.shape[1], self._width, window)
        return self._steps(partial(DecodingCache.run_step, self), pad(tokens_R, (0, rows - R)), at)[:R]

    def _layout(self) -> StepLayout:
        return StepLayout(self.written_R, self.prompt_R, self._slot_R, self.lengths_P, self._most_rows, self._longest)

    def run_step(self, tokens_R: Tensor, at: StepLayout) -> Tensor:
        """The step itself, layer by layer; rows beyond those of the layout only fill up the batch."""
        self._at = at
        positions_R = at.lengths_P[at.prompt_R] + at.written_R - 1
        positions_R = torch.nn.functional.pad(positions_R, (0, len(tokens_R) - len(positions_R)))
        return self._decoder.run_packed(tokens_R, positions_R, self)

    def __call__(self, layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scale: float) -> Tensor:
        """The `Attend` of a step."""
        dtype = self.row_cache.dtype
        new = tuple(x.to(dtype).contiguous() for x in (query_NHD, key_NKD, value_NKD))
        assert new[1].shape[1:] == new[2].shape[1:] == self.row_cache.shape[3::2], "the kernel reads and writes without checking"
        output_NHD = torch.zeros_like(new[0])
        if self._kernel is None:
            R = len(self._at.prompt_R)
            query_RHD, key_RKD, value_RKD = (x[:R] for x in new)
            prompts = self.prompt_keys[layer], self.prompt_values[layer]
            output_NHD[:R] = attend_newest(self._at, self.row_cache[layer], *prompts, query_RHD, key_RKD, value_RKD, scale)
        else:
            cache, sizes = self._cache()
            self._kernel(*new, output_NHD, *cache, scale, query_NHD.shape[1], layer, *sizes)
        return output_NHD.to(query_NHD.dtype)

    def _cache(self) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """The tensors and the numbers of the C++ struct Cache, without the layer."""
        of_rows = self.written_R, self.lengths_P, self.prompt_R, self._order_R, self._starts_P
        _, _, rows, K, T, _ = self.row_cache.shape
        prompts, L = self.prompt_keys.shape[1], self.prompt_keys.shape[3]
        sizes = rows, prompts, len(self.lengths_P), K, T, L, self._most_rows
        return (self.row_cache, self.prompt_keys, self.prompt_values, *of_rows), sizes

    def keep(self, keep_R: Tensor) -> Tensor:
        """Drop the other rows, and prompts that lose their last. Returns which row now has each slot, int64 [r]."""
        order_R = self._fill(keep_R, self.row_cache[:, :, :, :, : self._longest].transpose(1, 2))
        self.written_R, self.prompt_R = self.written_R[order_R], self.prompt_R[order_R]
        used_P = torch.zeros(len(self.lengths_P), dtype=torch.bool, device=keep_R.device)
        used_P[self.prompt_R] = True
        order_P = self._fill(used_P, self.prompt_keys, self.prompt_values)
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


def _attend_suffix(query_NHD: Tensor, keys_KTD: Tensor, values_KTD: Tensor, start: int, scale: float) -> Tensor:
    """Attention of the tokens from `start` on to all T tokens up to themselves, [N, H, D]."""
    device, N, T = query_NHD.device, len(query_NHD), keys_KTD.shape[1]
    visible_NT = torch.arange(T, device=device) <= torch.arange(start, start + N, device=device)[:, None]
    query_1HND = query_NHD.transpose(0, 1)[None].to(keys_KTD.dtype)
    shared = query_NHD.shape[1] != keys_KTD.shape[0]
    output_1HND = torch.nn.functional.scaled_dot_product_attention(
        query_1HND, keys_KTD[None], values_KTD[None], attn_mask=visible_NT, scale=scale, enable_gqa=shared
    )
    return output_1HND[0].transpose(0, 1).to(query_NHD.dtype)


def _multiple(n: int, of: int) -> int:
    """The next multiple, at least one."""
    return max(1, -(-n // of)) * of
