"""Read run directories, and group runs by their settings."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from groupwise.errors import UserError
from groupwise.evidence.history import Noted, Segment, course, read_events, read_segments
from groupwise.evidence.reading import LeftOut, read_recipe, read_tokens
from groupwise.evidence.records import EVALUATED, TRAINED, Metrics, Records, Steps, Values, read_metrics
from groupwise.evidence.statistics import LEVEL, binomial, wilson
from groupwise.evidence.student import critical


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What held-out results are measured by: the pass rate where the task says what is right, else the mean reward."""

    key: str
    """Its metric."""
    name: str
    """In a sentence, after "held-out"."""
    percent: bool
    """Whether it is a share."""

    def text(self, value: float) -> str:
        """A value of it, for a person to read."""
        return (f"{value:.1%}" if self.percent else f"{value:.3g}").replace("-", "−")

    def noise(self, score: float, problems: int, spread: float) -> float:
        """Half the width of the 95 % interval of one evaluation: which other scores as many problems of the same kind could give.

        Args:
            spread: the standard deviation over problems, which a pass rate does not need.
        """
        if self.percent:
            return binomial(score, problems)
        return critical(LEVEL, max(1, problems - 1)) * spread / math.sqrt(problems)

    def ends(self, score: float, problems: int, spread: float) -> tuple[float, float]:
        """The ends of that interval; of a pass rate they are not equally far from it, and lie in 0 to 1."""
        if self.percent:
            return wilson(score, problems)
        half = self.noise(score, problems, spread)
        return score - half, score + half


SCORE_KEYS = ("task.", "environment.", "training.eval_problems")
"""Beginnings of the settings that decide of what problems and on what scale a held-out score is."""
PASS_RATE = Measure(key=EVALUATED[0], name="pass@1", percent=True)
MEAN_REWARD = Measure(key=EVALUATED[1], name="mean reward", percent=False)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The recipe and the metrics that a run recorded, and access to its tokens."""

    path: Path
    recipe: dict[str, Any]
    steps: Records
    """One record per training step."""
    evaluations: Records
    """One record per evaluation; step 0 is the base model."""
    segments: list[Segment] = field(default_factory=list)
    """How it was started and resumed; empty: not recorded, and `recipe` is that of all steps."""
    events: list[Noted] = field(default_factory=list)
    """What it noted on its way."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """What could not be read."""

    @cached_property
    def resolved(self) -> str:
        """Its path, without links."""
        return str(self.path.resolve())

    @property
    def last_step(self) -> int:
        """The last step that is recorded; 0: none."""
        return self.steps.last_step

    @property
    def course(self) -> dict[str, str]:
        """Settings that changed results and were changed on the way, by dotted key, as text."""
        return course(self.segments, self.last_step)

    @property
    def seed(self) -> int:
        return int(self.recipe.get("seed", 0))

    @property
    def algorithm(self) -> str:
        return str(self.recipe.get("algorithm", {}).get("name", "?"))[:60]

    @property
    def measure(self) -> Measure:
        """What its held-out results are measured by."""
        return measure([self])

    def column(self, name: str) -> tuple[Steps, Values]:
        """The steps that have the metric, ascending, and its values: one each, or one row of bins each. Copy them to change them."""
        return (self.evaluations if name.startswith(("eval/", "eval_")) else self.steps).column(name)

    def scores(self, name: str) -> tuple[Steps, Values]:
        """As `column`, of the evaluations that can be compared with the last one: those since a resume last changed what is scored."""
        steps, values = self.column(name)
        changed = [segment.first_step for segment in self.segments if any(key.startswith(SCORE_KEYS) for key in segment.changed)]
        since = steps >= max((step for step in changed if step <= self.evaluations.last_step), default=0)
        return steps[since], values[since]

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of each record that has the metric."""
        steps, values = self.column(name)
        return list(zip(steps.tolist(), values.tolist(), strict=True))

    def values(self, name: str) -> list[float]:
        found: list[float] = self.column(name)[1].tolist()
        return found

    def last(self, name: str, count: int = 5) -> float:
        """The mean of the last `count` values; NaN if there are none."""
        values = self.column(name)[1][-count:]
        return float(values.mean()) if len(values) else math.nan

    def first(self, name: str, count: int = 3) -> float:
        """The mean of the first `count` values; NaN if there are none."""
        values = self.column(name)[1][:count]
        return float(values.mean()) if len(values) else math.nan

    def total(self, name: str) -> list[float]:
        """A binned metric summed over the steps: one number per bin."""
        values = self.column(name)[1]
        found: list[float] = values.sum(axis=0).tolist() if len(values) else []
        return found

    def spent(self) -> tuple[Steps, Values, Values]:
        """Completions generated, and seconds of rollouts and learner, from the start to the end of each step; 0 at step 0."""
        steps, rollouts = self._known("rollouts/completions")
        seconds = self._known("seconds/rollouts")[1] + self._known("seconds/learner")[1]
        return np.append(0, steps), np.append(0.0, rollouts.cumsum()), np.append(0.0, seconds.cumsum())

    def _known(self, name: str) -> tuple[Steps, Values]:
        """All training steps, and a metric's value in each, 0 where it is not known."""
        steps = self.steps.column(TRAINED)[0]
        known, values = self.steps.column(name)
        if len(known) == len(steps):
            return steps, values
        found = np.zeros(len(steps))
        found[np.searchsorted(steps, known)] = values
        return steps, found

    def token_steps(self) -> list[int]:
        """The steps whose tokens were recorded, ascending."""
        names = [re.fullmatch(r"step-(\d{6,12})", path.stem) for path in (self.path / "tokens").glob("step-*.parquet")]
        return sorted(int(name[1]) for name in names if name)

    def tokens(self, step: int) -> pa.Table:
        """The tokens of a step; see `read_tokens`.

        Raises:
            UserError: the file is missing or damaged, or lacks a column.
        """
        return read_tokens(self.path / "tokens" / f"step-{step:06d}.parquet")

    def readable_tokens(self, step: int) -> pa.Table | None:
        """The tokens of a step; None, and a note in `left_out`: they cannot be read."""
        try:
            return self.tokens(step)
        except UserError as error:
            self.note(error)
            return None

    def note(self, error: UserError) -> None:
        """Take into `left_out` what could not be read."""
        text = str(error).removeprefix(f"{self.path}/")
        if text not in list(self.left_out):
            file, _, reason = text.partition(": ")
            self.left_out.add(file, reason)


def open_run(path: Path) -> Run:
    """Read the run in a directory, as far as it can be read; metrics of earlier versions get their present names.

    Raises:
        UserError: the directory holds no run, or nothing in it can be read that says with which settings it was trained.
    """
    check_run(path)
    left_out = LeftOut()
    metrics, events = read_metrics(path / "metrics.jsonl", left_out), read_events(path / "events.jsonl", left_out)
    return assembled(path, read_settings(path, left_out), metrics, events, left_out)


def check_run(path: Path) -> None:
    """
    Raises:
        UserError: the directory holds no run.
    """
    if not (path / "recipe.toml").is_file() and not any(
        segment.recipe for segment in read_segments(path / "segments.jsonl", LeftOut())
    ):
        raise UserError(f"{path}: not a run directory: it has no recipe.toml")
    # A run makes rollouts/ with its recipe, and its metrics after the first evaluation.
    if not (path / "metrics.jsonl").is_file() and not (path / "rollouts").is_dir():
        raise UserError(f"{path}: not a run directory: it has no metrics.jsonl")


def read_settings(path: Path, left_out: LeftOut) -> tuple[dict[str, Any], list[Segment]]:
    """The recipe of the run in a directory, and how it was started and resumed.

    Raises:
        UserError: nothing in it can be read that says with which settings it was trained.
    """
    segments = read_segments(path / "segments.jsonl", left_out)
    return read_recipe(path / "recipe.toml", left_out, [segment.recipe for segment in segments if segment.recipe]), segments


def assembled(
    path: Path, settings: tuple[dict[str, Any], list[Segment]], metrics: Metrics, events: list[Noted], left_out: LeftOut
) -> Run:
    """A run of which everything is read."""
    tree, segments = settings
    done = [segment.recipe for segment in segments if segment.recipe and segment.first_step <= metrics.steps.last_step]
    return Run(
        path=path,
        recipe=dict(done[-1]) if done else tree,  # a resume that did no step yet has written its settings already
        steps=metrics.steps,
        evaluations=metrics.evaluations,
        segments=segments,
        events=events,
        left_out=left_out,
    )


def measure(runs: Iterable[Run]) -> Measure:
    """What the held-out results of all these runs can be measured by."""
    graded = any(run.values(MEAN_REWARD.key) and not run.values(PASS_RATE.key) for run in runs)
    return MEAN_REWARD if graded else PASS_RATE


def finite(values: Iterable[float | None]) -> list[float]:
    """The values without None, NaN and infinities."""
    return [value for value in values if value is not None and math.isfinite(value)]
