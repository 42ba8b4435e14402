"""Runs programs that a model wrote, in a box: without network, without this machine's files, within limits, killed as a whole.

What each kind covers:

- `bubblewrap`: the program bwrap builds the box from namespaces.
- `namespaces`: `launcher.py` builds the same box itself, where the kernel lets this user make namespaces.
- `processes`: limits and a kill of the process group only. The program can read and write what this user can, reach the network,
  start any number of processes, and leave some behind that made a session of their own.

Not covered by any: an exploit of the kernel (no system call is filtered), and memory of all the processes of a box together.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from groupwise.errors import UserError

Kind = Literal["bubblewrap", "namespaces", "processes"]
Ending = Literal["done", "failed", "timeout", "output"]
LAUNCHER = Path(__file__).with_name("launcher.py")
READ_SOURCE = "import os, sys; exec(compile(os.fdopen(int(sys.argv.pop(1))).read(), 'program.py', 'exec'))"
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache")
"""What of the system an interpreter needs."""


class SandboxError(RuntimeError):
    """The box could not be built, so that nothing is known of the program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    seconds: float = 6.0
    """By the wall clock, and of CPU time."""
    memory: int = 1 << 30
    """Bytes of address space of each process."""
    processes: int = 32
    """At once; not with `processes`, where it would count everything that the user runs."""
    output: int = 1 << 20
    """Bytes of output, and of any file."""
    disk: int = 64 << 20
    """Bytes in the box's /tmp, which lies in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a program ended."""

    ending: Ending
    """"done": with exit code 0. "failed": with another, or by a signal. "timeout", "output": over that limit."""
    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True)
class Box:
    """One kind of sandbox."""

    kind: Kind

    def run(self, source: str, stdin: str = "", limits: Limits | None = None) -> Outcome:
        """Run a Python program.

        Raises:
            SandboxError: the box could not be built.
        """
        limits = limits or Limits()
        with (
            _memory_file(source) as program,
            _memory_file(stdin) as given,
            _memory_file() as said,
            _memory_file() as complained,
            tempfile.TemporaryDirectory(prefix="groupwise-program-", ignore_cleanup_errors=True) as scratch,
        ):
            report, written = os.pipe()
            try:
                process = subprocess.Popen(
                    self._command(str(Path(sys.executable).resolve()), program.fileno(), limits, written),
                    stdin=given,
                    stdout=said,
                    stderr=complained,
                    pass_fds=[program.fileno(), written],
                    start_new_session=True,
                    cwd=scratch,
                    env={},
                )
            except OSError as error:
                os.close(report)
                raise SandboxError(f"{self.kind}: {error}") from error
            finally:
                os.close(written)
            timed_out = _finish(process, limits.seconds)
            with os.fdopen(report, "rb") as file:
                os.set_blocking(file.fileno(), False)  # in the weakest box a process that escaped may hold its other end
                state = (file.read() or b"").decode(errors="replace")
            stdout, stderr = _read(said, limits.output), _read(complained, limits.output)
            if state != "ready" and not timed_out:
                raise SandboxError(f"{self.kind}: {state or stderr.strip() or 'the box ended before the program began'}")
            full = max(os.fstat(file.fileno()).st_size for file in (said, complained)) >= limits.output
        ending: Ending = "timeout" if timed_out else "output" if full else "done" if process.returncode == 0 else "failed"
        return Outcome(ending=ending, stdout=stdout, stderr=stderr)

    def start(self, source: str, *, readable: Sequence[str] = (), limits: Limits | None = None) -> subprocess.Popen[bytes]:
        """Start a Python program that is spoken to through its standard input and output, with this process's own interpreter and
        the packages that lie beside it; `readable`: paths that it may read besides.

        Raises:
            SandboxError: the box could not be built.
        """
        report, written = os.pipe()
        with _memory_file(source) as program:
            command = self._command(
                sys.executable, program.fileno(), limits or Limits(), written, readable=[sys.prefix, *readable]
            )
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[program.fileno(), written],
                    start_new_session=True,
                    cwd=tempfile.gettempdir(),
                    env={},
                )
            finally:
                os.close(written)
        state = os.read(report, 4096).decode(errors="replace")
        os.close(report)
        if state != "ready":
            process.kill()
            process.communicate()
            raise SandboxError(f"{self.kind}: {state or 'the box ended before the program began'}")
        return process

    def _command(self, interpreter: str, program: int, limits: Limits, report: int, readable: Sequence[str] = ()) -> list[str]:
        """The command that builds the box and runs the program in the file descriptor `program`."""
        wanted = [*SYSTEM, sys.base_prefix, interpreter, *readable]
        shown = _outermost(
            [
                *wanted,
                *(os.path.realpath(path) for path in wanted),
                *([str(LAUNCHER)] if self.kind == "bubblewrap" else []),
            ]
        )
        counts = {
            "CPU": int(limits.seconds) + 1,
            "AS": limits.memory,
            "FSIZE": limits.output,
            "NOFILE": 64,
            "CORE": 0,
            **({} if self.kind == "processes" else {"NPROC": limits.processes}),
        }
        specification = {
            "namespaces": self.kind == "namespaces",
            "root": "/sys",  # a directory that every Linux has, and no interpreter lies in
            "readable": shown,
            "disk": limits.disk,
            "limits": counts,
            "command": [interpreter, "-I", "-c", READ_SOURCE, str(program)],
            "environment": {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
            "report": report,
        }
        launch = [interpreter, "-I", "-S", str(LAUNCHER), json.dumps(specification)]
        if self.kind != "bubblewrap":
            return launch
        options = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--dev", "/dev", "--proc", "/proc"]
        options += ["--size", str(limits.disk), "--tmpfs", "/tmp"]  # before what may lie in it
        for path in shown:
            link = Path(path).is_symlink()
            options += ["--symlink", str(Path(path).readlink()), path] if link else ["--ro-bind", path, path]
        return [shutil.which("bwrap") or "bwrap", *options, "--chdir", "/tmp", "--", *launch]


def _outermost(paths: list[str]) -> list[str]:
    """The paths that exist and lie in no other one of them."""
    there = sorted({path for path in paths if Path(path).exists()})
    return [path for path in there if not any(path.startswith(other.rstrip("/") + "/") for other in there)]


def _memory_file(text: str = "") -> IO[bytes]:
    """A file in memory, at its start, that holds a text."""
    file = os.fdopen(os.memfd_create("groupwise"), "w+b", buffering=0)
    data = memoryview(text.encode(errors="replace"))
    while data:
        data = data[file.write(data) :]
    file.seek(0)
    return file


def _read(file: IO[bytes], most: int) -> str:
    file.seek(0)
    return (file.read(most) or b"").decode(errors="replace")


def _finish(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for a program to end, then kill what is left of it; returns whether it took too long."""
    timed_out = False
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        with contextlib.suppress(ProcessLookupError):  # all of it has ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return timed_out


@functools.cache
def why_not(kind: Kind) -> str | None:
    """Why this machine cannot build such a box; None if it can."""
    if sys.platform != "linux":
        return "it needs Linux"
    if kind == "bubblewrap" and shutil.which("bwrap") is None:
        return "there is no program bwrap (install bubblewrap)"
    try:
        outcome = Box(kind).run("print(6 * 7)", limits=Limits(seconds=20.0))
    except SandboxError as error:
        return str(error).removeprefix(f"{kind}: ")
    return (
        None if outcome.stdout == "42\n" else f"a first program fails in it: {(outcome.stderr or outcome.ending).strip()[-200:]}"
    )


@functools.cache
def find_box(weaker: bool = False) -> Box:
    """The strongest box that this machine can build; `weaker`: `processes`, which the user accepts by name.

    Raises:
        UserError: none can be built.
    """
    if weaker:
        if reason := why_not("processes"):
            raise UserError(f"programs cannot be run here even without a sandbox: {reason}")
        return Box("processes")
    # For root the kernel counts no processes within bubblewrap, whose user is root outside; the launcher goes on as nobody.
    kinds: tuple[Kind, ...] = ("namespaces", "bubblewrap") if os.geteuid() == 0 else ("bubblewrap", "namespaces")
    reasons = {kind: why_not(kind) for kind in kinds}
    for kind, reason in reasons.items():
        if reason is None:
            return Box(kind)
    told = "; ".join(f"{kind}: {reason}" for kind, reason in reasons.items())
    raise UserError(
        f"no sandbox for programs that a model writes can be built here ({told}). To run them with limits only, able to read and"
        ' write what you can: reward = "code-in-processes"'
    )
