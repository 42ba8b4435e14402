"""Which logits sampling replay leaves out of the softmax, block by block of the vocabulary."""

from collections.abc import Iterator

import torch
from torch import Tensor

from groupwise.kept import BITS, KeptTokens

NEVER = -1e30
"""A logit that adds nothing to a softmax: finite, for 0 x -inf would be NaN."""


class CutLogits:
    """The tokens of the vocabulary outside the kept sets of N tokens: bool masks of the size of a block of their logits."""

    def __init__(self, kept: KeptTokens, device: torch.device) -> None:
        """`kept`: of the N tokens."""
        kept = kept.to(device)
        lengths_N = kept.lengths
        self._words = -(-kept.vocabulary // BITS)
        self._listed_N1 = ((lengths_N > 0) & (lengths_N < self._words))[:, None]
        rows_M = torch.arange(len(kept), device=device).repeat_interleave(lengths_N, output_size=len(kept.words))
        in_list_M = self._listed_N1[rows_M, 0]
        # In order of the vocabulary, so that the kept tokens of a block lie next to each other.
        self._ids, order = kept.words[in_list_M].long().sort()
        self._rows = rows_M[in_list_M][order]
        self._bitmap_rows = (lengths_N == self._words).nonzero()[:, 0]
        self._bytes = kept.words[~in_list_M].view(-1, self._words).view(torch.uint8)
        self._vocabulary = kept.vocabulary

    def blocks(self, columns: int, size: int) -> Iterator[Tensor]:
        """bool [N, `size`], True where a token was cut, of each block of all `columns` logits; the last may be narrower.

        Raises:
            ValueError: the kept sets are of another vocabulary.
        """
        if columns != self._vocabulary:
            raise ValueError(f"kept sets of {self._vocabulary} tokens do not fit a model with {columns} logits")
        starts = list(range(0, columns, size))
        bounds = torch.tensor([*starts, columns], device=self._ids.device)
        first = torch.searchsorted(self._ids, bounds).tolist()
        for i, start in enumerate(starts):
            cut_NV = self._listed_N1.repeat(1, min(size, columns - start))
            entries = slice(first[i], first[i + 1])
            cut_NV[self._rows[entries], self._ids[entries] - start] = False
            if len(self._bitmap_rows):
                column = torch.arange(start, start + cut_NV.shape[1], device=self._ids.device)
                cut_NV[self._bitmap_rows] = (self._bytes[:, column // 8] >> (column % 8).to(torch.uint8)) & 1 == 0
            yield cut_NV
