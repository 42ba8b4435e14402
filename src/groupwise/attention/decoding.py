"""Attention and cache in generation: a prompt's keys kept once for its group, a row's own in a buffer that is never copied."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from groupwise.attention.blocks import Layout, ragged
from groupwise.attention.fused import head_size
from groupwise.attention.interface import run_packed
from groupwise.attention.packed import Packed, close, packs
from groupwise.attention.plain import Placement, attend_newest
from groupwise.attention.steps import FixedSteps
from groupwise.attention.whole import Whole, plan
from groupwise.kernels.decode import decode_kernel

ROWS_AT_ONCE = 16
"""In other dtypes than float32 steps run on a multiple of so many rows, some of them for nothing: oneDNN, which then makes the
products, makes kernels for each size anew and keeps them."""
ROWS_SHARE = 0.6
"""Of a GPU's free memory, for the rows' keys and values; the rest is for the prompts' and for the step itself."""
SIZES, WINDOW = 8, 128
"""Fixed steps have at most so many sizes by their rows, and look at a multiple of so many places of the rows' cache."""


def slower_path(model: Any, dtype: str | None = None) -> str | None:
    """For people: what keeps this model's attention from its fastest path; None if nothing does.

    `dtype`: what it generates in; None: what its weights are in.
    """
    if not packs(model):
        return f"{type(model).__name__} on {model.device} takes the general path through attention"
    if not decodes(model):
        return f"{type(model).__name__} on {model.device} takes the general path in generation: its steps cannot be captured"
    wanted = getattr(torch, dtype) if dtype else model.dtype
    if model.device.type == "cpu" and decode_kernel(head_size(model.base_model.config), wanted) is None:
        return f"no C++ compiler, or no kernels for {wanted}: generation takes a slower path through PyTorch"
    return None


def decodes(model: Any) -> bool:
    """Whether `Decoding` works for a model that `packs`; on a GPU tried on a few tokens, once."""
    if model.device.type == "cpu":
        return True
    tried, works = getattr(model, "_groupwise_decodes", (None, False))
    if tried != (model.device, model.dtype):
        works = _trial(model)
        model._groupwise_decodes = (model.device, model.dtype), works
    return bool(works)


@torch.inference_mode()
def _trial(model: Any) -> bool:
    """Two prompts with two rows each, one of which leaves after the first of two steps."""
    decoder = model.base_model
    prompts = [torch.arange(n, device=model.device) % model.config.get_text_config().vocab_size for n in (3, 5)]
    tokens_R = prompts[1][:4]
    try:
        state = Decoding(decoder, 2, 5, 4, 2)
        state.prefill(decoder, prompts, 2)
        state.step(decoder, tokens_R)
        order_R = state.keep(torch.tensor([False, True, True, True], device=model.device))
        ours = state.step(decoder, tokens_R[order_R])
    except Exception:  # whatever a stranger's forward or a GPU's driver makes of it: then the general path is taken
        return False
    for hidden, row in zip(ours, order_R.tolist(), strict=True):
        tokens = torch.cat([prompts[row // 2], tokens_R[row].repeat(2)])
        if not close(hidden, decoder(input_ids=tokens[None], use_cache=False).last_hidden_state[0, -1]):
            return False
    return True


def affordable_rows(decoder: Any, tokens: int) -> float:
    """Rows of so many tokens whose keys and values may be kept at once: on a GPU as many as a share of what is free can hold."""
    device, config = decoder.device, decoder.config
    if device.type != "cuda":
        return math.inf
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    of_a_row = 2 * config.num_hidden_layers * heads * head_size(config) * tokens * decoder.dtype.itemsize
    return ROWS_SHARE * float(free / of_a_row)


class Decoding:
    """The rows being written and their prompts. Both lie without gaps; what leaves is filled with the last one."""

    def __init__(self, decoder: Any, prompts: int, prompt_length: int, rows: int, tokens: int) -> None:
        """Room for so many prompts and rows at once, in the dtype and on the device of the decoder's weights as they are now."""
        config, like = decoder.config, next(decoder.parameters())
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size, layers = head_size(config), config.num_hidden_layers
        self._steps = FixedSteps() if _fixed(like.device) else None
        self._kernel = decode_kernel(size, like.dtype) if self._steps is None else None
        self._unit = _multiple(max(1, rows // SIZES), ROWS_AT_ONCE)
        rows = rows if self._steps is None else _multiple(rows, self._unit)
        # Without the kernel padded places are read. They count for nothing, but nothing times NaN, which memory may hold, is NaN.
        new = like.new_zeros if self._kernel is None else like.new_empty
        self.prompt_keys = new(layers, prompts, heads, prompt_length, size)
        self.prompt_values = new(layers, prompts, heads, prompt_length, size)
        self.row_cache = new(layers, 2, rows, heads, tokens, size)
        found = None if self._kernel is None else plan(decoder)
        self._whole = None if found is None else Whole(decoder, found, prompt_length + tokens, rows)
        self.lengths_P = torch.zeros(0, dtype=torch.long, device=like.device)
        """Tokens of each prompt."""
        self.prompt_R = torch.zeros(0, dtype=torch.long, device=like.device)
        """The prompt of each row."""
        self.written_R = torch.zeros(0, dtype=torch.long, device=like.device)
        """Tokens of each row whose keys are in the cache, the one being run included."""
        self._longest = 0
        """Tokens of the longest row, as `written_R` counts them."""
        self._width = 0
        """The most rows that a prompt has ever had."""

    def prefill(self, decoder: Any, prompts: list[Tensor], group_size: int) -> Tensor:
        """Take in prompts with `group_size` rows each; returns the last hidden state of each prompt [p, H]."""
        lengths = [len(prompt) for prompt in prompts]
        nothing = torch.zeros(0, dtype=torch.long)
        device = prompts[0].device
        layout, prompt_rows = Packed(lengths, nothing, nothing, device), Layout(ragged(torch.tensor(lengths), 0), device)
        first, longest = len(self.lengths_P), max(lengths)
        new = slice(first, first + len(prompts))

        def attend(layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scale: float) -> Tensor:
            self.prompt_keys[layer, new, :, :longest] = prompt_rows.rows(key_NKD)
            self.prompt_values[layer, new, :, :longest] = prompt_rows.rows(value_NKD)
            return layout(layer, query_NHD, key_NKD, value_NKD, scale)

        hidden_NH = run_packed(decoder, torch.cat(prompts), layout.positions_N, attend)
        self.lengths_P = torch.cat([self.lengths_P, self.lengths_P.new_tensor(lengths)])
        new_rows = torch.arange(first, first + len(prompts), device=hidden_NH.device).repeat_interleave(group_size)
        self.prompt_R = torch.cat([self.prompt_R, new_rows])
        self.written_R = torch.cat([self.written_R, torch.zeros_like(new_rows)])
        self._width = max(self._width, group_size)
        self._place()
        return hidden_NH[self.lengths_P[first:].cumsum(0) - 1]

    def step(self, decoder: Any, tokens_R: Tensor) -> Tensor:
        """Run one more token of each row; returns hidden states [R, H], which the next step may overwrite."""
        self.written_R, self._longest = self.written_R + 1, self._longest + 1
        if self._whole is not None:
            return self._whole(tokens_R, *self._cache())
        at, R, pad = self._placement(), len(tokens_R), torch.nn.functional.pad
        if self._steps is None:
            spare = 0 if self.row_cache.dtype == torch.float32 else -R % ROWS_AT_ONCE
            return self._step(decoder, pad(tokens_R, (0, spare)), at)[:R]
        rows, window = _multiple(R, self._unit), min(_multiple(at.window, WINDOW), self.row_cache.shape[4])
        at = at.padded(rows, self.prompt_keys.shape[1], self._width, window)
        return self._steps(partial(self._step, decoder), pad(tokens_R, (0, rows - R)), at)[:R]

    def _placement(self) -> Placement:
        return Placement(self.written_R, self.prompt_R, self._place_R, self.lengths_P, self._most_rows, self._longest)

    def _step(self, decoder: Any, tokens_R: Tensor, at: Placement) -> Tensor:
        self._at = at
        positions_R = at.lengths_P[at.prompt_R] + at.written_R - 1
        positions_R = torch.nn.functional.pad(positions_R, (0, len(tokens_R) - len(positions_R)))
        return run_packed(decoder, tokens_R, positions_R, self)

    def __call__(self, layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scale: float) -> Tensor:
        dtype = self.row_cache.dtype
        new = tuple(x.to(dtype).contiguous() for x in (query_NHD, key_NKD, value_NKD))
        assert new[1].shape[1:] == new[2].shape[1:] == self.row_cache.shape[3::2], "the kernel is told where to read and write"
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
        """The tensors and the numbers of decode.h's Cache, without the layer."""
        of_rows = self.written_R, self.lengths_P, self.prompt_R, self._order_R, self._starts_P
        _, _, rows, K, T, _ = self.row_cache.shape
        prompts_room, L = self.prompt_keys.shape[1], self.prompt_keys.shape[3]
        sizes = rows, prompts_room, len(self.lengths_P), K, T, L, self._most_rows
        return (self.row_cache, self.prompt_keys, self.prompt_values, *of_rows), sizes

    def keep(self, keep_R: Tensor) -> Tensor:
        """Drop the other rows, and prompts that lose their last. Returns which row now lies in each place, int64 [r]."""
        order_R = self._fill(keep_R, self.row_cache[:, :, :, :, : self._longest].transpose(1, 2))
        self.written_R, self.prompt_R = self.written_R[order_R], self.prompt_R[order_R]
        used_P = torch.zeros(len(self.lengths_P), dtype=torch.bool, device=keep_R.device)
        used_P[self.prompt_R] = True
        order_P = self._fill(used_P, self.prompt_keys, self.prompt_values)
        place_P = torch.empty_like(self.lengths_P)
        place_P[order_P] = torch.arange(len(order_P), device=keep_R.device)
        self.lengths_P, self.prompt_R = self.lengths_P[order_P], place_P[self.prompt_R]
        if len(order_R):
            self._place()
        return order_R

    @staticmethod
    def _fill(keep: Tensor, *caches: Tensor) -> Tensor:
        """Move kept entries (dimension 1) from the end into the places of dropped ones; returns the old place of each."""
        count = int(keep.sum())
        holes = (~keep[:count]).nonzero()[:, 0]
        movers = keep[count:].nonzero()[:, 0] + count
        for cache in caches if len(movers) else ():
            cache[:, holes] = cache[:, movers]
        order = torch.arange(count, device=keep.device)
        order[holes] = movers
        return order

    def _place(self) -> None:
        """Which rows have which prompt; anew whenever rows come or go."""
        counts_P = torch.bincount(self.prompt_R, minlength=len(self.lengths_P))
        self._order_R = self.prompt_R.argsort(stable=True)
        self._starts_P = torch.nn.functional.pad(counts_P.cumsum(0), (1, 0))
        self._most_rows, self._longest = int(counts_P.max()), int(self.written_R.max())
        place = torch.arange(len(self.prompt_R), device=self.prompt_R.device) - self._starts_P[self.prompt_R[self._order_R]]
        self._place_R = torch.empty_like(self.prompt_R)
        """Of each row, among prompts x most rows."""
        self._place_R[self._order_R] = self.prompt_R[self._order_R] * self._most_rows + place


def _fixed(device: torch.device) -> bool:
    """Whether steps have a few fixed sizes: to launch a GPU's kernels one by one would take longer than they do."""
    return device.type != "cpu"


def _multiple(n: int, of: int) -> int:
    """The next, at least one."""
    return max(1, -(-n // of)) * of
