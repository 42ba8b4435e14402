"""Several datasets mixed by weight: the [[task.sources]] of a recipe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import gcd, lcm
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from groupwise.config import Source, explain
from groupwise.environments.hosting import Lent
from groupwise.tasks.dataset import DatasetTask
from groupwise.types import Completion, Demonstration, Problem, Score

WEIGHT = "weight"
LONGEST_CYCLE = 10_000
"""Weights are shares of a cycle of at most so many positions."""


@dataclass(frozen=True)
class Interleaving:
    """Positions dealt out to sources in the proportion of their weights, evenly over time, again and again in one cycle."""

    sources: tuple[int, ...]
    """Of each position of a cycle, whose turn it is."""
    before: tuple[int, ...]
    """Of each position of a cycle, how often that source came before it."""
    counts: tuple[int, ...]
    """How often each source comes in a cycle."""

    @classmethod
    def of(cls, weights: Sequence[float]) -> "Interleaving":
        exact = [Fraction(str(weight)) for weight in weights]
        scale = lcm(*(weight.denominator for weight in exact))
        counts = [int(weight * scale) for weight in exact]
        counts = [count // gcd(*counts) for count in counts]
        if sum(counts) > LONGEST_CYCLE:
            counts = [max(1, round(LONGEST_CYCLE * float(weight / sum(exact)))) for weight in exact]
        sources, credit, turns = [], [0] * len(counts), [0] * len(counts)
        before = []
        for _ in range(sum(counts)):  # each gains its count; the one that is owed most is next, and pays for a whole cycle
            credit = [owed + count for owed, count in zip(credit, counts, strict=True)]
            chosen = max(range(len(counts)), key=credit.__getitem__)
            credit[chosen] -= sum(counts)
            sources.append(chosen)
            before.append(turns[chosen])
            turns[chosen] += 1
        return cls(tuple(sources), tuple(before), tuple(counts))

    def at(self, position: int) -> tuple[int, int]:
        """The source at a position, and the position among those of that source."""
        cycle, place = divmod(position, len(self.sources))
        source = self.sources[place]
        return source, cycle * self.counts[source] + self.before[place]


class MixtureTask:
    """Problems of several datasets; each has its own settings, reward and held-out problems."""

    name = "dataset"

    def __init__(self, tasks: list[DatasetTask], weights: list[float]) -> None:
        self.tasks, self.weights = tasks, weights
        self.interleaving = Interleaving.of(weights)

    @classmethod
    def build(cls, settings: dict[str, Any], source: Source) -> "MixtureTask":
        """The task of a recipe's [task] with sources; the other keys of [task] hold for each source that has not its own.

        Raises:
            UserError: a source is not what it should be.
        """
        shared = {key: value for key, value in settings.items() if key != "sources"}
        tables = settings["sources"]
        if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
            raise source.error("task.sources", "expected tables, each begun with [[task.sources]]")
        tasks, weights = [], []
        for number, table in enumerate(tables):
            place = source.inside("task", f"task.sources[{number}]")
            weight = table.get(WEIGHT, 1.0)
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                raise place.error(f"task.{WEIGHT}", f"expected a number above 0, not {weight!r}")
            own = {key: value for key, value in table.items() if key != WEIGHT}
            try:
                task = DatasetTask.model_validate({**shared, **own})
            except ValidationError as error:
                raise explain(error, DatasetTask, place, "task.") from error
            task.open(place, Path(source.path).parent)
            tasks.append(task)
            weights.append(float(weight))
        for task in tasks:
            others = [other.problems.holds_out for other in tasks if other is not task]
            task.problems.exclude(lambda key, others=others: any(holds(key) for holds in others))  # type: ignore[misc]
            if task.left_nothing():
                raise source.error("task.sources", f"every problem of {task.path} is held out in another source")
        return cls(tasks, weights)

    def problem(self, position: int, seed: int) -> Problem:
        source, place = self.interleaving.at(position)
        return replace(self.tasks[source].problem(place, seed), source=source)

    def held_out(self, count: int) -> list[Problem]:
        """In the proportion of the weights, until a source has no more."""
        queues = [iter(task.held_out(count)) for task in self.tasks]
        left = sum(len(task.held_out(count)) for task in self.tasks)
        found: list[Problem] = []
        position = 0
        while len(found) < min(count, left):
            source, _ = self.interleaving.at(position)
            position += 1
            problem = next(queues[source], None)
            if problem is not None:
                found.append(replace(problem, source=source))
        return found

    def begin_step(self, step: int, steps: int) -> None:
        for task in self.tasks:
            task.begin_step(step, steps)

    async def score(self, problem: Problem, completions: Sequence[Completion]) -> Sequence[Score]:
        return await self.tasks[problem.source].score(problem, completions)

    async def score_episodes(
        self, problem: Problem, completions: Sequence[Completion], environments: Lent | None
    ) -> Sequence[Score]:
        return await self.tasks[problem.source].score_episodes(problem, completions, environments)

    def takes_environments(self) -> Mapping[str, bool]:
        return {name: needs for task in self.tasks for name, needs in task.takes_environments().items()}

    def demonstration(self, position: int, seed: int) -> Demonstration:
        source, place = self.interleaving.at(position)
        return self.tasks[source].demonstration(place, seed)

    def model_dump(self) -> dict[str, Any]:
        tables = [{WEIGHT: weight, **task.model_dump()} for weight, task in zip(self.weights, self.tasks, strict=True)]
        return {"name": self.name, "sources": tables}
