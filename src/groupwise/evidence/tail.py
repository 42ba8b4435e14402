"""Read what is appended to a file of lines of JSON, and notice when the file is another one: a resumed run rewrites what it undoes.

Works on shared disks: a file is opened for each look, after which network file systems tell its present size, and no inode number
is relied on.
"""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO

MARK = 1024
"""Bytes before the place that was reached which are compared with what was read there: lines of metrics hold seconds, and so no
two are alike."""


class Tail:
    """One file, from which each complete line is read once. The last line is complete without its end if it is an object."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reached, self.lines = 0, 0
        """Bytes and lines that were read."""
        self.problem = ""
        """Why it cannot be read."""
        self._mark = b""
        self._open = False
        """Whether the last line that was read has not had its end yet."""
        self._seen: tuple[int, ...] | None = None

    def read(self, take: Callable[[int, bytes], None], forget: Callable[[], None]) -> bool:
        """Read the complete lines that are new.

        Args:
            take: called with the number of each line, from 1, and the line.
            forget: called before that if what was read before is not in the file any more; all of it is read again.

        Returns:
            Whether either was called.
        """
        self.problem = ""
        try:
            with open(self.path, "rb", opener=_at_once) as file:
                return self._read(file, take, forget)
        except FileNotFoundError:
            gone = self.reached > 0 and self.path.parent.is_dir()  # else its disk may be gone, and what is known is kept
            if gone:
                self._begin(forget)
            return gone
        except OSError as error:
            self.problem = error.strerror or "cannot be read"
            return False

    def _read(self, file: IO[bytes], take: Callable[[int, bytes], None], forget: Callable[[], None]) -> bool:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            self.problem = "is not a file"
            return False
        seen = (found.st_ino, found.st_size, found.st_mtime_ns)
        if seen == self._seen:
            return False
        file.seek(max(0, self.reached - len(self._mark)))
        anew = file.read(len(self._mark)) != self._mark
        if anew:
            self._begin(forget)
            file.seek(0)
        before, start = self.lines, self.reached
        for line in file:
            if not line.endswith(b"\n") and not _is_object(line):  # still being written
                break
            self.reached += len(line)
            if self._open and not line.strip():
                self._open = False
                continue
            self._open = not line.endswith(b"\n")
            self.lines += 1
            take(self.lines, line)
        if self.reached > start:
            file.seek(max(0, self.reached - MARK))
            self._mark = file.read(min(MARK, self.reached))
        self._seen = seen
        return anew or self.lines > before

    def _begin(self, forget: Callable[[], None]) -> None:
        self.reached, self.lines, self._mark, self._open, self._seen = 0, 0, b"", False, None
        forget()


def _at_once(path: str, flags: int) -> int:
    """Open a file without waiting for whoever writes to it, as a named pipe would have it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _is_object(line: bytes) -> bool:
    try:
        return line.endswith(b"}") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
