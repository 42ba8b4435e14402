"""A discrete-event simulation of samplers, learner and publishing, on the admission code that a run uses.

A sampler decodes all its rows together: each gets a token in every step, and a step takes longer the more rows there are
(continuous batching). Groups are dealt to the sampler with the fewest rows, where they fit; the others wait in order. Completions
that finish, groups that are admitted, weights that arrive and batches that are trained on are the events; between two of them
every rate is constant, so that nothing is stepped through token by token.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from groupwise.rollouts.admission import Admission

Lengths = Callable[[np.random.Generator, int], NDArray[np.int64]]
"""Draws so many completion lengths, in tokens."""


def _at_once(_: int) -> float:
    return 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is simulated. Times in seconds."""

    samplers: int
    rows: int
    """Completions that a sampler generates at once."""
    prompts: int
    """Groups in a batch."""
    group: int
    staleness: int = 0
    window: int = 1
    partial: bool = True
    """Whether completions under way go on under new weights; else a sampler finishes its rows before it loads them, and begins
    nothing meanwhile."""
    step_seconds: Callable[[int], float]
    """Of a decoding step with so many rows."""
    prefill_seconds: float = 0.0
    """Of a group's prompt, in which the sampler's other rows wait."""
    learn_seconds: Callable[[int], float]
    """Of a training step on so many completion tokens."""
    publish_seconds: float = 0.0
    """From the end of a training step until samplers may load its weights; the next step begins only then."""
    load_seconds: Callable[[int], float] = _at_once
    """For which a sampler stands still when it loads weights, with so many rows under way (whose keys are computed again)."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What a simulated run did."""

    seconds: float
    """Per training step, over the steps after the first `staleness` + 1."""
    sampler_busy: float
    """Share of time in which a sampler has a row, mean over samplers."""
    sampler_fill: float
    """Tokens generated, over those that samplers with all rows taken would have generated."""
    learner_busy: float
    largest_age: int
    """The most steps done between a group's beginning and the step that trained on it."""
    most_under_way: int
    mean_length: float
    """Of the completions that were trained on."""
    tokens: int
    """Generated in groups that were trained on."""
    steps: int
    groups: int
    """Begun."""


@dataclass(slots=True)
class _Group:
    position: int
    lengths: list[int]
    left: int
    born: int
    """Steps done when it was begun."""


@dataclass(slots=True)
class _Sampler:
    index: int
    made: float = 0.0
    """Tokens that each row has been given since the start; fractions while a step is under way."""
    rows: list[tuple[float, int, _Group]] = field(default_factory=list)
    """A heap of (value of `made` at which a row ends, tie-breaker, its group)."""
    seen: float = 0.0
    """The time of `made`."""
    stopped: float = 0.0
    """Until when it prefills or loads."""
    event: int = 0
    """Number of its latest scheduled event; earlier ones are void."""
    draining: bool = False
    busy: float = 0.0
    tokens: float = 0.0


class Simulation:
    """One run."""

    def __init__(self, setup: Setup, lengths: Lengths, *, seed: int = 0) -> None:
        self.setup, self.lengths = setup, lengths
        self.random = np.random.default_rng(seed)
        self.admission = Admission(setup.prompts, setup.staleness, setup.window)
        self.samplers = [_Sampler(i) for i in range(setup.samplers)]
        self.now, self.done = 0.0, 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._waiting: deque[_Group] = deque()
        self._free: list[tuple[int, int]] = [(0, i) for i in range(setup.samplers)]
        """A heap of (rows, sampler); entries whose number of rows is outdated are skipped."""
        self._groups: dict[int, _Group] = {}
        self._finished = self._unpublished = 0
        self._learning = False
        self._learner_busy = 0.0
        self._ends: list[float] = []
        """When each training step ended."""
        self._ages: list[int] = []
        self._most = 0
        self._trained_tokens = self._trained_rows = 0

    def run(self, steps: int) -> Outcome:
        """Simulate until so many training steps are done."""
        self._begin_groups()
        while self.done < steps:
            self.now, _, act = heapq.heappop(self._events)
            act()
        for sampler in self.samplers:
            self._advance(sampler)
        # The first steps fill the queues. They are left out of the time per step where enough others are left.
        first = min(self.setup.staleness + 1, steps // 2)
        seconds = (self._ends[-1] - (self._ends[first - 1] if first else 0.0)) / (steps - first)
        full = self.now / self.setup.step_seconds(self.setup.rows) * self.setup.rows * self.setup.samplers
        return Outcome(
            seconds=seconds,
            sampler_busy=sum(sampler.busy for sampler in self.samplers) / (self.now * len(self.samplers)),
            sampler_fill=sum(sampler.tokens for sampler in self.samplers) / full,
            learner_busy=self._learner_busy / self.now,
            largest_age=max(self._ages),
            most_under_way=self._most,
            mean_length=self._trained_tokens / self._trained_rows,
            tokens=self._trained_tokens,
            steps=steps,
            groups=self.admission.begun,
        )

    def _at(self, time: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), act))

    # --- groups

    def _begin_groups(self) -> None:
        for _ in range(self.admission.free):
            position = self.admission.begin()
            lengths = np.maximum(1, self.lengths(self.random, self.setup.group)).tolist()
            group = _Group(position, lengths, len(lengths), self.done)
            self._groups[position] = group
            self._waiting.append(group)
        self._most = max(self._most, len(self._groups) + self._unpublished)
        self._deal()

    def _deal(self) -> None:
        """Give waiting groups to the samplers with the fewest rows, while they fit."""
        while self._waiting:
            sampler = self._emptiest()
            if sampler is None or (sampler.rows and len(sampler.rows) + self.setup.group > self.setup.rows):
                return
            group = self._waiting.popleft()
            self._advance(sampler)
            for length in group.lengths:
                heapq.heappush(sampler.rows, (sampler.made + length, next(self._numbers), group))
            self._stop(sampler, self.setup.prefill_seconds)
            self._note(sampler)
            self._schedule(sampler)

    def _emptiest(self) -> _Sampler | None:
        while self._free:
            rows, index = self._free[0]
            sampler = self.samplers[index]
            if rows == len(sampler.rows) and not sampler.draining:
                return sampler
            heapq.heappop(self._free)
        return None

    def _note(self, sampler: _Sampler) -> None:
        heapq.heappush(self._free, (len(sampler.rows), sampler.index))

    # --- samplers

    def _advance(self, sampler: _Sampler) -> None:
        """Bring a sampler's count of tokens to the present."""
        since, sampler.seen = sampler.seen, self.now
        if not sampler.rows:
            return
        sampler.busy += self.now - since
        decoding = self.now - max(since, min(sampler.stopped, self.now))
        steps = decoding / self.setup.step_seconds(len(sampler.rows))
        sampler.made += steps
        sampler.tokens += steps * len(sampler.rows)

    def _stop(self, sampler: _Sampler, seconds: float) -> None:
        sampler.stopped = max(sampler.stopped, self.now) + seconds

    def _schedule(self, sampler: _Sampler) -> None:
        """The end of its next row."""
        sampler.event = number = next(self._numbers)
        if sampler.rows:
            left = max(0.0, sampler.rows[0][0] - sampler.made)
            start = max(self.now, sampler.stopped)
            self._at(start + left * self.setup.step_seconds(len(sampler.rows)), lambda: self._row_ends(sampler, number))

    def _row_ends(self, sampler: _Sampler, number: int) -> None:
        if sampler.event != number:
            return
        self._advance(sampler)
        end = sampler.rows[0][0]
        sampler.made = max(sampler.made, end)  # what rounding left
        finished = False
        while sampler.rows and sampler.rows[0][0] <= end:
            group = heapq.heappop(sampler.rows)[2]
            group.left -= 1
            if group.left == 0:
                self.admission.finish(group.position, keep=True)
                self._finished += 1
                finished = True
        if sampler.draining and not sampler.rows:
            sampler.draining = False
            self._stop(sampler, self.setup.load_seconds(0))
        if not sampler.draining:
            self._note(sampler)
        self._schedule(sampler)
        if finished:
            self._learn()
        self._deal()

    # --- the learner

    def _learn(self) -> None:
        if self._learning or self._finished < self.setup.prompts:
            return
        batch = self.admission.ready()
        if not batch:
            return
        self.admission.take(batch)
        groups = [self._groups.pop(position) for position in batch]
        self._finished -= len(batch)
        self._unpublished += len(batch)
        self._ages += [self.done - group.born for group in groups]
        tokens = sum(sum(group.lengths) for group in groups)
        self._trained_tokens += tokens
        self._trained_rows += len(batch) * self.setup.group
        self._learning = True
        seconds = self.setup.learn_seconds(tokens)
        self._at(self.now + seconds + self.setup.publish_seconds, lambda: self._learnt(seconds))

    def _learnt(self, seconds: float) -> None:
        self._learning = False
        self._learner_busy += seconds
        self.done += 1
        self._ends.append(self.now)
        self.admission.publish()
        self._unpublished = 0
        for sampler in self.samplers:
            self._load(sampler)
        self._begin_groups()
        self._learn()

    def _load(self, sampler: _Sampler) -> None:
        """New weights: at once, or once its rows are done."""
        self._advance(sampler)
        if sampler.rows and not self.setup.partial:
            sampler.draining = True
            return
        self._stop(sampler, self.setup.load_seconds(len(sampler.rows)))
        self._schedule(sampler)
