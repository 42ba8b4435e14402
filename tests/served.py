"""Samplers in processes of their own (`groupwise serve`), for tests that kill them."""

import os
import signal
import socket
from contextlib import suppress
from pathlib import Path

from tests.launcher import Launcher, Running


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


class Servers:
    """Servers of one model, forked from a process that has imported everything, so that each starts in a moment. They can be
    restarted (`groupwise.rollouts.attending.Restarts`)."""

    def __init__(self, launcher: Launcher, model: Path, logs: Path) -> None:
        self.launcher, self.model, self.logs = launcher, model, logs
        self.running: list[Running] = []
        self.reasons: list[tuple[int, str]] = []

    def start(self, count: int) -> list[str]:
        """Their addresses."""
        return [self._start(len(self.running)) for _ in range(count)]

    def start_again(self, index: int, address: str) -> None:
        """At the same address."""
        self._end(index)
        self._start(index, int(address.rpartition(":")[2]))

    def _start(self, index: int, port: int | None = None) -> str:
        port = port or free_port()
        arguments = ["serve", self.model, "--port", port]
        running = self.launcher.start(arguments, self.logs / f"server{index}.log", before=os.environ.get("DEV", ""))
        self.running[index:] = [running, *self.running[index + 1 :]]
        return f"http://127.0.0.1:{port}"

    def send(self, index: int, number: int) -> None:
        self.running[index].send(number)

    async def restart(self, index: int, reason: str) -> str:
        self.reasons.append((index, reason))
        self._end(index)
        return self._start(index)

    def ended(self, index: int) -> str | None:
        code = self.running[index].code
        return None if code is None else f"exit code {code}"

    def close(self) -> None:
        for index in range(len(self.running)):
            self._end(index)

    def _end(self, index: int) -> None:
        with suppress(ProcessLookupError):
            self.send(index, signal.SIGKILL)
        self.running[index].ends(20)
