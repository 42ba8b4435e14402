"""Pieces of a run as processes on this machine."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO

from groupwise.cluster.piece import Piece, cores, end_of, ended, free_port
from groupwise.errors import RunError
from groupwise.workers.keeper import COMMAND
from groupwise.workers.worker import KEEPER

HOST = "127.0.0.1"
END_LIMIT = 10.0
"""Seconds in which the keeper of a piece must have ended everything."""


class HostedProcess:
    """One piece's process, bound to the life of this one by a keeper of its own."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: IO[bytes], grace: float = 0.0) -> None:
        """
        Args:
            grace: see `Piece.grace`.

        Raises:
            OSError: no process can be started.
        """
        arguments = [sys.executable, "-P", str(KEEPER), COMMAND, str(os.getpid()), str(grace), *command]
        self.keeper = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **environment},
        )

    def status(self) -> int | None:
        """What it exited with, below 0 the signal; None while it runs."""
        return self.keeper.poll()

    def end(self, *, at_once: bool) -> None:
        """Ask for the end of the process and of all that it started. `at_once`: it has no time to end by itself."""
        with suppress(ProcessLookupError):
            self.keeper.send_signal(signal.SIGQUIT if at_once else signal.SIGTERM)

    def wait(self, limit: float = END_LIMIT) -> None:
        """Wait until all of it has ended. A keeper that takes longer is killed."""
        try:
            self.keeper.wait(limit)
        except subprocess.TimeoutExpired:
            self.keeper.kill()
            self.keeper.wait()


@dataclass(slots=True)
class _Running:
    piece: Piece
    gpus: Sequence[str]
    process: HostedProcess | None = None
    starts: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    """One start at a time."""


class LocalLauncher:
    """A `Launcher` for this machine."""

    def __init__(self, logs: Path, gpus: Sequence[str] = ()) -> None:
        """
        Args:
            logs: the directory for the logs of pieces.
            gpus: those that pieces get, as CUDA_VISIBLE_DEVICES names them, the first to the first piece.
        """
        self.logs = logs
        self._free, self._lock = list(gpus), threading.Lock()
        self._pieces: dict[str, _Running] = {}
        self._stopped = False

    def start(self, piece: Piece) -> str:
        """See `Launcher.start`."""
        with self._lock:
            taken, self._free = self._free[: piece.gpus], self._free[piece.gpus :]
        if len(taken) < piece.gpus:
            raise RunError(f"{piece.name} needs {piece.gpus} GPUs, and {len(taken)} are left")
        self._pieces[piece.name] = _Running(piece, taken)
        return self.restart(piece.name)

    def restart(self, name: str) -> str:
        """See `Launcher.restart`."""
        running = self._pieces[name]
        with running.lock:
            if self._stopped:
                raise RunError(f"{name} is not started: the run has ended")
            self._end(running, at_once=True)
            host, port = HOST, free_port(HOST)
            running.starts += 1
            try:
                with open_log(self.logs / running.piece.log_name, running.starts) as log:
                    command, environment = running.piece.served_at(host, port), self._environment(running)
                    running.process = HostedProcess(command, environment, log, running.piece.grace)
            except OSError as error:
                raise RunError(f"{name} cannot be started: {error}") from error
            return f"http://{host}:{port}"

    def failure(self, name: str) -> str | None:
        """See `Launcher.failure`."""
        running = self._pieces[name]
        status = running.process.status() if running.process is not None else None
        return None if status is None else f"{name} {ended(status)}; {end_of(self.logs / running.piece.log_name)}"

    def stop(self) -> None:
        """See `Launcher.stop`."""
        self._stopped = True
        for running in self._pieces.values():
            if running.process is not None:
                running.process.end(at_once=False)
        for running in self._pieces.values():
            with running.lock:
                self._end(running, at_once=False)

    def _end(self, running: _Running, *, at_once: bool) -> None:
        if running.process is not None:
            running.process.end(at_once=at_once)
            running.process.wait()
            running.process = None

    def _environment(self, running: _Running) -> dict[str, str]:
        found = {"OMP_NUM_THREADS": str(threads_of(running.piece.processes)), "PYTHONUNBUFFERED": "1"}
        if running.gpus or running.piece.gpus == 0:
            found["CUDA_VISIBLE_DEVICES"] = ",".join(running.gpus)
        return {**found, **running.piece.environment}


def threads_of(processes: int) -> int:
    """Threads for each of so many processes on this machine: OMP_NUM_THREADS, where that is set."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() else max(1, cores() // processes)


def open_log(path: Path, starts: int) -> IO[bytes]:
    """A piece's log, opened to append to what earlier starts left.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.open("ab")
    what = "started" if starts == 1 else f"started again, for the {starts}. time"
    log.write(f"--- {what}: {datetime.now():%Y-%m-%d %H:%M:%S}\n".encode())
    log.flush()
    return log


def visible_gpus() -> list[str]:
    """This machine's GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in named.split(",")][:count] if named else [str(number) for number in range(count)]
