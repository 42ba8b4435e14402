"""Which prompts a step generates completions for, and how many: the `allocation` part of an algorithm.

An allocation takes `Candidates` and returns (index of the candidate, completions) for each prompt it uses. The parts with a
history hold a Beta distribution of each prompt's pass rate: (a, b), at first (1, 1), to which each visit adds its right and its
wrong completions.
"""

import heapq
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from groupwise.algorithms.part import Part

PRIOR = (1.0, 1.0)
"""Every pass rate is as likely as any other."""
History = Mapping[str, tuple[float, float]]
"""Prompt -> (a, b). Plain and serialisable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The prompts to choose from, and how much is to be generated."""

    prompt_ids: Sequence[str]
    """In the order of the task's stream; at least `count`."""
    count: int
    """How many prompts to use."""
    completions: int
    """How many completions to generate, over all prompts."""
    history: History
    """Of prompts that were visited before."""
    seed: int
    """For whatever is drawn at random."""


Allocation = list[tuple[int, int]]
"""(index of the candidate, completions), in the order of the stream."""


def allocation_problem(chosen: Any, candidates: Candidates) -> str | None:
    """What an allocation of the user's own did wrong; None if it can be used."""
    pairs = isinstance(chosen, Sequence) and all(isinstance(pair, Sequence) and len(pair) == 2 for pair in chosen)
    if not pairs or not all(isinstance(number, Integral) for pair in chosen for number in pair):
        return f"gave {chosen!r:.100}, and not a list of (index of the candidate, completions)"
    given = sum(n for _, n in chosen)
    if len(chosen) != candidates.count or given != candidates.completions:
        return f"gave {given} completions to {len(chosen)} prompts, and not {candidates.completions} to {candidates.count}"
    available = len(candidates.prompt_ids)
    for index, size in chosen:
        if not 0 <= index < available:
            return f"chose the candidate {index}, and there are {available}, from 0"
        if size < 1:
            return f"gave {size} completions to the candidate {index}, and a group has at least 1"
    return None


def uniform(candidates: Candidates) -> Allocation:
    """The stream's order, a group of the same size for each prompt."""
    return _equal(range(candidates.count), candidates.completions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Thompson(Part):
    """The prompts whose pass rate, drawn from its posterior, is nearest a target (MoPPS, arXiv 2507.04632, section 4 and C.3)."""

    candidates: float = 16.0
    """How many prompts of the stream are looked at for each that is used; the others are passed over."""
    target_rate: float = 0.5
    """The pass rate that is wanted."""
    history_decay: float = 1.0
    """How much of a prompt's history is left at its next visit; the rest is again the prior's. 1: nothing is forgotten."""

    def contradictions(self) -> Iterable[tuple[str, bool, str]]:
        yield "candidates", self.candidates < 1, "must be at least 1"
        for key in ("target_rate", "history_decay"):
            yield key, getattr(self, key) > 1, "must lie in 0 to 1"

    def __call__(self, candidates: Candidates) -> Allocation:
        return _equal(self.choose(candidates), candidates.completions)

    def choose(self, candidates: Candidates) -> list[int]:
        """The indices of the prompts to use, each prompt once unless there are too few."""
        draw = random.Random(candidates.seed).betavariate
        # One draw for each prompt: one that the candidates hold several times is no more likely to be chosen.
        rates = {prompt: draw(*candidates.history.get(prompt, PRIOR)) for prompt in dict.fromkeys(candidates.prompt_ids)}
        distances = [(rates[prompt] - self.target_rate) ** 2 for prompt in candidates.prompt_ids]
        ranked = sorted(range(len(distances)), key=distances.__getitem__)
        seen, distinct, again = set[str](), list[int](), list[int]()
        for i in ranked:
            (again if candidates.prompt_ids[i] in seen else distinct).append(i)
            seen.add(candidates.prompt_ids[i])
        return sorted([*distinct, *again][: candidates.count])

    def remember(self, history: History, visits: Iterable[tuple[str, float, float]]) -> History:
        """The history after more visits, each (prompt, right, wrong); the one passed in is left unchanged."""
        after, kept = dict(history), self.history_decay
        for prompt, right, wrong in visits:
            a, b = after.get(prompt, PRIOR)
            after[prompt] = (kept * a + (1 - kept) * PRIOR[0] + right, kept * b + (1 - kept) * PRIOR[1] + wrong)
        return after


@dataclass(frozen=True, slots=True, kw_only=True)
class HitUtility(Thompson):
    """Group sizes that make the sum over prompts of P(at least one right completion) largest (HORA, arXiv 2605.07114).

    Under Beta(a, b), n completions are all wrong with probability prod_{j<n} (b + j) / (a + b + j). The gain of one more falls
    with n, so giving completions one by one to the prompt that gains most reaches the largest sum.
    """

    candidates: float = 1.0
    """As in "thompson", which then chooses the prompts; 1: the stream's order."""
    smallest_group: int = 2
    """Completions that each prompt gets in any case."""

    def contradictions(self) -> Iterable[tuple[str, bool, str]]:
        yield from Thompson.contradictions(self)
        unread = self.candidates == 1 and self.target_rate != 0.5
        yield "target_rate", unread, "chooses among candidates, so it needs candidates above 1"
        yield "smallest_group", self.smallest_group < 1, "must be at least 1"

    def __call__(self, candidates: Candidates) -> Allocation:
        chosen = self.choose(candidates) if self.candidates > 1 else list(range(candidates.count))
        posteriors = [candidates.history.get(candidates.prompt_ids[i], PRIOR) for i in chosen]
        sizes = hit_utility_sizes(posteriors, candidates.completions, self.smallest_group)
        return list(zip(chosen, sizes, strict=True))


def hit_utility(a: float, b: float, n: int) -> float:
    """P(at least one of n completions is right), the pass rate being Beta(a, b)."""
    return 1 - math.prod((b + j) / (a + b + j) for j in range(n))


def hit_utility_sizes(posteriors: Sequence[tuple[float, float]], completions: int, smallest: int) -> list[int]:
    """How many completions each prompt gets: the largest sum of `hit_utility`, no group smaller than `smallest`.

    Among equal gains the smaller group grows first, then the earlier one; so without a history all sizes are equal.

    Raises:
        ValueError: there are too few completions.
    """
    if completions < smallest * len(posteriors):
        raise ValueError(f"{completions} completions are too few for {len(posteriors)} groups of at least {smallest}")

    def gain(i: int, n: int) -> float:
        a, b = posteriors[i]
        return (1 - hit_utility(a, b, n)) * a / (a + b + n)

    sizes = [smallest] * len(posteriors)
    queue = [(-gain(i, smallest), smallest, i) for i in range(len(posteriors))]
    heapq.heapify(queue)
    for _ in range(completions - sum(sizes)):
        _, n, i = queue[0]
        sizes[i] = n + 1
        heapq.heapreplace(queue, (-gain(i, n + 1), n + 1, i))
    return sizes


def _equal(chosen: Iterable[int], completions: int) -> Allocation:
    """The completions divided evenly; the first groups are one larger where that does not come out."""
    chosen = list(chosen)
    size, more = divmod(completions, len(chosen))
    return [(i, size + (place < more)) for place, i in enumerate(chosen)]
