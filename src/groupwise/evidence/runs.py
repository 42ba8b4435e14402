"""Read run directories, and group runs by their settings."""

import json
import math
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from groupwise.algorithms import NAMED, named
from groupwise.errors import UserError
from groupwise.text import shortened, visible

TOKEN_COLUMNS = (
    "group", "row", "position", "prompt", "token", "text", "reward", "correct", "stop", "advantage", "old_logprob", "ratio", "clipped",
    "entropy",
)  # fmt: skip
"""The columns of tokens/step-*.parquet that the pages use."""
FURTHER_COLUMNS = ("role", "rollout_logprob")
"""Columns that runs of earlier versions lack: who said a token, and its log-probability in the sampler."""
RENAMED = {
    "groups/dead": "groups/zero_variance",
    "dropped/uniform": "dropped/zero_variance",
    "seconds/annotate": "seconds/logprobs",
}
"""Metric name of earlier versions -> metric name now."""


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
        return f"{value:.1%}" if self.percent else f"{value:.3g}"


PASS_RATE = Measure(key="eval/pass@1", name="pass@1", percent=True)
MEAN_REWARD = Measure(key="eval/reward", name="mean reward", percent=False)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The recipe and the metrics that a run recorded, and access to its tokens."""

    path: Path
    recipe: dict[str, Any]
    steps: list[dict[str, Any]]
    """One record per training step."""
    evaluations: list[dict[str, Any]]
    """One record per evaluation; step 0 is the base model."""

    @property
    def seed(self) -> int:
        return int(self.recipe.get("seed", 0))

    @property
    def algorithm(self) -> str:
        return str(self.recipe.get("algorithm", {}).get("name", "?"))

    @property
    def measure(self) -> Measure:
        """What its held-out results are measured by."""
        return measure([self])

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of each record that has the metric."""
        records = self.evaluations if name.startswith("eval/") else self.steps
        return [(record["step"], record[name]) for record in records if record.get(name) is not None]

    def values(self, name: str) -> list[float]:
        return [value for _, value in self.series(name)]

    def last(self, name: str, count: int = 5) -> float:
        """The mean of the last `count` values; NaN if there are none."""
        values = self.values(name)[-count:]
        return sum(values) / len(values) if values else math.nan

    def first(self, name: str, count: int = 3) -> float:
        """The mean of the first `count` values; NaN if there are none."""
        values = self.values(name)[:count]
        return sum(values) / len(values) if values else math.nan

    def total(self, name: str) -> list[float]:
        """A binned metric summed over the steps: one number per bin."""
        return [sum(column) for column in zip(*self.values(name), strict=True)]

    @cached_property
    def cumulative(self) -> dict[int, tuple[float, float]]:
        """Step -> (completions generated, seconds of rollouts and learner) from the start to the end of that step; (0, 0) at step 0."""
        totals, rollouts, seconds = {0: (0.0, 0.0)}, 0.0, 0.0
        for record in self.steps:
            rollouts += record.get("rollouts/completions") or 0.0
            seconds += (record.get("seconds/rollouts") or 0.0) + (record.get("seconds/learner") or 0.0)
            totals[record["step"]] = (rollouts, seconds)
        return totals

    def token_steps(self) -> list[int]:
        """The steps whose tokens were recorded, ascending."""
        names = [path.stem.removeprefix("step-") for path in (self.path / "tokens").glob("step-*.parquet")]
        return sorted(int(name) for name in names if name.isdecimal())

    def tokens(self, step: int) -> pa.Table:
        """`TOKEN_COLUMNS` of a step, and `FURTHER_COLUMNS` where they were recorded; one row per completion token.

        Raises:
            UserError: the file is missing or damaged, or lacks a column.
        """
        path = self.path / "tokens" / f"step-{step:06d}.parquet"
        try:
            known = pq.read_schema(path).names
            return pq.read_table(path, columns=[*TOKEN_COLUMNS, *(name for name in FURTHER_COLUMNS if name in known)])
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error


def open_run(path: Path) -> Run:
    """Read the run in a directory; metrics of earlier versions get their present names.

    Raises:
        UserError: the directory holds no run, or its files are damaged.
    """
    metrics, recipe = path / "metrics.jsonl", path / "recipe.toml"
    if not metrics.is_file() or not recipe.is_file():
        raise UserError(f"{path}: not a run directory: it has no {'metrics.jsonl' if recipe.is_file() else 'recipe.toml'}")
    lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break  # A killed run can leave its last line incomplete.
            raise UserError(f"{metrics}, line {number}: not a JSON object with a step") from error
        records.append({RENAMED.get(key, key): value for key, value in record.items()})
    try:
        tree = tomllib.loads(recipe.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{recipe}: {error}") from error
    return Run(
        path=path,
        recipe=tree,
        steps=[record for record in records if "reward/mean" in record],
        evaluations=[record for record in records if PASS_RATE.key in record or MEAN_REWARD.key in record],
    )


def measure(runs: Iterable[Run]) -> Measure:
    """What the held-out results of all these runs can be measured by."""
    graded = any(run.values(MEAN_REWARD.key) and not run.values(PASS_RATE.key) for run in runs)
    return MEAN_REWARD if graded else PASS_RATE


LONGEST_NAME = 200
"""Characters of a group's name."""


def by_setting(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Group runs that differ in their seed only; each group is named by the settings in which it differs from the others.

    Runs of one ladder (`groupwise ablate`) are grouped by its rungs.
    """
    runs = list({run.path.resolve(): run for run in runs}.values())  # A path given twice is one run, not two seeds.
    ladders = {run.path.resolve().parent.parent for run in runs}
    if len(ladders) == 1 and all((ladder / "ladder.toml").is_file() for ladder in ladders):
        rungs: dict[str, list[Run]] = {}
        for run in runs:
            rungs.setdefault(run.path.resolve().parent.name.split("-", 1)[-1], []).append(run)
        return _named(rungs)
    flat = [_flat({**run.recipe, "algorithm": _own_settings(run)}) for run in runs]
    keys = [key for key in dict.fromkeys(key for tree in flat for key in tree) if key != "seed"]
    differing = [key for key in keys if len({str(tree.get(key)) for tree in flat}) > 1]
    groups: dict[str, list[Run]] = {}
    for run, tree in zip(runs, flat, strict=True):
        details = [f"{key.split('.', 1)[-1]} {tree[key]}" for key in differing if key in tree and key != "algorithm.name"]
        groups.setdefault(", ".join([run.algorithm, *details]), []).append(run)
    return _named(groups)


def _named(groups: dict[str, list[Run]]) -> dict[str, list[Run]]:
    """The groups under names that figures can draw: what differs may be a whole system prompt."""
    shown: dict[str, list[Run]] = {}
    for full, runs in groups.items():
        name = visible(shortened(full, LONGEST_NAME))
        shown[name if name not in shown else f"{name} ({len(shown) + 1})"] = runs
    return shown


def _own_settings(run: Run) -> dict[str, Any]:
    """What a run's algorithm has of its own, beside what its name says."""
    settings: dict[str, Any] = run.recipe.get("algorithm", {})
    usual = named(run.algorithm).settings() if run.algorithm in NAMED else {}
    usual = {key: list(value) if isinstance(value, tuple) else "none" if value is None else value for key, value in usual.items()}
    return {key: value for key, value in settings.items() if key not in usual or usual[key] != value}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        result |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def finite(values: Iterable[float | None]) -> list[float]:
    """The values without None, NaN and infinities."""
    return [value for value in values if value is not None and math.isfinite(value)]
