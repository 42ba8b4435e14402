"""The tokens of the rows being generated, and the random numbers that they are drawn with."""

from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from groupwise.kept import KeptTokens

CHUNK = 2**20
"""Numbers that are passed over at once."""


class RandomNumbers:
    """Uniform numbers of seeded streams. Consecutive ranges of one seed cost no more than one pass over it."""

    def __init__(self) -> None:
        self._seed: int | None = None
        self._generator = torch.Generator()
        self._position = 0

    def uniforms(self, seed: int, offset: int, count: int) -> Tensor:
        """float64 [count], the seed's numbers from `offset` on."""
        if seed != self._seed or offset < self._position:
            self._generator.manual_seed(seed)
            self._seed, self._position = seed, 0
        while self._position < offset:
            self._take(min(CHUNK, offset - self._position))
        return self._take(count)

    def _take(self, count: int) -> Tensor:
        self._position += count
        return torch.rand(count, generator=self._generator, dtype=torch.float64)


class KeptTokensTable:
    """The kept sets of the rows being generated whose sampling is limited, by slot."""

    def __init__(self) -> None:
        # Arrays that grow: an object for each token would take more memory than most sets.
        self._rows: dict[int, tuple[array[int], array[int], int]] = {}

    def append(self, slots: list[int], kept: KeptTokens) -> None:
        """Add the kept set of the next token of each slot, from those of these tokens."""
        words, start = kept.words.numpy().tobytes(), 0
        for slot, end in zip(slots, kept.ends.tolist(), strict=True):
            if slot not in self._rows:
                self._rows[slot] = array("i"), array("q"), kept.vocabulary
            row, ends, _ = self._rows[slot]
            row.frombytes(words[4 * start : 4 * end])
            ends.append(len(row))
            start = end

    def of(self, slot: int) -> KeptTokens | None:
        """What was added for a slot; None where nothing was."""
        if slot not in self._rows:
            return None
        words, ends, vocabulary = self._rows[slot]
        with torch.inference_mode(False):
            found = [torch.from_numpy(np.array(numbers)) for numbers in (words, ends)]
        return KeptTokens(words=found[0], ends=found[1], vocabulary=vocabulary)

    def drop(self, slots: list[int]) -> None:
        for slot in slots:
            self._rows.pop(slot, None)


class RowTable:
    """What has been generated so far, in a slot for each row; slots are taken and given back."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self._free: list[int] = []
        self._uniforms_BT = torch.zeros(0, 0, dtype=torch.float64, device=device)
        self.tokens_BT = torch.zeros(0, 0, dtype=torch.long, device=device)
        self.logprobs_BT = torch.zeros(0, 0, device=device)
        self.lengths_B = torch.zeros(0, dtype=torch.long, device=device)
        self._limits_B = torch.zeros(0, dtype=torch.long, device=device)
        self.stopped_B = torch.zeros(0, dtype=torch.bool, device=device)
        self.kept = KeptTokensTable()

    def reserve(self, rows: int, tokens: int) -> None:
        """Have at least so many free slots, for rows of so many tokens."""
        B, T = self.tokens_BT.shape
        more = max(0, rows - len(self._free))
        if more == 0 and tokens <= T:
            return
        pad = torch.nn.functional.pad
        wide = (0, max(0, tokens - T), 0, more)
        self._uniforms_BT, self.tokens_BT, self.logprobs_BT = (
            pad(table, wide) for table in (self._uniforms_BT, self.tokens_BT, self.logprobs_BT)
        )
        self.lengths_B, self._limits_B, self.stopped_B = (
            pad(table, (0, more)) for table in (self.lengths_B, self._limits_B, self.stopped_B)
        )
        self._free += range(B, B + more)

    def take(self, uniforms_nT: Tensor) -> list[int]:
        """Slots for n rows of at most T tokens, which are drawn with these numbers; they must have been reserved."""
        n, T = uniforms_nT.shape
        slots, self._free = self._free[:n], self._free[n:]
        index = torch.tensor(slots, device=self._device)
        self._uniforms_BT[index, :T] = uniforms_nT.to(self._device)
        self.lengths_B[index] = 0
        self._limits_B[index] = T
        return slots

    def give_back(self, slots: list[int]) -> None:
        self._free += slots
        self.kept.drop(slots)

    def tokens(self, slot: int) -> Tensor:
        """int64 [T], what a row has so far."""
        return self.tokens_BT[slot, : int(self.lengths_B[slot])]

    def uniforms(self, slots_R: Tensor) -> Tensor:
        """The numbers for the next token of each row."""
        return self._uniforms_BT[slots_R, self.lengths_B[slots_R]]

    def write(self, slots_R: Tensor, tokens_R: Tensor, logprobs_R: Tensor, ended: Callable[[], Tensor]) -> Tensor:
        """Append a token to each of the rows; returns which are done: ended, which is asked once they are written, or full."""
        lengths_R = self.lengths_B[slots_R]
        self.tokens_BT[slots_R, lengths_R] = tokens_R
        self.logprobs_BT[slots_R, lengths_R] = logprobs_R
        self.lengths_B[slots_R] = lengths_R + 1
        ended_R = ended()
        self.stopped_B[slots_R] = ended_R
        return ended_R | (lengths_R + 1 == self._limits_B[slots_R])

    def tails(self, slots_R: Tensor, count: int) -> list[list[int]]:
        """The last tokens of each row, at most `count`."""
        lengths = self.lengths_B[slots_R].tolist()
        return [
            self.tokens_BT[slot, max(0, length - count) : length].tolist()
            for slot, length in zip(slots_R.tolist(), lengths, strict=True)
        ]
