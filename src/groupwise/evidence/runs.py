"""Run directories, read."""

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

from groupwise.errors import UserError

TOKEN_COLUMNS = (
    "group", "row", "position", "prompt", "token", "text", "reward", "correct", "stop", "advantage", "old_logprob", "ratio", "clipped",
    "entropy",
)  # fmt: skip
"""What the pages read of a step's tokens."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run recorded."""

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

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) wherever the metric was recorded."""
        records = self.evaluations if name.startswith("eval/") else self.steps
        return [(record["step"], record[name]) for record in records if record.get(name) is not None]

    def values(self, name: str) -> list[float]:
        return [value for _, value in self.series(name)]

    def last(self, name: str, count: int = 5) -> float:
        """The mean of the last few values; NaN where there is none."""
        values = self.values(name)[-count:]
        return sum(values) / len(values) if values else math.nan

    def first(self, name: str, count: int = 3) -> float:
        values = self.values(name)[:count]
        return sum(values) / len(values) if values else math.nan

    def total(self, name: str) -> list[float]:
        """A binned metric, added up over the steps."""
        return [sum(column) for column in zip(*self.values(name), strict=True)]

    @cached_property
    def cumulative(self) -> dict[int, tuple[float, float]]:
        """Completions generated and seconds spent up to each step, from (0, 0) at step 0."""
        found, rollouts, seconds = {0: (0.0, 0.0)}, 0.0, 0.0
        for record in self.steps:
            rollouts += record.get("rollouts/completions") or 0.0
            seconds += (record.get("seconds/rollouts") or 0.0) + (record.get("seconds/learner") or 0.0)
            found[record["step"]] = (rollouts, seconds)
        return found

    def token_steps(self) -> list[int]:
        """Steps whose tokens were written."""
        names = [path.stem.removeprefix("step-") for path in (self.path / "tokens").glob("step-*.parquet")]
        return sorted(int(name) for name in names if name.isdecimal())

    def tokens(self, step: int) -> pa.Table:
        """Raises:
        UserError: the file is damaged, or not one of ours.
        """
        path = self.path / "tokens" / f"step-{step:06d}.parquet"
        try:
            return pq.read_table(path, columns=list(TOKEN_COLUMNS))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error


def open_run(path: Path) -> Run:
    """The run in a directory.

    Raises:
        UserError: there is none, or its files are damaged.
    """
    metrics, recipe = path / "metrics.jsonl", path / "recipe.toml"
    if not metrics.is_file() or not recipe.is_file():
        raise UserError(f"{path}: not a run's directory: no {'metrics.jsonl' if recipe.is_file() else 'recipe.toml'} in it")
    lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break  # the line that a kill cut short
            raise UserError(f"{metrics}, line {number}: not a record of a step") from error
        records.append(record)
    try:
        tree = tomllib.loads(recipe.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{recipe}: {error}") from error
    return Run(
        path=path,
        recipe=tree,
        steps=[record for record in records if "train/pass_rate" in record],
        evaluations=[record for record in records if "eval/pass@1" in record],
    )


def by_setting(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs that differ in nothing but their seed, together, under a name that says what sets them apart from the others.

    Runs of a ladder are together by its rungs.
    """
    runs = list({run.path.resolve(): run for run in runs}.values())  # the same one twice is no second seed
    homes = {run.path.resolve().parent.parent for run in runs}
    if len(homes) == 1 and all((home / "ladder.toml").is_file() for home in homes):
        rungs: dict[str, list[Run]] = {}
        for run in runs:
            rungs.setdefault(run.path.resolve().parent.name.split("-", 1)[-1], []).append(run)
        return rungs
    flat = [_flat(run.recipe) for run in runs]
    keys = [key for key in dict.fromkeys(key for tree in flat for key in tree) if key != "seed"]
    telling = [key for key in keys if len({str(tree.get(key)) for tree in flat}) > 1]
    groups: dict[str, list[Run]] = {}
    for run, tree in zip(runs, flat, strict=True):
        details = [f"{key.split('.', 1)[-1]} {tree[key]}" for key in telling if key in tree and key != "algorithm.name"]
        groups.setdefault(", ".join([run.algorithm, *details]), []).append(run)
    return groups


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in tree.items():
        result |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]
