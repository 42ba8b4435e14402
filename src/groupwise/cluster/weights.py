"""Where published weights lie until samplers have read them."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from groupwise import files
from groupwise.config import Recipe
from groupwise.errors import RunError, UserError
from groupwise.training.interrupts import at_forced_end
from groupwise.training.processes import spans_machines

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "groupwise-"
NAME = "weights"
"""In the run's directory."""
LOCK = ".lock"
"""In the directory; held as long as its run lives, wherever on this machine or on its shared file systems that is."""
LONGEST = 40
"""Characters of a run's name that the directory's has."""
COPIES = 3
"""Of the model's weights that there must be room for: those that samplers have, newer ones, and those that are being written."""


@contextmanager
def weights_directory(recipe: Recipe, run: Path, size: int = 0) -> Iterator[Path]:
    """A new directory for the run's published weights that only this user can read, removed at the end.

    It is in `cluster.weights`; else in shared memory where all processes see that and it has room; else in the run's directory.
    What runs that were killed left there is removed first.

    Args:
        size: bytes of the model's weights.

    Raises:
        RunError: it cannot be made.
    """
    base = base_of(recipe, run, size)
    try:
        files.make_directory(base)
        remove_stale(base)
        path, lock = new_directory(base, run.resolve().name[:LONGEST])
    except OSError as error:
        raise RunError(f"published weights cannot be written: {base} (cluster.weights): {error.strerror}") from error
    try:
        with at_forced_end(lambda: remove(path)):
            yield path
    finally:
        remove(path)
        lock.close()


def base_of(recipe: Recipe, run: Path, size: int) -> Path:
    """The directory that it is made in."""
    if recipe.cluster.weights:
        return Path(recipe.cluster.weights).resolve()
    here = not spans_machines(recipe) and os.access(SHARED_MEMORY, os.W_OK)
    if here and shutil.disk_usage(SHARED_MEMORY).free >= COPIES * size:
        return SHARED_MEMORY
    return run.resolve() / NAME


def new_directory(base: Path, name: str) -> tuple[Path, files.Lock]:
    """An empty directory, and its lock.

    Raises:
        OSError: it cannot be made.
        DiskError: it cannot be written.
    """
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{name}-", dir=base))
        with suppress(UserError):  # another run took it for one that was left, between these two lines
            lock = files.Lock(path)
            if (path / LOCK).exists():
                return path, lock
            lock.close()


def remove_stale(base: Path) -> None:
    """Remove what was left by runs that have ended: this user's directories whose lock nobody holds."""
    for path in base.glob(f"{PREFIX}*"):
        with suppress(OSError):  # it is another's, held, or gone meanwhile; or this file system has no locks
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(path)
            finally:
                os.close(descriptor)


def remove(path: Path) -> None:
    """Remove such a directory, the lock last, so that what somebody still writes there is removed later."""
    with suppress(OSError):
        for item in path.iterdir():
            if item.is_dir():
                shutil.rmtree(item, ignore_errors=True)
            elif item.name != LOCK:
                item.unlink(missing_ok=True)
        if [item.name for item in path.iterdir()] == [LOCK]:
            shutil.rmtree(path, ignore_errors=True)
