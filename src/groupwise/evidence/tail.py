"""Read what is appended to a file of lines, and notice when the file is another one: a resumed run rewrites what it undoes.

Works on shared disks: a file is opened for each look, after which network file systems tell its present size, and no inode number
is relied on.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

MARK = 1024
"""Bytes before the place that was reached which are compared with what was read there: lines of metrics hold seconds, and so no
two are alike."""


class Tail:
    """One file, from which each complete line is read once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reached, self.lines = 0, 0
        """Bytes and lines that were read."""
        self.problem = ""
        """Why it cannot be read."""
        self._mark = b""
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
            with self.path.open("rb") as file:
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
        seen = (found.st_ino, found.st_size, found.st_mtime_ns)
        if seen == self._seen:
            return False
        file.seek(max(0, self.reached - len(self._mark)))
        anew = file.read(len(self._mark)) != self._mark
        if anew:
            self._begin(forget)
            file.seek(0)
        before, line = self.lines, b""
        for line in file:
            if not line.endswith(b"\n"):  # still being written
                break
            self.reached += len(line)
            self.lines += 1
            take(self.lines, line)
        if self.lines > before:
            file.seek(max(0, self.reached - MARK))
            self._mark = file.read(min(MARK, self.reached))
        self._seen = seen
        return anew or self.lines > before

    def _begin(self, forget: Callable[[], None]) -> None:
        self.reached, self.lines, self._mark, self._seen = 0, 0, b"", None
        forget()
