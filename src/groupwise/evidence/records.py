"""A run's metrics as columns, which grow as metrics.jsonl does: figures of 100,000 steps are drawn from arrays."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from groupwise.algorithms.diagnostics import LENGTH_EDGES, PROBABILITY_EDGES
from groupwise.errors import short
from groupwise.evidence.reading import LeftOut, read_objects, step_of

RENAMED = {
    "groups/dead": "groups/zero_variance",
    "dropped/uniform": "dropped/zero_variance",
    "seconds/annotate": "seconds/logprobs",
}
"""Metric name of earlier versions -> metric name now."""
BINS = {"by_probability/": len(PROBABILITY_EDGES) + 1, "by_length/": len(LENGTH_EDGES) + 1}
"""Beginning of the name of a binned metric -> how many bins it has."""
TRAINED = "reward/mean"
"""What every training step has, and no evaluation."""
EVALUATED = ("eval/pass@1", "eval/reward")
"""Of which every evaluation has one."""
SHARE = EVALUATED[0]
"""It is drawn and compared as one, and must lie in 0 to 1."""
BLOCK = 512
"""How many records are kept as dictionaries until they are moved to the columns together, which is five times as fast as one by one."""
LARGEST = 1e300

Steps = NDArray[np.int64]
Values = NDArray[np.float64]
Metric = float | list[float]
"""A number, or a list of bins."""


class _Column:
    """One metric: a number for each record, or a row of bins; NaN where a record lacks it. What no record has reached is not filled."""

    def __init__(self, bins: int) -> None:
        self.bins = bins
        self.values: Values = np.empty((BLOCK, bins) if bins else BLOCK)
        self.filled = 0

    def put(self, row: int, name: str, records: Sequence[Mapping[str, Metric]]) -> None:
        """Set the rows from `row` on, which is not before what is filled, to what the records have."""
        end = row + len(records)
        if end > len(self.values):
            larger = np.empty((max(end, 2 * len(self.values)), *self.values.shape[1:]))
            larger[: self.filled] = self.values[: self.filled]
            self.values = larger
        self.values[self.filled : row] = np.nan
        unknown: Metric = [math.nan] * self.bins if self.bins else math.nan
        self.values[row:end] = [record.get(name, unknown) for record in records]
        self.filled = end

    def first(self, rows: int) -> Values:
        """The values of the first `rows` records, a copy."""
        found = np.full((rows, *self.values.shape[1:]), np.nan)
        found[: self.filled] = self.values[: self.filled]
        return found


class Records(Sequence[dict[str, Any]]):
    """Records of steps, ascending by step and each step once. As a sequence it gives each record as a dictionary."""

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        """
        Args:
            records: each with a "step", numbers, and lists of bins; None: not known.
        """
        self._steps: list[int] = []
        self._columns: dict[str, _Column] = {}
        self._latest: list[tuple[int, Mapping[str, Metric]]] = []
        """Records that are not in the columns yet."""
        self._ordered = True
        self._found: dict[str, tuple[Steps, Values]] = {}
        """The columns that were asked for, until another record comes."""
        self._as_array: Steps | None = None
        """`_steps`, until another record comes."""
        for record in records:
            self.append(record["step"], {key: value for key, value in record.items() if key != "step" and value is not None})

    def append(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Add a record; it takes the place of an earlier one of the same step.

        Args:
            metrics: numbers that are finite, and lists of bins; they are kept.
        """
        self._latest.append((step, metrics))
        self._found.clear()
        if len(self._latest) == BLOCK:
            self._settle()

    def names(self) -> list[str]:
        """Of the metrics that a record has, in the order in which they were first seen."""
        self._settle()
        return [name for name, column in self._columns.items() if column.filled]

    def column(self, name: str) -> tuple[Steps, Values]:
        """The steps of the records that have the metric, and its values: one each, or one row of bins each.

        Returns:
            Arrays that cannot be written to, and that later records do not change.
        """
        self._settle()
        found = self._found.get(name)
        if found is None:
            found = self._found[name] = self._column(name)
        return found

    def _column(self, name: str) -> tuple[Steps, Values]:
        column, count = self._columns.get(name), len(self._steps)
        if column is None:
            steps, values = np.empty(0, dtype=np.int64), np.empty(0)
        else:
            steps, values = self._all_steps(), column.values[:count] if column.filled == count else column.first(count)
        known = ~np.isnan(values if values.ndim == 1 else values[:, 0])
        if not known.all():
            steps, values = steps[known], values[known]
        values = values.view()
        values.flags.writeable = steps.flags.writeable = False
        return steps, values

    def _all_steps(self) -> Steps:
        if self._as_array is None:
            self._as_array = np.array(self._steps, dtype=np.int64)
        return self._as_array

    @property
    def last_step(self) -> int:
        """Of the last record; 0: there is none."""
        self._settle()
        return self._steps[-1] if self._steps else 0

    def _settle(self) -> None:
        """Have all records in the columns, by ascending step, each step once with its latest record."""
        if self._latest:
            records = [metrics for _, metrics in self._latest]
            for name in dict.fromkeys(name for metrics in records for name in metrics):
                if name not in self._columns:
                    value = next(metrics[name] for metrics in records if name in metrics)
                    self._columns[name] = _Column(len(value) if isinstance(value, list) else 0)
                self._columns[name].put(len(self._steps), name, records)
            steps = [step for step, _ in self._latest]
            self._ordered = self._ordered and all(a < b for a, b in itertools.pairwise([*self._steps[-1:], *steps]))
            self._steps += steps
            self._latest, self._as_array = [], None
        if self._ordered:
            return
        latest = {step: row for row, step in enumerate(self._steps)}
        rows = [latest[step] for step in sorted(latest)]
        for column in self._columns.values():
            column.values = column.first(len(self._steps))[rows]
            column.filled = len(rows)
        self._steps = [self._steps[row] for row in rows]
        self._as_array, self._ordered = None, True

    def __len__(self) -> int:
        self._settle()
        return len(self._steps)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        self._settle()
        if isinstance(index, slice):
            return [self._record(row) for row in range(len(self._steps))[index]]
        return self._record(range(len(self._steps))[index])

    def _record(self, row: int) -> dict[str, Any]:
        found = {name: column.values[row] for name, column in self._columns.items() if row < column.filled}
        known = {name: value for name, value in found.items() if not np.isnan(value).any()}
        return {"step": self._steps[row], **{name: value.tolist() for name, value in known.items()}}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[row] for row in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # it changes


class Metrics:
    """The training steps and the evaluations of a run."""

    def __init__(self) -> None:
        self.steps, self.evaluations = Records(), Records()
        self._known: dict[str, tuple[str, int]] = {}
        """Key in the file -> present name of the metric, one copy however many steps there are, and how many bins it has."""

    def add(self, found: Mapping[str, Any], left_out: LeftOut, file: str = "metrics.jsonl", line: int = 0) -> None:
        """Add one object of metrics.jsonl, with present names; what is not a number or a list of bins is noted in `left_out`."""
        step = step_of(found.get("step"))
        if step is None:
            left_out.add(file, "has no step", line)
            return
        record: dict[str, Metric] = {}
        for key, value in found.items():
            known = self._known.get(key)
            if known is None:
                known = self._known[key] = (
                    RENAMED.get(key, key),
                    next((count for name, count in BINS.items() if key.startswith(name)), 0),
                )
            name, bins = known
            if value is None or key == "step":
                continue
            if not bins and type(value) in (float, int):
                if name == SHARE and not 0 <= value <= 1:
                    left_out.add(file, f"{name} is no share: {short(value, 40)}", line)
                elif -LARGEST < value < LARGEST:  # one that is not finite is not known
                    record[name] = float(value)
            elif bins and _is_numbers(value) and len(value) == bins:
                record[name] = value
            elif bins or not _is_numbers(value):
                left_out.add(file, f"{short(name)} is not what this version knows: {short(value, 40)}", line)
        if TRAINED in record:
            self.steps.append(step, record)
        if any(name in record for name in EVALUATED):
            self.evaluations.append(step, record)


def _is_numbers(value: Any) -> bool:
    """Whether it is a list of finite numbers."""
    if not isinstance(value, list) or not {*map(type, value)} <= {float, int}:
        return False
    return not value or (min(value) > -LARGEST and max(value) < LARGEST and not math.isnan(sum(value)))


def read_metrics(path: Path, left_out: LeftOut) -> Metrics:
    """The records of metrics.jsonl; none if there is no such file."""
    metrics = Metrics()
    for line, found in read_objects(path, left_out):
        metrics.add(found, left_out, path.name, line)
    return metrics
