"""The files that a run reads from outside its directory, each with a hash, so that a resume notices one that has changed."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from groupwise import files
from groupwise.models.loading import directory_of
from groupwise.plugins import is_reference
from groupwise.tasks.base import Task, datasets_of
from groupwise.training.segments import SEGMENTS

WHOLE = 4 * 2**30
"""Bytes of all files together that are hashed whole, the smallest files first; that takes seconds."""
PART = 2**17
"""Bytes at the beginning, in the middle and at the end of a larger file that are hashed, with its size."""
PARTS = "parts:"
"""How the hash of such a file begins."""
MOST = 10_000
"""Files of one directory."""


def input_hashes(tree: Mapping[str, Any], task: Task, run: Path, before: Mapping[str, str] | None = None) -> dict[str, str]:
    """sha256 by path: of the user's code that a recipe names, of datasets, and of the base model.

    The files of a model from the Hugging Face hub have the paths hub:ID/FILE.

    Args:
        tree: the settings.
        task: what the run is trained on.
        run: its directory, which may lie within one of a model or a dataset.
        before: the hashes of the run's last start, which say of what files parts are hashed.
    """
    before, left = before or {}, WHOLE
    paths = {str(path): path for path in (*_code(tree), *_datasets(task, run))} | model_files(tree["model"]["path"], run)
    found: dict[str, str] = {}
    for name, path in sorted(paths.items(), key=lambda item: (_size(item[1]), item[0])):
        left -= (size := _size(path))
        whole = not before[name].startswith(PARTS) and size <= WHOLE if name in before else left >= 0
        with suppress(OSError):  # gone since it was read, or not to be read twice, as a pipe
            found[name] = hash_of(path, whole=whole)
    return dict(sorted(found.items()))


def hash_of(path: Path, *, whole: bool) -> str:
    """The sha256 of a file, or of its size and three parts of it."""
    if whole:
        return files.sha256(path).sha256
    size = path.stat().st_size
    found = hashlib.sha256(f"{size} ".encode())
    with path.open("rb") as file:
        for start in (0, size // 2, max(0, size - PART)):
            file.seek(start)
            found.update(file.read(PART))
    return PARTS + found.hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def is_of(name: str, model: str) -> bool:
    """Whether a path of `input_hashes` is a file of a model."""
    return bool(model) and (Path(name).is_relative_to(model) or Path(name).is_relative_to(f"hub:{model}"))


def model_files(model: str, run: Path) -> dict[str, Path]:
    """The files of a model in a local directory, or in the cache of the Hugging Face hub, by their names in `input_hashes`."""
    directory = directory_of(model)
    if directory is None:
        return {}
    if directory == Path(model):
        return {str(path): path for path in _inside(directory, run)}
    return {f"hub:{model}/{path.relative_to(directory)}": path for path in _inside(directory, run)}


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


def _datasets(task: Task, run: Path) -> Iterator[Path]:
    for dataset in datasets_of(task):
        for path in (Path(name) for name in (dataset.path, dataset.held_out_path) if name):
            if path.is_file():
                yield path
            elif path.is_dir():
                yield from _inside(path, run)


def _inside(directory: Path, run: Path) -> list[Path]:
    """The files in a directory, without those of runs in it."""
    return list(islice(_walk(directory, run.resolve()), MOST))


def _walk(directory: Path, run: Path) -> Iterator[Path]:
    for place, inner, names in os.walk(directory):
        here = Path(place)
        if here.resolve() == run or (SEGMENTS in names and here != directory):
            inner.clear()
            continue
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield from (here / name for name in sorted(names) if not name.startswith(".") and (here / name).is_file())
