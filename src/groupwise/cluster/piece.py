"""The processes of a run, and what starts them."""

import functools
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

QUOTED_LINES, QUOTED_BYTES = 12, 8192
"""How much of the end of a log a message quotes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A server process of a run, which may start further processes."""

    name: str
    """As people read it: "sampler 0", "learner"."""
    command: Sequence[str]
    """What to run. {python} in it becomes the interpreter that starts it; {host} and {port} the address that it is to serve at,
    new ones at every start."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Further environment variables."""
    gpus: int = 0
    processes: int = 1
    """Among how many processes that compute at the same time, itself included, the cores of its machine are divided."""

    grace: float = 0.0
    """Seconds that it has to end by itself at the end of a run: where it would leave shared memory behind."""

    @property
    def log_name(self) -> str:
        return f"{self.name.replace(' ', '-')}.log"

    def served_at(self, host: str, port: int) -> list[str]:
        """The command for an address."""
        values = {"{python}": sys.executable, "{host}": host, "{port}": str(port)}
        return [functools.reduce(lambda text, key: text.replace(key, values[key]), values, item) for item in self.command]


class Launcher(Protocol):
    """Starts the pieces of a run on machines. All of it may be called from any thread."""

    def start(self, piece: Piece) -> str:
        """Start a piece; returns its address, "http://host:port", where it will answer as soon as it is ready.

        Raises:
            RunError: it cannot be started.
        """
        ...

    def restart(self, name: str) -> str:
        """End what is left of a piece, and start it again; returns its new address.

        Raises:
            RunError: it cannot be started.
        """
        ...

    def failure(self, name: str) -> str | None:
        """What a piece ended with, and the end of its log; None while it runs."""
        ...

    def stop(self) -> None:
        """End all pieces, with everything that they started."""
        ...


def free_port(host: str = "") -> int:
    """A port on which nothing listens here."""
    with socket.socket() as found:
        found.bind((host, 0))
        port: int = found.getsockname()[1]
        return port


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


EXITED = "exit status"
"""In what `ended` says of a process that no signal has killed."""


def ended(status: int) -> str:
    """How a process ended, from its exit status."""
    return f"was killed by signal {-status}" if status < 0 else f"ended with {EXITED} {status}"


def end_of(log: Path) -> str:
    """The last lines of a log, as a message quotes them."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - QUOTED_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return f"{log} cannot be read"
    lines = text.splitlines()[-QUOTED_LINES:]
    return f"the end of {log}:" + "".join(f"\n  {line}" for line in lines)
