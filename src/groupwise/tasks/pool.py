"""Training and held-out problems of a dataset, and the order in which they come: by index, or as a stream."""

import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from groupwise.errors import UserError
from groupwise.tasks.reading import RowReader, digest
from groupwise.tasks.rows import Rows, Stream
from groupwise.types import Problem

REPEATS = "repeat an earlier problem"
HELD_OUT = "are held out too"
MOST_HELD_OUT = 10_000
"""Of a stream: how many rows of another split or file are read to be held out."""
Fits = Callable[[Problem], bool]


def _any(_: object) -> bool:
    return True


def _none(_: object) -> bool:
    return False


class Problems(Protocol):
    """Problems for training, by position of an endless sequence, and held-out ones."""

    dropped: Counter[str]
    """How many rows were left out, by what they do; of a stream, of those read so far."""

    def problem(self, position: int, seed: int) -> Problem: ...

    def held_out(self, count: int) -> list[Problem]: ...

    def holds_out(self, key: int) -> bool:
        """Whether the problem with this digest is held out."""
        ...

    def exclude(self, held: Callable[[int], bool]) -> None:
        """Train on no problem whose digest is held out elsewhere."""
        ...

    def limit(self, fits: Fits, reason: str) -> None:
        """Leave out, of both, what does not fit."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a dataset, as problems."""

    rows: Rows
    reader: RowReader
    kept: "array[int]"
    """Their indexes."""
    keys: "array[int]"
    """The digest of each one's identity."""

    @classmethod
    def scan(cls, rows: Rows, reader: RowReader, dropped: Counter[str]) -> "Part":
        """All rows, each looked at once; those that repeat a problem are dropped.

        Raises:
            UserError: a row is not what it should be.
        """
        kept, keys = array("q"), array("Q")
        seen: set[int | str] = set()
        for i in range(len(rows)):
            problem, repeats = reader.read(rows[i], rows.place(i))
            key = digest(problem.id)
            if key in seen or repeats in seen:
                dropped[REPEATS] += 1
                continue
            seen.add(key)
            if repeats is not None:
                seen.add(repeats)
            kept.append(i)
            keys.append(key)
        return cls(rows, reader, kept, keys)

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Problem:
        i = self.kept[index]
        return self.reader.read(self.rows[i], self.rows.place(i))[0]

    def select(self, indexes: list[int]) -> "Part":
        return Part(
            self.rows, self.reader, array("q", (self.kept[i] for i in indexes)), array("Q", (self.keys[i] for i in indexes))
        )


@dataclass
class Pool:
    """Problems by index. Each is visited once an epoch, in an order that the seed and the epoch give."""

    train: Part
    held: Part
    dropped: Counter[str]
    _orders: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._held_keys = frozenset(self.held.keys)

    @classmethod
    def split(cls, part: Part, share: float, dropped: Counter[str]) -> "Pool":
        """Hold out the share of problems whose digests are smallest: the same ones in whatever order the rows come."""
        count = max(1, round(len(part) * share))
        order = sorted(range(len(part)), key=part.keys.__getitem__)
        return cls(part.select(sorted(order[count:])), part.select(order[:count]), dropped)

    @classmethod
    def of_two(cls, train: Part, held: Part, dropped: Counter[str]) -> "Pool":
        pool = cls(train, held, dropped)
        pool.exclude(pool.holds_out)
        return pool

    def problem(self, position: int, seed: int) -> Problem:
        epoch, place = divmod(position, len(self.train))
        name = f"epoch/{seed}/{epoch}"
        if name not in self._orders:
            order = list(range(len(self.train)))
            random.Random(name).shuffle(order)
            self._orders = {**dict(list(self._orders.items())[-1:]), name: order}
        return self.train[self._orders[name][place]]

    def held_out(self, count: int) -> list[Problem]:
        return [self.held[i] for i in range(min(count, len(self.held)))]

    def holds_out(self, key: int) -> bool:
        return key in self._held_keys

    def exclude(self, held: Callable[[int], bool]) -> None:
        kept = [i for i, key in enumerate(self.train.keys) if not held(key)]
        if len(kept) < len(self.train):
            self.dropped[HELD_OUT] += len(self.train) - len(kept)
            self.train, self._orders = self.train.select(kept), {}

    def limit(self, fits: Fits, reason: str) -> None:
        kept = [[i for i in range(len(part)) if fits(part[i])] for part in (self.train, self.held)]
        for part, indexes, where in ((self.train, kept[0], ""), (self.held, kept[1], ", held out")):
            if len(indexes) < len(part):
                self.dropped[reason + where] += len(part) - len(indexes)
        self.train, self.held, self._orders = self.train.select(kept[0]), self.held.select(kept[1]), {}


class StreamPool:
    """Problems of a stream, which is read from its first row again when it has ended.

    The endless sequence of its training problems is cut into blocks, and each block shuffled by the seed and its number. So a
    position means the same problem in every run; to go back to one, the stream is read again.
    """

    def __init__(
        self,
        stream: Stream,
        reader: RowReader,
        refuse: Callable[[str], UserError],
        *,
        share: float,
        block: int,
        held: tuple[Stream, RowReader] | None = None,
    ) -> None:
        """`refuse`: the error that says where the stream was named, and a text."""
        self.stream, self.reader, self.refuse, self.share, self.block = stream, reader, refuse, share, block
        self.dropped: Counter[str] = Counter()
        self._counted = 0
        self._fits: Fits = _any
        self._reason = ""
        self._held_elsewhere: Callable[[int], bool] = _none
        self._held: dict[int, Problem] | None = None
        if held is not None:
            self._held = {}
            rows, held_reader = held
            for _, (place, row) in zip(range(MOST_HELD_OUT), rows(), strict=False):
                problem, _ = held_reader.read(row, place)
                self._held.setdefault(digest(problem.id), problem)
        self._restart()

    def _restart(self) -> None:
        self._blocks: dict[int, list[Problem]] = {}
        self._next_block = 0
        self._endless = self._problems()

    def _problems(self) -> Iterator[Problem]:
        while True:
            found = False
            for i, (place, row) in enumerate(self.stream()):
                problem, _ = self.reader.read(row, place)
                reason = self._why_not(problem)
                if reason and i >= self._counted:
                    self.dropped[reason] += 1
                self._counted = max(self._counted, i + 1)
                if reason is None:
                    found = True
                    yield problem
            if not found:
                reasons = ", ".join(f"{number:,} {reason}" for reason, number in self.dropped.items())
                raise self.refuse("the stream has no problem to train on" + (f": {reasons}" if reasons else ""))

    def _why_not(self, problem: Problem) -> str | None:
        """Why a row is not trained on; None if it is. An empty reason is not counted: it is held out, as it should be."""
        key = digest(problem.id)
        if self._held is None and self.holds_out(key):
            return ""
        if self.holds_out(key) or self._held_elsewhere(key):
            return HELD_OUT
        return None if self._fits(problem) else self._reason

    def problem(self, position: int, seed: int) -> Problem:
        number, place = divmod(position, self.block)
        if number < self._next_block and number not in self._blocks:
            self._restart()
        while self._next_block <= number:
            problems = [next(self._endless) for _ in range(self.block)]
            self._blocks = {**dict(list(self._blocks.items())[-1:]), self._next_block: problems}
            self._next_block += 1
        order = list(range(self.block))
        random.Random(f"block/{seed}/{number}").shuffle(order)
        return self._blocks[number][order[place]]

    def held_out(self, count: int) -> list[Problem]:
        if self._held is not None:
            return [problem for problem in self._held.values() if self._fits(problem)][:count]
        found: dict[int, Problem] = {}
        for place, row in self.stream():
            problem, _ = self.reader.read(row, place)
            key = digest(problem.id)
            if len(found) == count:
                break
            if self.holds_out(key) and self._fits(problem):
                found.setdefault(key, problem)
        return list(found.values())

    def holds_out(self, key: int) -> bool:
        return key < self.share * 2**64 if self._held is None else key in self._held

    def exclude(self, held: Callable[[int], bool]) -> None:
        self._held_elsewhere = held
        self._restart()

    def limit(self, fits: Fits, reason: str) -> None:
        self._fits, self._reason = fits, reason
        self._restart()
