"""What is compared: peers, each a process of its own that runs one turn (a step or a rollout batch) for each line it is sent."""

import json
import math
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Collection, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from workloads import Work, as_json, make

HERE = Path(__file__).parent
Report = dict[str, Any]
"""Of a turn: seconds, generation, training (where there is any), tokens (useful ones) and peak_mib, all numbers."""


@dataclass(frozen=True)
class Peer:
    """How a peer is run."""

    python: str
    script: str | Path
    """In this directory, or an absolute path."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields in which its `Work` differs from the others'."""
    source: Path | None = None
    """Where it imports groupwise from; None: from where its environment has it."""


class PeerError(RuntimeError):
    """A peer's process ended before its turn did."""


class Worker:
    """A peer's process, waiting between its turns."""

    def __init__(self, python: str, script: str | Path, work: Work, directory: Path, *, source: Path | None = None) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the worker
        path = {} if source is None else {"PYTHONPATH": str(source)}
        self.process = subprocess.Popen(
            [python, str(HERE / script), as_json(work), str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **path},
        )

    def wait(self) -> None:
        """Until it says that it is ready.

        Raises:
            PeerError: it ended instead.
        """
        self._answer("READY")

    def turn(self) -> Report:
        """One turn's report.

        Raises:
            PeerError: it ended instead.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(self._reason()) from None
        return json.loads(self._answer("{"))

    def _answer(self, beginning: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            line = line.removeprefix("REPORT ")
            if line.startswith(beginning):
                return line
        raise PeerError(self._reason())

    def _reason(self) -> str:
        code = self.process.wait()
        if code == -9:
            return "killed, most likely because memory ran out"
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return f"exit code {code}: {lines[-1] if lines else 'no message'}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._errors.close()


@contextmanager
def workers(work: Work, peers: dict[str, Peer]) -> Iterator[dict[str, Worker]]:
    """The peers' processes, on one model and its prompts."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        make(work, Path(directory))
        found = {}
        for name, peer in peers.items():
            theirs = replace(work, **peer.settings)
            found[name] = Worker(peer.python, peer.script, theirs, Path(directory), source=peer.source)
            stack.callback(found[name].close)
        yield found


def turns(
    work: Work, peers: dict[str, Peer], pairs: int, *, ends: float = math.inf, cold: Collection[str] = ()
) -> Generator[tuple[int, str, Report], None, None]:
    """A turn of each peer, one after the other, `pairs` times over after turn 0, which is to warm up.

    Args:
        work: what all of them do.
        peers: by their names.
        pairs: turns of each that count.
        ends: by `time.monotonic`; no turn is started that, by the peer's longest so far, would end later.
        cold: peers that have no turn 0. They are waited for until they are ready, so that they do not load during others' turns.

    Yields:
        (number of the turn, name of the peer, report). A peer that fails reports {"error": why} and has no further turns.
    """
    with workers(work, peers) as found:
        longest = dict.fromkeys(found, 0.0)
        for turn in range(pairs + 1):
            for name, worker in list(found.items()):
                started = time.monotonic()
                if started + 1.2 * longest[name] > ends:
                    continue
                try:
                    if turn == 0 and name in cold:
                        worker.wait()
                        continue
                    report = worker.turn()
                except PeerError as error:
                    del found[name]
                    yield turn, name, {"error": str(error)}
                    continue
                longest[name] = time.monotonic() - started
                yield turn, name, report
                time.sleep(0.5)  # for the threads of the one to go to sleep before the other's turn


def compare(work: Work, peers: dict[str, Peer], pairs: int, console: Console) -> dict[str, list[Report]]:
    """`pairs` turns of each, one after the other, after a turn each to warm up."""
    results: dict[str, list[Report]] = {name: [] for name in peers}
    for turn, name, report in turns(work, peers, pairs):
        if "error" in report:
            raise SystemExit(f"{name}: {report['error']}")
        console.print(line_of(name, report))
        if turn:
            results[name].append(report)
    return results


def line_of(name: str, report: Report) -> str:
    return f"  {name:<10} {report['seconds']:7.2f} s  {report['tokens'] / report['generation']:8.0f} tok/s"


def median(reports: list[Report], key: str) -> float:
    return statistics.median(report[key] for report in reports)


def per_token(reports: list[Report], key: str) -> float:
    """Median seconds for a useful token: completions end by themselves, so no two runs have equally many."""
    return statistics.median(report[key] / report["tokens"] for report in reports)


def ratio(theirs: list[Report], ours: list[Report], key: str) -> float:
    """Theirs over ours: of seconds per useful token, or of peak memory."""
    measure = median if key == "peak_mib" else per_token
    return measure(theirs, key) / measure(ours, key)


def slope(sizes: list[Any], values: list[float]) -> float:
    """Of the line through the logarithms, by least squares: the exponent of a power law."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)
