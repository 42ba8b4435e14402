"""Which differences between settings are larger than differences between seeds explain, and how many seeds would decide the others."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from groupwise.evidence.ladders import ladder_of
from groupwise.evidence.naming import Group
from groupwise.evidence.outcomes import Outcomes, costs, evaluated, scores
from groupwise.evidence.runs import Measure, measure
from groupwise.evidence.statistics import LEVEL, Difference, difference, holm

Pair = tuple[Group, Group]
ALL_PAIRS = 3
"""Up to so many settings each is compared with each, more are compared with the first only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """What can be said of a pair of settings in one measure."""

    first: Group
    second: Group
    scored: Measure
    outcomes: Outcomes
    found: Difference | None
    """None: too few seeds."""
    adjusted: float = math.nan
    """Its p-value after Holm's correction over its family: all pairs in the same measure. NaN: nothing was found."""
    family: int = 0
    """How many differences were found in that family."""
    level: float = LEVEL
    """What the p-value of an open difference is to be below in the worst case: the level divided among the open ones."""

    @property
    def mean(self) -> float:
        """The second's mean less the first's: over the seeds that were compared, or over all where they are too few; NaN: none."""
        if self.found is not None:
            return self.found.mean
        first, second = self.outcomes.first.values(), self.outcomes.second.values()
        return statistics.fmean(second) - statistics.fmean(first) if first and second else math.nan

    @property
    def verdict(self) -> Literal["better", "worse", "open", "unknown"]:
        """Of the second setting."""
        if self.found is None:
            return "unknown"
        if not self.adjusted < LEVEL:
            return "open"
        more_is_better = self.outcomes.measure == "score"
        return "better" if (self.found.mean > 0) == more_is_better else "worse"


def contrasts(groups: Sequence[Group]) -> list[Pair]:
    """Which settings are compared with which: each with each, from four settings on each with the first.

    Rungs of a ladder are compared as `groupwise ablate` does: with the rung before where they are cumulative, else with the first.
    """
    if ladder := ladder_of(run for group in groups for run in group.runs):
        return against_one(sorted(groups, key=lambda group: ladder.rung(group.runs[0])), cumulative=ladder.cumulative)
    if len(groups) <= ALL_PAIRS:
        return [(first, second) for i, first in enumerate(groups) for second in groups[i + 1 :]]
    return against_one(groups, cumulative=False)


def against_one(groups: Sequence[Group], *, cumulative: bool) -> list[Pair]:
    """Each setting but the first, with the one before or with the first."""
    return [(groups[i - 1 if cumulative else 0], groups[i]) for i in range(1, len(groups))]


def compare(pairs: Sequence[Pair]) -> list[Compared]:
    """What can be said of each pair: of its scores always, and of what they cost where enough seeds reached a score.

    With a probability of 95 % none of the differences that are called better or worse in one measure is zero in truth.
    """
    scored = measure(run for pair in pairs for group in pair for run in group.runs)
    every = [
        Compared(first=first, second=second, scored=scored, outcomes=of, found=difference(of.first, of.second, of.resolution))
        for first, second in pairs
        for of in _outcomes(first, second, scored)
    ]
    return [item for item in _judged(every) if item.found is not None or item.outcomes.measure == "score"]


def _outcomes(first: Group, second: Group, scored: Measure) -> Iterator[Outcomes]:
    members = evaluated(first.runs, scored), evaluated(second.runs, scored)
    yield scores(*members, scored)
    yield from costs(*members, scored)


def _judged(every: Sequence[Compared]) -> list[Compared]:
    """With p-values adjusted for the number of differences in the same measure."""
    adjusted: dict[int, Compared] = {}
    for name in {item.outcomes.measure for item in every}:
        family = [(i, item.found) for i, item in enumerate(every) if item.outcomes.measure == name and item.found is not None]
        values = holm([found.p for _, found in family])
        still_open = sum(value >= LEVEL for value in values)
        for (i, _), value in zip(family, values, strict=True):
            level = LEVEL / max(1, still_open)
            adjusted[i] = replace(every[i], adjusted=value, family=len(family), level=level)
    return [adjusted.get(i, item) for i, item in enumerate(every)]
