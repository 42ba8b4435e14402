"""What two settings achieved and what it took them, as one number for each seed: what comparisons are made of."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from groupwise.evidence.reading import step_of
from groupwise.evidence.runs import Measure, Run

WAY = 0.9
"""How much of the way from the first score to the one that every run reached the target of `costs` is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """One measure of two settings."""

    measure: Literal["score", "completions", "seconds"]
    first: dict[int, float]
    """Seed -> value, the mean over runs of the same seed; of completions and seconds the natural logarithm."""
    second: dict[int, float]
    resolution: float = 0.0
    """The smallest step that a value can make; 0: not known."""
    step: int | None = None
    """The training step after which scores are taken; None: each run's last evaluation."""
    target: float = math.nan
    """The score that completions and seconds are counted to."""


def scores(first: Sequence[Run], second: Sequence[Run], scored: Measure) -> Outcomes:
    """The held-out score of each seed: at its last evaluation where all runs have done all their steps, else after the last step after
    which all were evaluated. No seeds: there is no such step.

    Args:
        first, second: runs that are `evaluated`.
    """
    runs = [*first, *second]
    step = common_step(runs, scored)
    if step == 0:
        return Outcomes(measure="score", first={}, second={})
    return Outcomes(
        measure="score",
        first=by_seed(first, lambda run: score_at(run, scored, step)),
        second=by_seed(second, lambda run: score_at(run, scored, step)),
        resolution=_one_problem(runs, scored),
        step=step,
    )


def common_step(runs: Sequence[Run], scored: Measure) -> int | None:
    """The training step after which scores of these runs are compared: the last after which all were evaluated, 0: there is none; None:
    all have done all their steps, and each run's last evaluation is taken."""
    if runs and all(finished(run) for run in runs):
        return None
    return max(set.intersection(*(_evaluations(run, scored) for run in runs)), default=0) if runs else 0


def costs(first: Sequence[Run], second: Sequence[Run], scored: Measure) -> list[Outcomes]:
    """The completions and the seconds until each run's held-out score first reached a target that all of them reached.

    The target is nine tenths of the way from the mean first score to the lowest of the runs' best ones. Between evaluations scores are
    interpolated linearly. Nothing where a run gained no more than noise explains, or began above the target.

    Args:
        first, second: runs that are `evaluated`.
    """
    runs = [*first, *second]
    if not runs:
        return []
    columns = [run.scores(scored.key)[1] for run in runs]
    begin, reached = statistics.fmean(float(values[0]) for values in columns), min(float(values.max()) for values in columns)
    if not reached - begin > max(noise(run, scored) for run in runs):
        return []
    target = _round_down(begin + WAY * (reached - begin), scored, begin)
    found = []
    places: tuple[tuple[Literal["completions", "seconds"], int], ...] = (("completions", 1), ("seconds", 2))
    for measure, place in places:
        values = [
            by_seed(members, lambda run, place=place: _log(_until(run, scored, target, place)))  # type: ignore[misc]
            for members in (first, second)
        ]
        if all(math.isfinite(value) for of in values for value in of.values()):
            least = _cost_of_one_problem(runs, scored, target, place)
            found.append(Outcomes(measure=measure, first=values[0], second=values[1], resolution=least, target=target))
    return found


def _one_problem(runs: Iterable[Run], scored: Measure) -> float:
    """What one problem is of the smallest last evaluation's pass rate; 0: not known, or the measure is no pass rate."""
    problems = [count for run in runs if (count := problems_of(run))]
    return 1 / min(problems) if problems and scored.percent else 0.0


def _cost_of_one_problem(runs: Sequence[Run], scored: Measure, target: float, place: int) -> float:
    """By how much the logarithm of a cost changes where one problem less is asked for, the mean over runs; 0: not known."""
    nearer = target - _one_problem(runs, scored)
    changes = [_log(_until(run, scored, target, place)) - _log(_until(run, scored, nearer, place)) for run in runs]
    return statistics.fmean(known) if (known := [value for value in changes if math.isfinite(value)]) else 0.0


def evaluated(runs: Iterable[Run], scored: Measure) -> list[Run]:
    """Those that were evaluated after a training step."""
    return [run for run in runs if max(_evaluations(run, scored), default=0) > 0]


def finished(run: Run) -> bool:
    """Whether it has done all the steps of its recipe; also where the recipe does not say how many."""
    training = run.recipe.get("training")
    steps = step_of(training.get("steps") if isinstance(training, dict) else None)
    return steps is None or run.last_step >= steps


def score_at(run: Run, scored: Measure, step: int | None) -> float:
    """The held-out score after a training step; None: the last one."""
    steps, values = run.scores(scored.key)
    return float(values[-1] if step is None else values[int(np.flatnonzero(steps == step)[0])])


def problems_of(run: Run, step: int | None = None) -> int:
    """How many problems the evaluation after a step had, None: the last one; 0: not recorded."""
    count = _recorded(run, "eval_problems", step)
    return max(0, int(count)) if math.isfinite(count) else 0


def noise(run: Run, scored: Measure, step: int | None = None) -> float:
    """Half the width of the 95 % interval of the evaluation after a step, None: the last one, from its number of problems; 0: not
    recorded."""
    problems = problems_of(run, step)
    if not problems:
        return 0.0
    half = scored.noise(score_at(run, scored, step), problems, _recorded(run, "eval/reward_std", step))
    return half if math.isfinite(half) else 0.0


def ends_of(run: Run, scored: Measure, step: int | None = None) -> tuple[float, float]:
    """The ends of that interval; NaN: not recorded."""
    problems = problems_of(run, step)
    if not problems:
        return math.nan, math.nan
    return scored.ends(score_at(run, scored, step), problems, _recorded(run, "eval/reward_std", step))


def _recorded(run: Run, name: str, step: int | None) -> float:
    """A metric of the evaluation after a step, None: the last one; NaN: not recorded."""
    steps, values = run.column(name)
    values = values if step is None else values[steps == step]
    return float(values[-1]) if len(values) else math.nan


def _evaluations(run: Run, scored: Measure) -> set[int]:
    """The training steps after which it was evaluated."""
    return {step for step in run.scores(scored.key)[0].tolist() if step > 0}


def by_seed(runs: Sequence[Run], value: Callable[[Run], float]) -> dict[int, float]:
    """Runs of the same seed repeat each other more or less, and are no further seeds: they are one value."""
    values: dict[int, list[float]] = {}
    for run in runs:
        values.setdefault(run.seed, []).append(value(run))
    return {seed: statistics.fmean(of_seed) for seed, of_seed in values.items()}


def _until(run: Run, scored: Measure, target: float, place: int) -> float:
    """What was spent (1: completions, 2: seconds) until the score first reached the target; NaN: from the start, or never."""
    steps, values = run.scores(scored.key)
    spent = run.spent()
    at = np.interp(steps, spent[0], spent[place])
    above = int(np.argmax(values >= target))
    if above == 0:
        return math.nan
    share = (target - values[above - 1]) / (values[above] - values[above - 1])
    return float(at[above - 1] + share * (at[above] - at[above - 1]))


def _log(value: float) -> float:
    return math.log(value) if value > 0 else math.nan


def _round_down(target: float, scored: Measure, begin: float) -> float:
    """A round number where one is near, for a person to read."""
    rounded = math.floor(100 * target) / 100 if scored.percent else target
    return rounded if rounded > begin else target
