"""Where published weights lie until samplers have read them."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from groupwise import files
from groupwise.config import Recipe
from groupwise.errors import RunError
from groupwise.training.processes import spans_machines

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "groupwise-"
NAME = "weights"
"""In the run's directory, or in `cluster.weights`."""


@contextmanager
def weights_directory(recipe: Recipe, run: Path) -> Iterator[Path]:
    """A new directory for the run's published weights, removed at the end: in shared memory where that is enough, else in
    `cluster.weights` or the run's directory. What runs that were killed left there is removed first.

    Raises:
        RunError: it cannot be made.
    """
    asked = recipe.cluster.weights
    if asked or spans_machines(recipe) or not os.access(SHARED_MEMORY, os.W_OK):
        base = Path(asked).resolve() if asked else run.resolve()
        path = base / (f"{PREFIX}{run.resolve().name}" if asked else NAME)
    else:
        remove_stale(SHARED_MEMORY)
        path = SHARED_MEMORY / f"{PREFIX}{run.resolve().name}-{os.getpid()}"
    shutil.rmtree(path, ignore_errors=True)  # the run's lock is held: nobody else writes there
    try:
        files.make_directory(path)
    except OSError as error:
        raise RunError(f"published weights cannot be written: {path}: {error.strerror}") from error
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def remove_stale(directory: Path) -> None:
    """Remove what was left by runs whose process has ended."""
    for path in directory.glob(f"{PREFIX}*-*"):
        owner = path.name.rpartition("-")[2]
        if owner.isdecimal() and path.is_dir() and not is_running(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
