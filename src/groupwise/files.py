"""Files that survive a kill, a power cut and a full disk: written beside the old ones, flushed to the disk, then renamed.

Names that begin with a dot are being written or about to go; whoever reads a directory passes them over.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from groupwise.errors import RunError, UserError

PARTIAL, REPLACED, REMOVED = ".partial-", ".replaced-", ".removed-"
"""What is being written, what was there before it, and what is being removed."""
CHUNK = 2**22
"""Bytes that are read at once."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What a file system that knows no locks says."""


class DiskError(RunError):
    """Something could not be written: the disk is full or read-only, or a quota or a permission is in the way."""


@dataclass(frozen=True, slots=True)
class Digest:
    """What a file holds."""

    bytes: int
    sha256: str


class Hashed:
    """A file to be written whose content is hashed on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self._hash = file, 0, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        self.file.write(view)
        self._hash.update(view)
        self.size += len(view)

    @property
    def digest(self) -> Digest:
        return Digest(self.size, self._hash.hexdigest())


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the system says when `path` cannot be written into one message.

    Raises:
        DiskError: within, something could not be written.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = ". What was there before is as it was; free some space, and go on" if full else ""
        raise DiskError(f"{path}: cannot be written: {error.strerror or error}{hint}") from error


# --- one file


@contextmanager
def written(path: Path, *, durable: bool = True) -> Iterator[Hashed]:
    """A file to write; on the disk at the end. If writing fails, nothing stays of it.

    Raises:
        DiskError: it cannot be written.
    """
    with explained(path):
        try:
            with path.open("wb") as file:
                yield Hashed(file)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                path.unlink()  # it would take up room on a disk that may be full
            raise


def write_atomically(path: Path, data: bytes | str, *, durable: bool = True) -> None:
    """Replace the file: whenever the process is killed, `path` is what it was or holds all of `data`.

    Args:
        durable: whether that holds for a power cut too.

    Raises:
        DiskError: it cannot be written, and is as it was.
    """
    partial = path.with_name(PARTIAL + path.name)
    with written(partial, durable=durable) as file:
        file.write(data.encode() if isinstance(data, str) else data)
    move(partial, path, durable=durable)


def move(partial: Path, path: Path, *, durable: bool = True) -> None:
    """Give a finished file or directory its name."""
    with explained(path):
        partial.replace(path)
        if durable:
            sync_directory(path.parent)


def sha256(path: Path) -> Digest:
    """The size and the hash of a file.

    Raises:
        OSError: it cannot be read.
    """
    found, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            found.update(block)
            size += len(block)
    return Digest(size, found.hexdigest())


def sync(path: Path) -> None:
    """Have a file, or the names in a directory, on the disk."""
    with explained(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some file systems cannot flush a directory
                raise
        finally:
            os.close(descriptor)


sync_directory = sync


# --- directories


def sync_tree(directory: Path) -> None:
    """Have everything in a directory on the disk."""
    for path in sorted(directory.rglob("*")):
        if not path.is_symlink():
            sync(path)
    sync_directory(directory)


def put_directory(new: Path, final: Path) -> None:
    """Put a finished directory, which is on the disk already, in place of another, which is removed only then.

    Killed between the two renames it leaves `.replaced-NAME` alone, which `present` finds, and `recover` gives its name back.
    """
    replaced = final.with_name(REPLACED + final.name)
    with explained(final):
        if final.exists():
            remove(replaced)
            final.replace(replaced)
        new.replace(final)
        sync_directory(final.parent)
    with suppress(DiskError):  # the new one is in place; what is left has no name that counts, and a resume clears it
        remove(replaced)


def present(path: Path) -> Path:
    """Where the content of a directory is that may be about to be replaced."""
    replaced = path.with_name(REPLACED + path.name)
    return replaced if not path.exists() and replaced.exists() else path


def remove(path: Path) -> None:
    """Remove a directory so that no half of it ever stands under its name."""
    if not path.is_dir() or path.is_symlink():
        return
    with explained(path):
        going = path if path.name.startswith(".") else path.with_name(REMOVED + path.name)
        if going != path:
            shutil.rmtree(going, ignore_errors=True)
            path.replace(going)
        shutil.rmtree(going)


def recover(directory: Path) -> None:
    """Clear what a killed process was writing or removing in a directory, and give back its name to what it was replacing.

    Only for the process that alone writes there.
    """
    if not directory.is_dir():
        return
    with explained(directory):
        for path in sorted(directory.iterdir()):
            final = path.with_name(path.name.removeprefix(REPLACED))
            if path.name.startswith(REPLACED) and not final.exists():
                path.replace(final)
            elif path.name.startswith((PARTIAL, REPLACED, REMOVED)):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


# --- one process at a time


class Lock:
    """The right to write in a directory, which one process has at a time, and which goes with it."""

    def __init__(self, directory: Path) -> None:
        """Raises:
        UserError: another process has it.
        DiskError: the directory cannot be written.
        """
        self.warning = ""
        """What a person should know: why there is no lock."""
        path = directory / ".lock"
        with explained(path):
            # Not inherited by processes that this one starts, which may outlive it.
            self.file: IO[Any] | None = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = self.file.read(200).strip() or "unknown"
            self.close()
            raise UserError(f"another process ({owner}) trains in {directory}") from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise DiskError(f"{path}: cannot be locked: {error.strerror}") from error
            self.warning = f"{directory}: its file system has no locks, so nothing keeps a second process from training there"
        with explained(path):
            self.file.truncate(0)
            self.file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
            self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            with suppress(OSError):  # what could not be written of the owner's name
                self.file.close()
            self.file = None
