"""Attention over packed sequences, as training and prefill run it: prompts first, then completions, all without padding."""

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from groupwise.kernels.packed_attention import PackedRows, packed_attention, unsupported
from groupwise.models.attention import training_flex, training_varlen
from groupwise.models.attention.attend import PLAIN, AttentionForm
from groupwise.models.attention.training_padded import PaddedBlockAttention, PaddedBlocks, QueryChunks, masked_attention
from groupwise.models.recurrent import RecurrentForward, RecurrentRows


class PackedAttention:
    """An `Attend` in which a completion attends to its prompt and to itself, and a prompt to itself, all causally.

    On a CPU in float32 a C++ kernel runs it; in other dtypes and without a compiler PyTorch's attention over padded rows
    (`training_padded`). On a GPU in bfloat16 and float16 FlashAttention runs it (`training_varlen`), else flex attention
    (`training_flex`), which like those for a CPU takes every `AttentionForm`.
    """

    def __init__(
        self, prompt_lengths: list[int], group_ids_R: Tensor, lengths_R: Tensor, device: Any, *, kernels: bool = True
    ) -> None:
        """The layout of P prompts and R completions of `lengths_R` tokens, whose prompts `group_ids_R` names (int64 [R] each)."""
        self._lengths = torch.tensor(prompt_lengths), group_ids_R.cpu(), lengths_R.cpu()
        self._device, self._kernels = device, kernels
        starts = self._lengths[0][self._lengths[1]].tolist()
        positions = [torch.arange(n) for n in prompt_lengths]
        positions += [start + torch.arange(n) for start, n in zip(starts, lengths_R.tolist(), strict=True)]
        self.positions_N = torch.cat(positions).to(device)
        """The position of each packed token in its own sequence."""
        self._longest = max([*prompt_lengths, *(s + n for s, n in zip(starts, lengths_R.tolist(), strict=True))], default=0)
        self._block_masks: dict[int, BlockMask] = {}
        self._query_chunks: dict[int, QueryChunks] = {}

    @cached_property
    def recurrent_rows(self) -> RecurrentRows:
        """The layout as recurrent layers read it."""
        return RecurrentRows(*self._lengths, self._device)

    def mix(self, layer: Any, forward: RecurrentForward, hidden_NH: Tensor) -> Tensor:
        """The output of a recurrent layer: a completion begins with the states that its prompt ends with."""
        return self.recurrent_rows.run(forward, hidden_NH)[0]

    @cached_property
    def rows(self) -> PackedRows:
        """The layout as the kernel reads it."""
        return PackedRows(*self._lengths)

    def block_mask(self, window: int = 0) -> BlockMask:
        """The layout as flex attention reads it, for one sliding window."""
        if window not in self._block_masks:
            visible = training_flex.visible(*self._lengths, self._device, window)
            self._block_masks[window] = training_flex.block_mask(visible, len(self.positions_N), self._device)
        return self._block_masks[window]

    def query_chunks(self, window: int) -> QueryChunks:
        """The layout as `masked_attention` reads it, for one sliding window."""
        if window not in self._query_chunks:
            self._query_chunks[window] = QueryChunks(*self._lengths, window, self._device)
        return self._query_chunks[window]

    @cached_property
    def varlen(self) -> training_varlen.VarlenLayout:
        """The layout as FlashAttention reads it."""
        return training_varlen.VarlenLayout(*self._lengths, self._device)

    @cached_property
    def blocks(self) -> PaddedBlocks:
        """The layout as padded rows."""
        return PaddedBlocks(*self._lengths, self._device)

    def __call__(
        self, layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scale: float, form: AttentionForm = PLAIN
    ) -> Tensor:
        # Under autocast queries and keys come in float32 (from RoPE), values do not.
        query, key, value = (x.contiguous().to(value_NKD.dtype) for x in (query_NHD, key_NKD, value_NKD))
        if form.window >= self._longest:  # hides nothing
            form = replace(form, window=0)
        if training_varlen.unsupported(query, key, value, form) is None:
            return training_varlen.attention(query, key, value, self.varlen, scale, form.window)
        if query.device.type != "cpu":
            return training_flex.attention(query, key, value, self.block_mask(form.window), scale, form)
        if self._kernels and unsupported(query, key, value) is None:
            return packed_attention(query, key, value, self.rows, scale, form.window, form.softcap, form.sinks_H)
        if not form.plain:
            return masked_attention(query, key, value, self.query_chunks(form.window), scale, form)
        output_NHD: Tensor = PaddedBlockAttention.apply(query, key, value, self.blocks, scale)  # type: ignore[no-untyped-call]
        return output_NHD
