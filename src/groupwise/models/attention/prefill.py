"""What happens to the keys and values of prompts, and of whole rows, before they are decoded further."""

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from groupwise.models.attention.attend import PLAIN, AttentionForm
from groupwise.models.attention.training import PackedAttention
from groupwise.models.attention.training_padded import PaddedLayout, ragged
from groupwise.models.recurrent import RecurrentForward

if TYPE_CHECKING:
    from groupwise.models.attention.decoding import DecodingCache


class Prefill:
    """The `Attend` of new prompts: what a later step needs of them is written to the cache."""

    def __init__(self, cache: "DecodingCache", attention: PackedAttention, lengths: list[int], counts: list[int]) -> None:
        self._cache, self._attention = cache, attention
        device = cache.lengths_P.device
        self._layout = PaddedLayout(ragged(torch.tensor(lengths), 0), device)
        self._rows = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(counts, device=device))

    def __call__(
        self, layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scale: float, form: AttentionForm = PLAIN
    ) -> Tensor:
        self._cache.write_prompts(layer, self._layout, key_NKD, value_NKD)
        return self._attention(layer, query_NHD, key_NKD, value_NKD, scale, form)

    def mix(self, layer: Any, forward: RecurrentForward, hidden_NH: Tensor) -> Tensor:
        output_NH, states = self._attention.recurrent_rows.run(forward, hidden_NH)
        self._cache.add_states(layer, states.select(self._rows))
        return output_NH


class Restoration(Prefill):
    """The `Attend` of prompts and of the rows that continue them, written to the cache as if the rows had been decoded."""

    def __init__(self, cache: "DecodingCache", attention: PackedAttention, lengths: list[int], lengths_R: Tensor) -> None:
        super().__init__(cache, attention, lengths, [0] * len(lengths))
        self._of_prompts = sum(lengths)
        self._of_rows = PaddedLayout(ragged(lengths_R, 0), cache.lengths_P.device)

    def __call__(
        self, layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scale: float, form: AttentionForm = PLAIN
    ) -> Tensor:
        n = self._of_prompts
        self._cache.write_rows(layer, self._of_rows, key_NKD[n:], value_NKD[n:])
        self._cache.write_prompts(layer, self._layout, key_NKD[:n], value_NKD[:n])
        return self._attention(layer, query_NHD, key_NKD, value_NKD, scale, form)


class Extension:
    """The `Attend` of the tokens after known prefixes."""

    def __init__(self, cache: "DecodingCache", starts: list[int], lengths: list[int]) -> None:
        self._cache, self._starts, self._lengths = cache, starts, lengths
        self._first = len(cache.lengths_P)
        self.ends = list(itertools.accumulate(lengths))

    def __call__(
        self, layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scale: float, form: AttentionForm = PLAIN
    ) -> Tensor:
        parts = []
        for slot, (start, length, end) in enumerate(zip(self._starts, self._lengths, self.ends, strict=True), self._first):
            new = slice(end - length, end)
            keys, values = self._cache.prompt_of(layer, slot, start + length)
            keys[:, start:], values[:, start:] = key_NKD[new].transpose(0, 1), value_NKD[new].transpose(0, 1)
            parts.append(attend_suffix(query_NHD[new], keys, values, start, scale, form))
        return torch.cat(parts)

    def mix(self, layer: Any, forward: RecurrentForward, hidden_NH: Tensor) -> Tensor:
        raise NotImplementedError("a cache with recurrent states does not continue")


def attend_suffix(
    query_NHD: Tensor, keys_KTD: Tensor, values_KTD: Tensor, start: int, scale: float, form: AttentionForm
) -> Tensor:
    """Attention of the tokens from `start` on to all T tokens up to themselves, [N, H, D]."""
    device, N, (K, T, _) = query_NHD.device, len(query_NHD), keys_KTD.shape
    last_N1, position_T = torch.arange(start, start + N, device=device)[:, None], torch.arange(T, device=device)
    visible_NT = position_T <= last_N1
    if form.window:
        visible_NT &= position_T > last_N1 - form.window
    query_KSND = torch.unflatten(query_NHD, 1, (K, -1)).permute(1, 2, 0, 3)
    scores_KSNT = query_KSND.float() @ keys_KTD.float().transpose(1, 2)[:, None] * scale
    if form.softcap:
        scores_KSNT = form.softcap * torch.tanh(scores_KSNT / form.softcap)
    scores_KSNT.masked_fill_(~visible_NT, -torch.inf)
    if form.sinks_H is not None:
        sinks_KSN1 = form.sinks_H.float().view(K, -1, 1, 1).expand(-1, -1, N, 1)
        scores_KSNT = torch.cat([scores_KSNT, sinks_KSN1], -1)
    output_KSND = scores_KSNT.softmax(-1)[..., :T] @ values_KTD.float()[:, None]
    return output_KSND.permute(2, 0, 1, 3).flatten(1, 2).to(query_NHD.dtype)
