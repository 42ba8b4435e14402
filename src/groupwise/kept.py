"""Which tokens of the vocabulary top-k, top-p and min-p left to choose from, for each token of a completion."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BITS = 32
"""Tokens of the vocabulary that a word of a bitmap covers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptTokens:
    """The kept set of each of T sampled tokens: the tokens of the vocabulary that the limits left, the sampled one among them.

    A set is a list of ids or a bitmap, whichever is shorter, so it never takes more than one bit for each token of the
    vocabulary.
    """

    words: Tensor
    """int32 [M], the sets one after the other. A set of ceil(V / 32) words is a bitmap, whose word i holds the tokens from 32 i
    on, the lowest bit first; a shorter one is a list of ids, ascending; an empty one stands for the whole vocabulary."""
    ends: Tensor
    """int64 [T], where each set ends in `words`."""
    vocabulary: int
    """V, its number of tokens."""

    @classmethod
    def of(cls, kept_TV: Tensor) -> "KeptTokens":
        """The record, on the CPU, of sets that are given as bool [T, V], True where a token was kept."""
        T, V = kept_TV.shape
        size = -(-V // BITS)
        counts_T = kept_TV.view(torch.uint8).sum(1, dtype=torch.int32)  # half the time of a sum of bool
        lengths_T = torch.where(counts_T == V, 0, counts_T.clamp(max=size))
        ends_T = lengths_T.cumsum(0)
        is_list_T = (counts_T < size)[:, None]
        lists = (kept_TV & is_list_T).nonzero()[:, 1]
        bitmap_T = lengths_T == size
        bits = torch.nn.functional.pad(kept_TV[bitmap_T], (0, size * BITS - V)).view(-1, size * BITS // 8, 8).to(torch.uint8)
        place = (2 ** torch.arange(8, device=kept_TV.device)).to(torch.uint8)
        words = torch.empty(int(ends_T[-1]) if T else 0, dtype=torch.int32, device=kept_TV.device)
        in_bitmap = bitmap_T.repeat_interleave(lengths_T)
        words[~in_bitmap] = lists.int()
        words[in_bitmap] = (bits * place).sum(-1, dtype=torch.uint8).view(torch.int32).flatten()
        return cls(words=words.cpu(), ends=ends_T.cpu(), vocabulary=V)

    @classmethod
    def join(cls, parts: Sequence["KeptTokens | None"], lengths: Sequence[int]) -> "KeptTokens | None":
        """The record of tokens one after the other, from those of parts of so many tokens; None: the whole vocabulary was kept.

        None if it was in all parts. Also for a conversation: tokens that a tool or a user wrote have no kept set.
        """
        known = [part for part in parts if part is not None]
        if not known:
            return None
        starts, total = [], 0
        for part, length in zip(parts, lengths, strict=True):
            starts.append(torch.full((length,), total) if part is None else part.ends + total)
            total += 0 if part is None else len(part.words)
        words, ends = torch.cat([part.words for part in known]), torch.cat(starts)
        return cls(words=words, ends=ends, vocabulary=known[0].vocabulary)

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> Tensor:
        """int64 [T], words of each set."""
        return torch.diff(self.ends, prepend=self.ends.new_zeros(1))

    def slice(self, start: int, stop: int) -> "KeptTokens":
        """The record of the tokens from `start` up to `stop`."""
        first = int(self.ends[start - 1]) if start else 0
        ends = self.ends[start:stop] - first
        last = int(ends[-1]) if len(ends) else 0
        return KeptTokens(words=self.words[first : first + last], ends=ends, vocabulary=self.vocabulary)

    def to(self, device: torch.device | str) -> "KeptTokens":
        return KeptTokens(words=self.words.to(device), ends=self.ends.to(device), vocabulary=self.vocabulary)

    def contains(self, tokens: Tensor) -> Tensor:
        """bool [T]: whether each of T tokens is in its set."""
        size, lengths = -(-self.vocabulary // BITS), self.lengths
        rows = torch.arange(len(self)).repeat_interleave(lengths)
        listed = torch.zeros(len(self), dtype=torch.bool)
        listed[rows[(self.words == tokens[rows]) & (lengths[rows] < size)]] = True
        bitmap_T = lengths == size
        word = self.words[(self.ends - size + tokens // BITS)[bitmap_T]]
        listed[bitmap_T] = (word >> (tokens[bitmap_T] % BITS) & 1).bool()
        return listed | (lengths == 0)
