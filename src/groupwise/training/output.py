"""Standard output and standard error of a run, which goes on without them."""

import contextlib
import io
import os
import sys
from typing import IO, Any, Literal, cast

from groupwise.terminal import Terminal


class Output(io.TextIOBase):
    """A standard stream, given up for good once it cannot be written to: a pipe whose reader is gone, a terminal that was closed,
    a full disk."""

    def __init__(self, name: Literal["stdout", "stderr"]) -> None:
        self.name = name
        self._lost: Any = None

    @property
    def stream(self) -> Any:
        """The stream as it is now: tests, notebooks and a live display put others in its place."""
        stream = getattr(sys, self.name)
        return getattr(stream, "rich_proxied_file", stream)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self.stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        stream = self.stream
        return stream is not None and stream is not self._lost and bool(stream.isatty())

    def fileno(self) -> int:
        if self.stream is None:
            raise OSError(f"{self.name} is closed")
        return int(self.stream.fileno())

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, method: str, *arguments: str) -> None:
        stream = self.stream
        if stream is None or stream is self._lost:
            return
        try:
            getattr(stream, method)(*arguments)
        except UnicodeError:
            raise
        except (OSError, ValueError):  # ValueError: it was closed
            self._lost = stream


def make_console(name: Literal["stdout", "stderr"] = "stdout", *, quiet: bool = False) -> Terminal:
    """A console on a standard stream that can be lost."""
    return Terminal(file=cast(IO[str], Output(name)), quiet=quiet, stderr=name == "stderr")


def close_outputs() -> None:
    """Flush the standard streams. One that fails is put on /dev/null: Python would flush it again at its exit, and fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
