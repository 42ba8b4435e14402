"""Pieces of a run as processes on the nodes of a Ray cluster, each started and watched by an actor on its node."""

import importlib
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from groupwise.cluster.local import HostedProcess, open_log, threads_of
from groupwise.cluster.piece import Piece, end_of, ended, free_port
from groupwise.errors import RunError, UserError, first_line

OBJECT_STORE = 100 * 2**20
"""Bytes of a Ray of our own: nothing but small messages goes through it."""
OWN_CPUS, CPUS = 0.01, 1.0
"""That Ray sets aside for a piece: on this machine next to nothing, since threads divide the cores; one in a cluster that others
use too."""
PLACE_LIMIT = 120.0
"""Seconds in which a cluster must have a place for all pieces."""
START_LIMIT, ANSWER_LIMIT = 300.0, 20.0
"""Seconds in which an actor must be there, and in which it must answer."""
CONNECT_LIMIT = 120.0
"""Seconds in which a Ray of our own must be there."""
LISTEN_LIMIT = 5.0
"""Seconds in which a connection to an existing cluster must be there."""
LOOKS = 0.5
"""Seconds between two looks at an actor."""


class Host:
    """The actor: runs one piece's process on its node. When it ends, or the driver does, the keeper ends the process."""

    def __init__(self, piece: Piece) -> None:
        import ray

        self.piece = piece
        self.node = ray.util.get_node_ip_address()
        self.directory = tempfile.TemporaryDirectory(prefix="groupwise-")
        self.log = Path(self.directory.name) / piece.log_name
        self.process: HostedProcess | None = None
        self.starts = 0

    def start(self) -> str:
        """See `Launcher.restart`."""
        self.stop(at_once=True)
        self.starts += 1
        port = free_port(self.node)
        on_cpu = {"OMP_NUM_THREADS": str(threads_of(self.piece.processes)), "CUDA_VISIBLE_DEVICES": ""}
        environment = {**({} if self.piece.gpus else on_cpu), "PYTHONUNBUFFERED": "1", **self.piece.environment}
        with open_log(self.log, self.starts) as log:
            self.process = HostedProcess(self.piece.served_at(self.node, port), environment, log, self.piece.grace)
        return f"http://{self.node}:{port}"

    def look(self, offset: int) -> tuple[int | None, bytes]:
        """What the process exited with, None while it runs, and its log from there on."""
        status = self.process.status() if self.process is not None else None
        if not self.log.is_file():
            return status, b""
        with self.log.open("rb") as file:
            file.seek(offset)
            return status, file.read(2**20)

    def stop(self, at_once: bool = False) -> None:
        if self.process is not None:
            self.process.end(at_once=at_once)
            self.process.wait()
            self.process = None

    def leave(self) -> None:
        """Remove what is on the node, after the process has ended."""
        self.directory.cleanup()


@dataclass(slots=True)
class _Placed:
    piece: Piece
    bundle: int
    """Its place in the placement group."""
    actor: Any = None
    offset: int = 0
    """Bytes of the actor's log that have been copied."""
    problem: str | None = None
    """What its process, or its actor, ended with."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """One start at a time."""


class RayLauncher:
    """A `Launcher` for the nodes of a Ray cluster."""

    def __init__(self, logs: Path, pieces: Sequence[Piece], address: str = "") -> None:
        """
        Args:
            logs: the directory for the logs of pieces, which are copied there.
            pieces: all that will be started.
            address: of a cluster; empty: a new one, on this machine.

        Raises:
            UserError: Ray is not installed, cannot be reached, or has no place for the pieces.
        """
        self.logs = logs
        self._ray = loaded_ray(own=not address)
        self._own = None if address else OwnCluster(logs / "ray.log")
        self._pieces = {piece.name: _Placed(piece, bundle) for bundle, piece in enumerate(pieces)}
        self._stopped = threading.Event()
        try:
            connect(self._ray, self._own.address if self._own is not None else address, self._own)
            self._group = self._place(pieces)
        except BaseException:
            self._disconnect()
            raise
        self._watcher = threading.Thread(target=self._watch, name="ray pieces", daemon=True)
        self._watcher.start()

    def start(self, piece: Piece) -> str:
        """See `Launcher.start`."""
        return self.restart(piece.name)

    def restart(self, name: str) -> str:
        """See `Launcher.restart`. An actor that does not answer is replaced."""
        placed, ray = self._pieces[name], self._ray
        with placed.lock:
            if self._stopped.is_set():
                raise RunError(f"{name} is not started: the run has ended")
            placed.problem = None
            if placed.actor is not None:
                try:
                    return str(ray.get(placed.actor.start.remote(), timeout=ANSWER_LIMIT))
                except ray.exceptions.RayError:
                    ray.kill(placed.actor)
            placed.actor, placed.offset = self._actor(placed), 0
            try:
                return str(ray.get(placed.actor.start.remote(), timeout=START_LIMIT))
            except ray.exceptions.RayError as error:
                raise RunError(f"Ray cannot start {name}: {first_line(error)}") from error

    def gpus(self) -> float:
        """Of the whole cluster."""
        return float(self._ray.cluster_resources().get("GPU", 0))

    def failure(self, name: str) -> str | None:
        """See `Launcher.failure`."""
        placed = self._pieces[name]
        return placed.problem and f"{name} {placed.problem}; {end_of(self.logs / placed.piece.log_name)}"

    def stop(self) -> None:
        """See `Launcher.stop`."""
        self._stopped.set()
        self._watcher.join(2 * ANSWER_LIMIT)
        ray, actors = self._ray, [placed.actor for placed in self._pieces.values() if placed.actor is not None]
        with suppress(ray.exceptions.RayError):
            ray.get([actor.stop.remote() for actor in actors], timeout=ANSWER_LIMIT)
        for placed in self._pieces.values():
            if placed.actor is not None:
                self._look(placed)
        with suppress(ray.exceptions.RayError):
            ray.get([actor.leave.remote() for actor in actors], timeout=ANSWER_LIMIT)
        with suppress(ray.exceptions.RayError):
            for actor in actors:
                ray.kill(actor)
            ray.util.remove_placement_group(self._group)
        self._disconnect()

    def _disconnect(self) -> None:
        self._ray.shutdown()
        if self._own is not None:
            self._own.stop()

    def _place(self, pieces: Sequence[Piece]) -> Any:
        """A placement group with a bundle for each piece."""
        ray = self._ray
        cpus = OWN_CPUS if self._own else CPUS
        bundles = [{"CPU": cpus, **({"GPU": piece.gpus} if piece.gpus else {})} for piece in pieces]
        group = ray.util.placement_group(bundles, strategy="PACK")
        try:
            ray.get(group.ready(), timeout=PLACE_LIMIT)
        except ray.exceptions.GetTimeoutError as error:
            there = ray.cluster_resources()
            needed = f"{len(pieces)} processes with {sum(piece.gpus for piece in pieces)} GPUs"
            found = f"{there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs"
            raise UserError(f"Ray has no place for {needed}: it has {found}, others' included") from error
        return group

    def _actor(self, placed: _Placed) -> Any:
        ray = self._ray
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(self._group, placed.bundle)
        cpus = OWN_CPUS if self._own else CPUS
        made = ray.remote(Host).options(num_cpus=cpus, num_gpus=placed.piece.gpus, scheduling_strategy=strategy)
        return made.remote(placed.piece)

    def _watch(self) -> None:
        """Copy logs, and notice what has ended."""
        while not self._stopped.is_set():
            began = time.monotonic()
            for placed in self._pieces.values():
                if placed.actor is not None and not self._stopped.is_set():
                    self._look(placed)
            self._stopped.wait(max(0.0, LOOKS - (time.monotonic() - began)))

    def _look(self, placed: _Placed) -> None:
        actor, ray = placed.actor, self._ray
        try:
            status, text = ray.get(actor.look.remote(placed.offset), timeout=ANSWER_LIMIT)
        except ray.exceptions.RayError as error:
            if placed.actor is actor:
                placed.problem = f"is lost with its Ray actor: {first_line(error)}"
            return
        if text:
            placed.offset += len(text)
            with suppress(OSError):  # a full disk costs no run that can go on
                self.logs.mkdir(parents=True, exist_ok=True)
                with (self.logs / placed.piece.log_name).open("ab") as log:
                    log.write(text)
        if placed.actor is actor and status is not None:
            placed.problem = ended(status)


def loaded_ray(*, own: bool) -> Any:
    """The module `ray`. `own`: for a cluster that this process starts.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if own:  # so that no other user of this machine can give it work
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise UserError("cluster.launcher = 'ray' needs Ray: pip install 'groupwise[ray]'") from error
    if own:
        with suppress(ImportError, AttributeError):  # Ray reads both once, perhaps before; older ones do not know them
            internals = importlib.import_module("ray._raylet")
            internals.Config.initialize("")
            internals.AuthenticationTokenLoader.instance().reset_cache()
    return ray


class OwnCluster:
    """A Ray cluster of this machine. It hangs on a keeper, since Ray leaves processes behind when its driver is killed."""

    def __init__(self, log: Path) -> None:
        """
        Raises:
            OSError: it cannot be started.
        """
        self.directory = Path(tempfile.mkdtemp(prefix="groupwise-ray-"))
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        settings: dict[str, object] = {
            "port": port,
            "node-ip-address": "127.0.0.1",
            "temp-dir": self.directory,
            "object-store-memory": OBJECT_STORE,
            "include-dashboard": "false",
            "ray-client-server-port": free_port(),
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats", *options]
        with open_log(log, 1) as file:
            self.process = HostedProcess(command, {}, file)

    def stop(self) -> None:
        self.process.end(at_once=True)
        self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


def connect(ray: Any, address: str, cluster: OwnCluster | None) -> None:
    """Connect to a cluster; one that was just started is waited for.

    Raises:
        UserError: it does not answer.
    """
    if cluster is None:
        check_listens(address)
    deadline = time.monotonic() + (CONNECT_LIMIT if cluster is not None else 0)
    while True:
        try:
            with signals_kept():
                ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            return
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            ended_early = cluster is not None and cluster.process.status() is not None
            if ended_early or time.monotonic() > deadline:
                where = "Ray on this machine" if cluster is not None else f"cluster.ray_address: Ray at {address}"
                raise UserError(f"{where} cannot be reached: {first_line(error)}") from error
            time.sleep(LOOKS)


def check_listens(address: str) -> None:
    """Find out quickly whether anything listens at "host:port" or "ray://host:port". Ray itself takes minutes.

    Raises:
        UserError: nothing does.
    """
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
        if host and port:
            socket.create_connection((host, port), LISTEN_LIMIT).close()
    except (OSError, ValueError) as error:
        raise UserError(f"cluster.ray_address: Ray at {address} cannot be reached: {error}") from error


@contextmanager
def signals_kept() -> Iterator[None]:
    """Within: whatever sets handlers of signals, they are as before at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
