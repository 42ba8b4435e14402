"""Read the files of a run directory as far as they can be read, and note what is left out.

A run may be half-written, damaged, or made by another version. What cannot be used is left out of the report and named in it.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from groupwise.config import Recipe, read_toml
from groupwise.errors import UserError, short

LATEST_STEP = 2**53
TOKEN_COLUMNS = {
    "group": pa.int64(),
    "row": pa.int64(),
    "position": pa.int64(),
    "prompt": pa.string(),
    "token": pa.int64(),
    "text": pa.string(),
    "reward": pa.float64(),
    "correct": pa.bool_(),
    "stop": pa.string(),
    "advantage": pa.float64(),
    "old_logprob": pa.float64(),
    "ratio": pa.float64(),
    "clipped": pa.bool_(),
    "entropy": pa.float64(),
}
"""The columns of tokens/step-*.parquet that the pages use."""
FURTHER_COLUMNS = {"role": pa.string(), "rollout_logprob": pa.float64()}
"""Columns that runs of earlier versions lack: who said a token, and its log-probability in the sampler."""
READER_COLUMNS = {
    "answer": pa.string(),
    "reward_parts": pa.string(),
    "turn": pa.int64(),
    "low": pa.float64(),
    "high": pa.float64(),
}
"""Further columns that runs of earlier versions lack, and only whoever reads completions needs."""
ALWAYS = ("group", "row", "prompt", "text")
"""Those that no token lacks."""


class LeftOut:
    """What could not be read, by file and reason, with the first line of each."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lines: dict[tuple[str, str], int] = {}
        self.failed = False
        """Whether a file could not be read at all, as while a shared disk fails."""

    def add(self, file: str, reason: str, line: int = 0) -> None:
        self._counts[file, reason] += 1
        self._lines.setdefault((file, reason), line)

    def include(self, other: "LeftOut") -> None:
        """Add what another one has."""
        self._counts += other._counts
        self._lines = {**other._lines, **self._lines}

    def __iter__(self) -> Iterator[str]:
        for (file, reason), count in self._counts.items():
            line, more = self._lines[file, reason], f" and {count - 1:,} more" if count > 1 else ""
            yield f"{file}{f', line {line}' if line else ''}{more}: {reason}"


def read_objects(path: Path, left_out: LeftOut) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line of a .jsonl file that holds an object; none if there is no such file."""
    if not path.is_file():
        return
    name = path.name
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                value = parsed(line, name, number, left_out)
                if value is not None:
                    yield number, value
    except OSError as error:
        left_out.add(name, error.strerror or "cannot be read")
        left_out.failed = True


def parsed(line: bytes, file: str, number: int, left_out: LeftOut) -> dict[str, Any] | None:
    """The object in a line; None, and a note in `left_out`: there is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        if not line.strip() or not line.endswith(b"\n"):  # a killed run can leave its last line incomplete
            return None
        value = None
    if isinstance(value, dict):
        return value
    left_out.add(file, "not a JSON object", number)
    return None


def step_of(value: Any) -> int | None:
    """A step as an integer; None: it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < LATEST_STEP or value != int(value):
        return None
    return int(value)


def number(value: Any) -> float | None:
    """A finite number that can be drawn; None: it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
        return None
    return value


def read_recipe(path: Path, left_out: LeftOut, recorded: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """A run's settings. Tables and keys of other versions stay; a known one with an impossible value is left out.

    Args:
        recorded: the settings that segments.jsonl holds, of which the last are taken where the file cannot be read.

    Raises:
        UserError: the file cannot be read, or is not TOML, and there are no others.
    """
    try:
        tree = read_toml(path)[0] if path.exists() else {}
        wrong = "" if tree else "is empty" if path.exists() else "is missing"
    except UserError as error:
        if not recorded:
            raise
        tree, wrong = {}, str(error).removeprefix(str(path)).lstrip(":, ")[:200]
        left_out.failed = left_out.failed or isinstance(error.__cause__, OSError)
    if wrong and recorded:
        left_out.add(path.name, f"{wrong}; the settings are those that segments.jsonl holds")
        return dict(recorded[-1])
    if wrong:
        left_out.add(path.name, "is empty, so the run's settings are not known")
    return clean_recipe(tree, path.name, left_out)


def clean_recipe(tree: dict[str, Any], file: str, left_out: LeftOut) -> dict[str, Any]:
    """`tree` without known keys that have an impossible value."""
    try:
        Recipe.model_validate(tree)
    except ValidationError as error:
        for finding in error.errors():
            if finding["type"] != "extra_forbidden":
                keys = [str(part) for part in finding["loc"]]
                tree = _without(tree, keys)
                left_out.add(file, f"{'.'.join(keys[:3])} = {short(finding['input'], 40)} is not what this version knows")
    algorithm = tree.get("algorithm", {})
    if not isinstance(algorithm.get("name", ""), str):
        left_out.add(file, f"algorithm.name = {short(algorithm['name'], 40)} is not what this version knows")
        tree = {**tree, "algorithm": {key: value for key, value in algorithm.items() if key != "name"}}
    return tree


def _without(tree: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    """`tree` without the value at these keys, or without the value that they lead into."""
    if keys[0] not in tree:
        return tree
    inner = tree[keys[0]]
    if len(keys) > 1 and isinstance(inner, dict) and keys[1] in inner:
        return {**tree, keys[0]: _without(inner, keys[1:])}
    return {key: value for key, value in tree.items() if key != keys[0]}


def load_arrow() -> None:
    """Have everything loaded that tables need, pandas too where it is installed: it takes a second of a busy processor, which a live page
    does not have while a run begins."""
    import pyarrow.dataset  # noqa: F401  # pq.read_table loads it

    pc.less(pa.array([0.0]), 1.0)  # which loads pandas


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be read: {short((str(error).splitlines() or [''])[0], 200)}") from error


def token_groups(path: Path) -> list[int]:
    """The numbers of the groups in a file of tokens/, ascending.

    Raises:
        UserError: the file is missing or damaged, or lacks the column.
    """
    with _explained(path):
        column = pq.read_table(path, columns=["group"]).cast(pa.schema({"group": pa.int64()}))["group"]
    groups: list[int] = sorted(pc.unique(column.drop_null()).to_pylist())
    return groups


def read_tokens(path: Path, groups: Sequence[int] | None = None) -> pa.Table:
    """`TOKEN_COLUMNS` of a file of tokens/, and `FURTHER_COLUMNS` where they were recorded; one row per completion token.

    Numbers that are not finite are null, and so are log-probabilities above 0 and negative ratios.

    Args:
        groups: of these alone, and with `READER_COLUMNS`.

    Raises:
        UserError: the file is missing or damaged, or lacks a column.
    """
    further = FURTHER_COLUMNS if groups is None else {**FURTHER_COLUMNS, **READER_COLUMNS}
    with _explained(path):
        known = pq.read_schema(path).names
        columns = {**TOKEN_COLUMNS, **{name: kind for name, kind in further.items() if name in known}}
        table = pq.read_table(path, columns=list(columns))
        if groups is not None:  # before texts that are stored once become one for each token
            table = table.filter(pc.is_in(table["group"].cast(pa.int64()), value_set=pa.array(groups, pa.int64())))
        table = table.cast(pa.schema(columns))
    for name in ALWAYS:
        table = table.filter(pc.is_valid(table[name]))
    for name, kind in columns.items():
        if kind == pa.float64():
            column = table[name]
            sound = pc.and_(pc.is_finite(column), pc.less(pc.abs(column), 1e300))
            if name == "old_logprob":
                sound = pc.and_(sound, pc.less_equal(column, 1e-3))
            elif name == "ratio":
                sound = pc.and_(sound, pc.greater_equal(column, 0.0))
            table = table.set_column(table.column_names.index(name), name, pc.if_else(sound, column, None))
    return table
