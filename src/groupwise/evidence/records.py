"""A run's metrics as columns, which grow as metrics.jsonl does: figures of 100,000 steps are drawn from arrays."""

import bisect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from groupwise.algorithms.diagnostics import LENGTH_EDGES, PROBABILITY_EDGES
from groupwise.errors import short
from groupwise.evidence.reading import LeftOut, number, read_objects, step_of

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
FIRST_ROWS = 64

Steps = NDArray[np.int64]
Values = NDArray[np.float64]


class _Column:
    """One metric: a number for each record, or a row of bins; NaN where a record lacks it. What no record has reached is not filled."""

    def __init__(self, bins: int) -> None:
        self.values: Values = np.empty((FIRST_ROWS, bins) if bins else FIRST_ROWS)
        self.filled = 0

    def put(self, row: int, value: float | Sequence[float]) -> None:
        """Set a row that is not before the ones that are filled."""
        if row >= len(self.values):
            larger = np.empty((max(row + 1, 2 * len(self.values)), *self.values.shape[1:]))
            larger[: self.filled] = self.values[: self.filled]
            self.values = larger
        self.values[self.filled : row] = np.nan
        self.values[row] = value
        self.filled = row + 1

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
        self._as_array: Steps | None = None
        """`_steps`, until another record comes."""
        self._columns: dict[str, _Column] = {}
        self._ordered = True
        for record in records:
            self.append(record["step"], {key: value for key, value in record.items() if key != "step" and value is not None})

    def append(self, step: int, metrics: Mapping[str, float | Sequence[float]]) -> None:
        """Add a record; it takes the place of an earlier one of the same step.

        Args:
            metrics: numbers that are finite, and lists of bins.
        """
        self._ordered = self._ordered and (not self._steps or step > self._steps[-1])
        row = len(self._steps)
        self._steps.append(step)
        self._as_array = None
        for name, value in metrics.items():
            column = self._columns.get(name)
            if column is None:
                column = self._columns[name] = _Column(len(value) if isinstance(value, Sequence) else 0)
            column.put(row, value)

    def truncate(self, last: int) -> None:
        """Forget the records of the steps after `last`, which a resumed run does again."""
        self._order()
        rows = bisect.bisect_right(self._steps, last)
        del self._steps[rows:]
        self._as_array = None
        for column in self._columns.values():
            column.filled = min(column.filled, rows)

    def names(self) -> list[str]:
        """Of the metrics that a record has, in the order in which they were first seen."""
        return [name for name, column in self._columns.items() if column.filled]

    def column(self, name: str) -> tuple[Steps, Values]:
        """The steps of the records that have the metric, and its values: one each, or one row of bins each.

        Returns:
            Arrays of their own, which later records do not change.
        """
        self._order()
        column = self._columns.get(name)
        if column is None:
            return np.empty(0, dtype=np.int64), np.empty(0)
        values = column.first(len(self._steps))
        known = ~np.isnan(values if values.ndim == 1 else values[:, 0])
        if self._as_array is None:
            self._as_array = np.array(self._steps, dtype=np.int64)
        return self._as_array[known], values[known]

    def _order(self) -> None:
        """Have the steps ascend, each once, with its latest record."""
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
        self._order()
        return len(self._steps)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        self._order()
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

    def add(self, found: Mapping[str, Any], left_out: LeftOut, file: str = "metrics.jsonl", line: int = 0) -> None:
        """Add one object of metrics.jsonl, with present names; what is not a number or a list of bins is noted in `left_out`."""
        step = step_of(found.get("step"))
        if step is None:
            left_out.add(file, "has no step", line)
            return
        record: dict[str, float | Sequence[float]] = {}
        for key, value in found.items():
            if key == "step" or value is None:
                continue
            key = sys.intern(RENAMED.get(key, key))  # one copy of each name, however many steps there are
            if _is_bins(key):
                if _fits(key, value):
                    record[key] = value
                    continue
            elif type(value) is float or type(value) is int:
                if number(value) is not None:
                    record[key] = float(value)
                continue
            elif isinstance(value, list) and all(number(item) is not None for item in value):
                continue  # a list that no figure shows
            left_out.add(file, f"{short(key)} is not what this version knows: {short(value, 40)}", line)
        if TRAINED in record:
            self.steps.append(step, record)
        if any(name in record for name in EVALUATED):
            self.evaluations.append(step, record)

    def truncate(self, last: int) -> None:
        """Forget what comes after a step, which a resumed run does again."""
        self.steps.truncate(last)
        self.evaluations.truncate(last)


def _is_bins(key: str) -> bool:
    return key.startswith(tuple(BINS))


def _fits(key: str, value: Any) -> bool:
    """Whether a binned metric is a list of as many numbers as it has bins."""
    count = next(count for beginning, count in BINS.items() if key.startswith(beginning))
    return isinstance(value, list) and len(value) == count and all(number(item) is not None for item in value)


def read_metrics(path: Path, left_out: LeftOut) -> Metrics:
    """The records of metrics.jsonl; none if there is no such file."""
    metrics = Metrics()
    for line, found in read_objects(path, left_out):
        metrics.add(found, left_out, path.name, line)
    return metrics
