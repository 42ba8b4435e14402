"""A fork server: one process has imported PyTorch and groupwise, and each command runs in a fork of it.

A command takes half a second instead of seven, and its file operations can be counted, its process killed. PyTorch may be forked
while it has started no threads: with one thread it starts none, which the server checks.
"""

import atexit
import ctypes
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from fault_injection.preload import Fault, Operation, arm, operations

PR_SET_CHILD_SUBREAPER = 36
GRACE = 3.0
"""Seconds that processes which a run started have after its end to end themselves."""
THREADS = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # of pyarrow's allocator
}
"""Environment variables that keep libraries from starting threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a command ended."""

    code: int
    """Its exit code; negative: the signal that ended it."""
    output: str
    """What it printed, standard output and standard error together."""
    seconds: float
    left: list[str]
    """Processes that it started and that outlived it by `GRACE` seconds, then killed: their command lines."""
    late: bool
    """Whether it was killed for taking longer than its time limit."""
    operations: list[Operation] = field(default_factory=list)
    """The file operations in the run's directory that change something, up to the one it was killed at."""


class Server:
    """The fork server, from outside: a context that runs commands."""

    def __init__(self, library: Path, recipes: Sequence[Path], folder: Path, prefix: Sequence[str] = ()) -> None:
        """Args:
        recipes: of runs to come; their models are loaded once, so that forks need not compile kernels again.
        folder: for outputs and logs.
        prefix: of the server's command line, as in ("unshare", "-m").
        """
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        here, there = os.pipe(), os.pipe()
        paths = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        own = {"LD_PRELOAD": str(library), "PYTHONPATH": os.pathsep.join(paths), **THREADS}
        command = [*prefix, sys.executable, "-m", "fault_injection.server", str(there[0]), str(here[1]), str(library)]
        with (folder / "server.log").open("w") as log:
            self.process = subprocess.Popen(
                [*command, *map(str, recipes)],
                env={**os.environ, **own},
                pass_fds=(there[0], here[1]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        os.close(there[0])
        os.close(here[1])
        self.answers, self.requests = os.fdopen(here[0]), os.fdopen(there[1], "w")
        if self.answers.readline() != "ready\n":
            self.close()
            raise RuntimeError(f"the fork server did not start:\n{(folder / 'server.log').read_text()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.requests.close()
        self.process.wait()
        self.answers.close()

    def run(
        self,
        arguments: Sequence[str | Path],
        directory: Path,
        fault: Fault | None = None,
        *,
        limit: float = 120.0,
        kill_after: float | None = None,
    ) -> Outcome:
        """Run `groupwise` with these arguments in a fork, the operations in `directory` counted.

        Args:
            limit: seconds after which it is killed as one that hangs.
            kill_after: seconds after which it is killed.
        """
        log, output = self.folder / "operations.log", self.folder / "output.txt"
        log.unlink(missing_ok=True)
        request = {
            "arguments": list(map(str, arguments)),
            "directory": str(directory),
            "log": str(log),
            "output": str(output),
            "fault": asdict(fault or Fault()),
            "limit": limit,
            "kill_after": kill_after,
        }
        print(json.dumps(request), file=self.requests, flush=True)
        if not (answer := self.answers.readline()):
            raise RuntimeError(f"the fork server ended:\n{(self.folder / 'server.log').read_text()}")
        text = output.read_text(encoding="utf-8", errors="replace")
        return Outcome(**json.loads(answer), output=text, operations=operations(log))


# --- in the server


def serve(requests: int, answers: int, library: str, recipes: Sequence[str]) -> None:
    """Answer requests until there are no more."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what a run leaves becomes a child of this process, and is seen
    loaded = ctypes.CDLL(library)
    _warm_up(recipes)
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert len(threads) == 1, f"threads were started, which a fork would not have: {threads}"
    with os.fdopen(requests) as lines, os.fdopen(answers, "w") as out:
        print("ready", file=out, flush=True)
        for line in lines:
            print(json.dumps(_answer(json.loads(line), loaded)), file=out, flush=True)


def _warm_up(recipes: Sequence[str]) -> None:
    """Import and compile what a run and a report need."""
    from groupwise.config import Recipe, load
    from groupwise.kernels.compiled import library
    from groupwise.training.setup import prepare

    for module in ("groupwise.cli", "groupwise.evidence.report", "groupwise.training.session"):
        importlib.import_module(module)
    with suppress(ImportError):
        importlib.import_module("pandas")  # which pyarrow imports where it is there
    for recipe in recipes:
        prepare(*load(Path(recipe), Recipe, []))
    for kernels in ("sample", "blocked"):  # compiled when a run first generates
        library(kernels)


def _answer(request: dict[str, Any], library: ctypes.CDLL) -> dict[str, Any]:
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(request, library)
    kill_after, limit = request["kill_after"], request["limit"]
    late = False
    descriptor = os.pidfd_open(child)
    if not select.select([descriptor], [], [], limit if kill_after is None else kill_after)[0]:
        late = kill_after is None
        os.kill(child, signal.SIGKILL)
    os.close(descriptor)
    _, status = os.waitpid(child, 0)
    seconds = time.monotonic() - started
    return {"code": os.waitstatus_to_exitcode(status), "seconds": seconds, "late": late, "left": _sweep()}


def _child(request: dict[str, Any], library: ctypes.CDLL) -> None:
    """Run the command and end the process, as the interpreter would."""
    os.setsid()
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    code = 1
    try:
        from groupwise.cli import app

        arm(library, Path(request["directory"]), Path(request["log"]), Fault(**request["fault"]))
        app(request["arguments"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _sweep() -> list[str]:
    """Wait for the processes that the run left; kill those that stay, and return their command lines."""
    end = time.monotonic() + GRACE
    while time.monotonic() < end:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.01)
        except ChildProcessError:
            return []
    found = []
    while True:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        if not children:
            return found
        for child in map(int, children):
            found.append(Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ").strip())
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
