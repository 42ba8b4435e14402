"""The files that a run reads from outside its directory, each with a hash, so that a resume notices one that has changed."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from groupwise import files
from groupwise.plugins import is_reference
from groupwise.tasks.base import Task, datasets_of

LARGE = 2**30
"""Bytes; of a larger file its beginning, its end and its size are hashed."""
MOST = 10_000
"""Files of one directory."""


def input_hashes(tree: Mapping[str, Any], task: Task) -> dict[str, str]:
    """sha256 by path: of the user's code that a recipe names, of datasets, and of the base model where it is a directory."""
    found: dict[str, str] = {}
    for path in sorted({*_code(tree), *_datasets(task), *model_files(tree["model"]["path"])}):
        try:
            found[str(path)] = hash_of(path)
        except OSError:  # gone since it was read, or not to be read twice, as a pipe
            continue
    return found


def hash_of(path: Path) -> str:
    """The sha256 of a file; of a large one, of its size, its first and its last MiB, each of them 64."""
    size = path.stat().st_size
    if size <= LARGE:
        return files.sha256(path).sha256
    part = 64 * 2**20
    with path.open("rb") as file:
        found = hashlib.sha256(f"{size} ".encode() + file.read(part))
        file.seek(-part, os.SEEK_END)
        found.update(file.read(part))
    return found.hexdigest()


def model_files(model: str) -> list[Path]:
    """The files of a model that is a local directory."""
    return _inside(Path(model)) if Path(model).is_dir() else []


def _code(value: Any) -> Iterator[Path]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _code(item)
    elif is_reference(value):
        path = Path(value.rpartition(":")[0])
        with suppress(OSError):  # a text too long to be a file's name
            if path.is_file():
                yield path


def _datasets(task: Task) -> Iterator[Path]:
    for dataset in datasets_of(task):
        for path in (Path(name) for name in (dataset.path, dataset.held_out_path) if name):
            if path.is_file():
                yield path
            elif path.is_dir():
                yield from _inside(path)


def _inside(directory: Path) -> list[Path]:
    found = (path for path in sorted(directory.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return [path for _, path in zip(range(MOST), found, strict=False)]
