"""Attention and cache in generation: a prompt's keys kept once for its group, a row's own in a buffer that is never copied."""

from typing import Any

import torch
from torch import Tensor

from groupwise.attention.blocks import Layout, ragged
from groupwise.attention.interface import run_packed
from groupwise.attention.packed import Packed, packs
from groupwise.attention.whole import Whole, plan
from groupwise.kernels.decode import decode_kernel

ROWS_AT_ONCE = 16
"""Steps run on a multiple of so many rows, some of them for nothing: kernels are made, and kept, for each size anew."""


def slower_path(model: Any, dtype: str | None = None) -> str | None:
    """For people: what keeps this model's attention from its fastest path; None if nothing does.

    `dtype`: what it generates in; None: what its weights are in.
    """
    if not packs(model):
        return f"{type(model).__name__} on {model.device} takes the general path through attention"
    wanted = getattr(torch, dtype) if dtype else model.dtype
    if decode_kernel(_head_size(model.base_model.config), wanted) is None:
        return f"no C++ compiler, or no kernels for {wanted}: generation takes a slower path through PyTorch"
    return None


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or int(config.hidden_size // config.num_attention_heads)


class Decoding:
    """The rows being written and their prompts. Both lie without gaps; what leaves is filled with the last one."""

    def __init__(self, decoder: Any, prompts: int, prompt_length: int, rows: int, tokens: int) -> None:
        """Room for so many prompts and rows at once, in the dtype and on the device of the decoder's weights as they are now."""
        config, like = decoder.config, next(decoder.parameters())
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size, layers = _head_size(config), config.num_hidden_layers
        self._kernel = decode_kernel(size, like.dtype)
        # Without the kernel padded places are read. They count for nothing, but nothing times NaN, which memory may hold, is NaN.
        new = like.new_zeros if self._kernel is None else like.new_empty
        self.prompt_keys = new(layers, prompts, heads, prompt_length, size)
        self.prompt_values = new(layers, prompts, heads, prompt_length, size)
        self.row_cache = new(layers, 2, rows, heads, tokens, size)
        found = None if self._kernel is None else plan(decoder)
        self._whole = None if found is None else Whole(decoder, found, size, prompt_length + tokens, rows)
        self.lengths_P = torch.zeros(0, dtype=torch.long, device=like.device)
        """Tokens of each prompt."""
        self.prompt_R = torch.zeros(0, dtype=torch.long, device=like.device)
        """The prompt of each row."""
        self.written_R = torch.zeros(0, dtype=torch.long, device=like.device)
        """Tokens of each row whose keys are in the cache, the one being run included."""

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
        self._place()
        return hidden_NH[self.lengths_P[first:].cumsum(0) - 1]

    def step(self, decoder: Any, tokens_R: Tensor) -> Tensor:
        """Run one more token of each row; returns hidden states [R, H], which the next step may overwrite."""
        self.written_R = self.written_R + 1
        if self._whole is not None:
            return self._whole(tokens_R, *self._cache())
        positions_R = self.lengths_P[self.prompt_R] + self.written_R - 1
        R = len(tokens_R)
        spare = -R % ROWS_AT_ONCE
        tokens_R, positions_R = (torch.nn.functional.pad(x, (0, spare)) for x in (tokens_R, positions_R))
        return run_packed(decoder, tokens_R, positions_R, self)[:R]

    def __call__(self, layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scale: float) -> Tensor:
        R, dtype = len(self.prompt_R), self.row_cache.dtype
        query_RHD, key_RKD, value_RKD = (x.to(dtype).contiguous() for x in (query_NHD, key_NKD, value_NKD))
        assert key_RKD.shape[1:] == value_RKD.shape[1:] == self.row_cache.shape[3::2], (
            "the kernel is told where to read and write"
        )
        output_RHD = torch.zeros_like(query_RHD)
        if self._kernel is None:
            output_RHD[:R] = self._plain(layer, query_RHD[:R], key_RKD[:R], value_RKD[:R], scale)
            return output_RHD.to(query_NHD.dtype)
        cache, sizes = self._cache()
        self._kernel(query_RHD, key_RKD, value_RKD, output_RHD, *cache, scale, query_RHD.shape[1], layer, *sizes)
        return output_RHD.to(query_NHD.dtype)

    def _cache(self) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """The tensors and the numbers of decode.h's Cache, without the layer."""
        of_rows = self.written_R, self.lengths_P, self.prompt_R, self._order_R, self._starts_P
        layers, _, rows, K, T, _ = self.row_cache.shape
        prompts_room, L = self.prompt_keys.shape[1], self.prompt_keys.shape[3]
        sizes = layers, rows, prompts_room, len(self.lengths_P), K, T, L, self._most_rows
        return (self.row_cache, self.prompt_keys, self.prompt_values, *of_rows), sizes

    def _plain(self, layer: int, query_RHD: Tensor, key_RKD: Tensor, value_RKD: Tensor, scale: float) -> Tensor:
        """What the kernel does, in PyTorch. S query heads share a key-value head."""
        R, K = key_RKD.shape[:2]
        rows_R, device = torch.arange(R), key_RKD.device
        for cache, new in zip(self.row_cache[layer], (key_RKD, value_RKD), strict=True):
            cache[rows_R, :, self.written_R - 1] = new
        longest, room = int(self.written_R.max()), self.prompt_keys.shape[3]
        keys_RKTD, values_RKTD = self.row_cache[layer, :, :R, :, :longest]
        prompt_keys, prompt_values = (cache[layer, : len(self.lengths_P)] for cache in (self.prompt_keys, self.prompt_values))

        query_RKSD = torch.unflatten(query_RHD, 1, (K, -1)) * scale
        of_prompt = self._by_row(self._by_prompt(query_RKSD) @ prompt_keys.transpose(2, 3))
        scores_RKST = torch.cat([of_prompt, query_RKSD @ keys_RKTD.transpose(2, 3)], -1)
        beyond_prompt = torch.arange(room, device=device) >= self.lengths_P[self.prompt_R][:, None]
        beyond_row = torch.arange(longest, device=device) >= self.written_R[:, None]
        scores_RKST.masked_fill_(torch.cat([beyond_prompt, beyond_row], 1)[:, None, None], -torch.inf)
        weights_RKST = scores_RKST.softmax(-1)
        output_RKSD: Tensor = weights_RKST[..., room:] @ values_RKTD
        output_RKSD += self._by_row(self._by_prompt(weights_RKST[..., :room]) @ prompt_values)
        output_RHD: Tensor = output_RKSD.flatten(1, 2)
        return output_RHD

    def _by_prompt(self, x_RKSX: Tensor) -> Tensor:
        """Rows of a prompt side by side, [P, K, rows and S, X]; zeros where a prompt has fewer rows than the most."""
        places = x_RKSX.new_zeros(len(self.lengths_P) * self._most_rows, *x_RKSX.shape[1:])
        places[self._place_R] = x_RKSX
        return torch.unflatten(places, 0, (-1, self._most_rows)).transpose(1, 2).flatten(2, 3)

    def _by_row(self, x_PKQX: Tensor) -> Tensor:
        places = torch.unflatten(x_PKQX, 2, (self._most_rows, -1)).transpose(1, 2).flatten(0, 1)
        return places[self._place_R]

    def keep(self, keep_R: Tensor) -> Tensor:
        """Drop the other rows, and prompts that lose their last. Returns which row now lies in each place, int64 [r]."""
        longest = int(self.written_R.max())
        order_R = self._fill(keep_R, self.row_cache[:, :, :, :, :longest].transpose(1, 2))
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
        self._most_rows = int(counts_P.max())
        place = torch.arange(len(self.prompt_R), device=self.prompt_R.device) - self._starts_P[self.prompt_R[self._order_R]]
        self._place_R = torch.empty_like(self.prompt_R)
        """Of each row, among prompts x most rows."""
        self._place_R[self._order_R] = self.prompt_R[self._order_R] * self._most_rows + place
