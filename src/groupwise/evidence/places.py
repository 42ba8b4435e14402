"""Which runs a path means: a run, a ladder (`groupwise ablate`), or a directory with either in it."""

import stat
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path

from groupwise.errors import UserError

MOST_ENTRIES = 10_000
"""Directories in which runs are looked for at most."""
DEEPEST = 3
"""How far below a directory runs are looked for: those of a ladder are two below it, and it may be in a directory of runs."""
RECORDS = ("metrics.jsonl", "segments.jsonl", "rollouts")
"""What a run has besides its settings, from its beginning on."""


def is_run(path: Path) -> bool:
    """Whether a directory is that of a run: it has settings, and records or the beginning of them."""
    names = [name for name in ("recipe.toml", *RECORDS) if _mode(path / name)]
    return "segments.jsonl" in names or (len(names) > 1 and names[0] == "recipe.toml")


def is_directory(path: Path) -> bool:
    """Whether it is one, as far as one may look."""
    return stat.S_ISDIR(_mode(path))


def _mode(path: Path) -> int:
    """What a path is; 0: nothing, or it cannot be read, where `Path.exists` raises."""
    try:
        return path.stat().st_mode
    except (OSError, ValueError):
        return 0


def runs_in(path: Path, most: int = MOST_ENTRIES) -> list[Path]:
    """The runs that a path means: itself, or those in it, those of a ladder in the order of its rungs, else by name.

    Empty: there are none (yet). Directories that cannot be read have none.
    """
    return list(islice(_runs(path, DEEPEST, count(MOST_ENTRIES, -1)), most))


def _runs(path: Path, deeper: int, left: Iterator[int]) -> Iterator[Path]:
    """`left`: counts how many entries may still be looked at."""
    if is_run(path):
        yield path
    elif deeper:
        for inner in _directories(path):
            if next(left) < 0:
                return
            yield from _runs(inner, deeper - 1, left)


def _directories(path: Path) -> Iterator[Path]:
    try:
        entries = [entry for entry in islice(path.iterdir(), MOST_ENTRIES) if not entry.name.startswith(".")]
        yield from (entry for entry in sorted(entries, key=_by_number) if is_directory(entry))
    except OSError:
        return


def _by_number(path: Path) -> tuple[int, str]:
    """`10-name` comes after `9-name`, and `seed-10` after `seed-9`."""
    numbers = [part for part in path.name.split("-") if part.isdecimal() and len(part) < 10]
    return int(numbers[0]) if numbers else 0, path.name


def expanded(paths: Iterable[Path]) -> list[Path]:
    """Each path replaced by the runs that it means; one that means none stays, so that whoever opens it says what is wrong.

    Raises:
        UserError: a directory that is there and is not empty, with no run in it.
    """
    found: list[Path] = []
    for path in paths:
        runs = runs_in(path)
        if not runs and is_directory(path) and not _mode(path / "recipe.toml") and any(_directories(path)):
            raise UserError(f"{path}: neither a run (it has no recipe.toml) nor a directory with runs in it")
        found += runs or [path]
    return found


def unique(paths: Iterable[Path]) -> Sequence[Path]:
    """Each directory once, however it was named."""
    return list({path.resolve(): path for path in paths}.values())
