"""Runs programs that a model wrote, in a box: without network, without this machine's files, within limits, killed as a whole.

What each kind covers:

- `bubblewrap`: the program bwrap builds the box from namespaces.
- `namespaces`: `launcher.py` builds the same box itself, where the kernel lets this user make namespaces.
- `landlock`: for machines, such as most containers, that allow neither. The program reads the interpreter's files only, writes
  none, and reaches no other process; it can see whether a path exists, how large a file is, and which process numbers are taken.
- `processes`: limits and a kill of the process tree only. The program can read and write what this user can, reach the network,
  signal this user's processes, and so stop the one that watches over it.

The first two are confined by Landlock and a filter of system calls too, where the kernel has them; see docs/rewards.md.
"""

import contextlib
import functools
import os
import select
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from groupwise.errors import UserError
from groupwise.rewards.boxes import ENVIRONMENT, Ending, Kind, Limits, Outcome, SandboxError, command, confinement

SECONDS_TO_START = 60.0
SECONDS_TO_END = 30.0
"""For the box to kill its own processes; then its first ones are killed."""


class Program:
    """A box with an interpreter in it that waits for a program: it runs one, and is thrown away."""

    def __init__(self, box: "Box", limits: Limits) -> None:
        """Start it; `give` waits until it is ready.

        Raises:
            SandboxError: it cannot be started.
        """
        self.box, self.limits = box, limits
        with contextlib.ExitStack() as stack:
            self._program, self._stdin, self._stdout, self._stderr = (stack.enter_context(_memory_file()) for _ in range(4))
            scratch = "/"
            if box.kind == "processes":  # the others have a /tmp of their own, or write nothing
                scratch = tempfile.mkdtemp(prefix="groupwise-")
                stack.callback(_remove, scratch)
            report, written = os.pipe()
            given, self._give = os.pipe()
            self._report = stack.enter_context(os.fdopen(report, "rb", buffering=0))
            stack.callback(os.close, self._give)
            descriptors = {"program": self._program.fileno(), "go": given, "report": written}
            interpreter, packages = str(Path(sys.executable).resolve()), site.getsitepackages([sys.base_prefix])
            line = command(box.kind, interpreter, descriptors, limits, packages)
            try:
                self.process: subprocess.Popen[bytes] = started(
                    line,
                    stdin=self._stdin,
                    stdout=self._stdout,
                    stderr=self._stderr,
                    pass_fds=[self._program.fileno(), written, given],
                    cwd=scratch,
                )
            except OSError as error:
                raise SandboxError(f"{box.kind}: {error}") from error
            finally:
                os.close(written)
                os.close(given)
            self._open = stack.pop_all()
        self._said, self._until = b"", 0.0

    def give(self, source: str, stdin: str = "") -> None:
        """Have it run a Python program.

        Raises:
            SandboxError: the box could not be built.
        """
        if not self._hear(SECONDS_TO_START, until=b"\n") or not self._said.startswith(b"ready"):
            self._end()
            told = self._said.decode(errors="replace").removeprefix("error ").strip()
            reason = told or _read(self._stderr, self.limits.output).strip() or "the box ended before the program began"
            raise SandboxError(f"{self.box.kind}: {reason[-1000:]}")
        for file, text in ((self._program, source), (self._stdin, stdin)):
            _fill(file, text)
        self._until = time.monotonic() + self.limits.seconds
        with contextlib.suppress(BrokenPipeError):  # it was killed while it waited
            os.write(self._give, b"x")

    def outcome(self) -> Outcome:
        """Wait for the program, and end everything that is left of it.

        Raises:
            SandboxError: the program could not be started.
        """
        timed_out = not self._hear(self._until - time.monotonic())
        self._end()
        state = self._said.decode(errors="replace").splitlines()[1:]
        if state and state[0].startswith("error"):
            raise SandboxError(f"{self.box.kind}: {state[0].removeprefix('error ')}")
        stdout, stderr = _read(self._stdout, self.limits.output), _read(self._stderr, self.limits.output)
        full = max(os.fstat(file.fileno()).st_size for file in (self._stdout, self._stderr)) >= self.limits.output
        ending: Ending = "done" if self.process.returncode == 0 else "failed"
        if timed_out:
            ending = "timeout"
        elif "memory" in state or "processes" in state:
            ending = "memory" if "memory" in state else "processes"
        elif full:
            ending = "output"
        return Outcome(ending=ending, stdout=stdout, stderr=stderr)

    @property
    def waits(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._open:
            self._end()

    def _hear(self, seconds: float, until: bytes | None = None) -> bool:
        """Listen until the box has said `until`, or until it has ended; returns False if that takes too long."""
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self._report, select.POLLIN)
        while until is None or until not in self._said:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return False
            heard = self._report.read(4096)
            if not heard:
                with contextlib.suppress(subprocess.TimeoutExpired):  # its outermost process says how the program ended
                    self.process.wait(SECONDS_TO_END)
                return True
            self._said += heard
        return True

    def _end(self) -> None:
        if self.process.returncode is None:
            end(self.process, self.box.kind)
            self._hear(SECONDS_TO_END)  # until its inner processes have ended too


def end(process: subprocess.Popen[bytes], kind: Kind) -> None:
    """End a box with everything in it."""
    if kind in ("landlock", "processes"):
        process.terminate()  # its first process kills the others, which it alone can find
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_END)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _remove(directory: str) -> None:
    """Remove what a program wrote, not in this process where it is anything: directories can be nested deeply."""
    try:
        Path(directory).rmdir()
    except OSError:
        subprocess.run(["rm", "-rf", "--", directory], check=False, stderr=subprocess.DEVNULL)


_starter: list[ThreadPoolExecutor] = []


def started(line: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """A process that ends with this one: Linux ends it with the thread that started it, so one thread that stays starts all."""
    if not _starter:
        _starter.append(ThreadPoolExecutor(1, "groupwise-boxes"))
        os.register_at_fork(after_in_child=_starter.clear)

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(line, start_new_session=True, env=ENVIRONMENT, **options)

    return _starter[0].submit(start).result()


@dataclass(frozen=True, slots=True)
class Box:
    """One kind of sandbox."""

    kind: Kind

    def run(self, source: str, stdin: str = "", limits: Limits | None = None) -> Outcome:
        """Run a Python program.

        Raises:
            SandboxError: the box could not be built.
        """
        with Program(self, limits or Limits()) as program:
            program.give(source, stdin)
            return program.outcome()

    def start(self, source: str, *, readable: Sequence[str] = (), limits: Limits | None = None) -> subprocess.Popen[bytes]:
        """Start a Python program that is spoken to through its standard input and output, with this process's own interpreter and
        the packages that lie beside it; `readable`: paths that it may read besides. To be ended by `end`.

        Raises:
            SandboxError: the box could not be built.
        """
        report, written = os.pipe()
        given, give = os.pipe()
        os.write(give, b"x")
        with _memory_file() as program, os.fdopen(report, "rb", buffering=0) as told:
            _fill(program, source)
            descriptors = {"program": program.fileno(), "go": given, "report": written}
            packages = site.getsitepackages()
            line = command(self.kind, sys.executable, descriptors, limits or Limits(), packages, [*readable, sys.prefix])
            try:
                process = started(
                    line,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[program.fileno(), written, given],
                    cwd="/",
                )
            finally:
                for descriptor in (written, given, give):
                    os.close(descriptor)
            try:
                state = heard(told.fileno(), SECONDS_TO_START, 4096).decode(errors="replace")
            except (TimeoutError, ValueError) as error:
                state = str(error)
        if state != "ready":
            end(process, self.kind)
            process.communicate()
            raise SandboxError(f"{self.kind}: {state.removeprefix('error ').strip() or 'the box ended before the program began'}")
        return process

    def describe(self) -> str:
        """The kind, and what of the kernel confines a program in it."""
        found = confinement(self.kind)
        parts = [f"Landlock {found['landlock']}" if found["landlock"] else "", "seccomp" if found["filter"] else ""]
        return f"{self.kind} with {' and '.join(filter(None, parts)) or 'neither Landlock nor seccomp'}"


def heard(descriptor: int, seconds: float, most: int) -> bytes:
    """One line from a pipe, without its end; b"" where it ends before.

    Args:
        most: bytes.

    Raises:
        TimeoutError: there is none in time.
        ValueError: it is too long.
    """
    line, deadline, poll = b"", time.monotonic() + seconds, select.poll()
    poll.register(descriptor, select.POLLIN)
    while b"\n" not in line:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError(f"no answer within {seconds:.0f} s")
        part = os.read(descriptor, 65536)
        if not part:
            return b""
        line += part
        if len(line) > most:
            raise ValueError(f"an answer of more than {most:,} bytes")
    return line.partition(b"\n")[0]


def tell(descriptor: int, data: bytes, seconds: float) -> None:
    """Write to a pipe, which stays non-blocking.

    Raises:
        TimeoutError: it is not read in time.
        OSError: nobody reads from it any longer.
    """
    left, deadline, poll = memoryview(data), time.monotonic() + seconds, select.poll()
    poll.register(descriptor, select.POLLOUT)
    os.set_blocking(descriptor, False)
    while left:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError(f"it read nothing for {seconds:.0f} s")
        with contextlib.suppress(BlockingIOError):
            left = left[os.write(descriptor, left) :]


def _memory_file() -> IO[bytes]:
    return os.fdopen(os.memfd_create("groupwise"), "w+b", buffering=0)


def _fill(file: IO[bytes], text: str) -> None:
    """Write a text to a file, and leave its position at the start."""
    data, place = memoryview(text.encode(errors="replace")), 0
    while place < len(data):
        place += os.pwrite(file.fileno(), data[place:], place)


def _read(file: IO[bytes], most: int) -> str:
    file.seek(0)
    return (file.read(most) or b"").decode(errors="replace")


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
    first: tuple[Kind, ...] = ("namespaces", "bubblewrap") if os.geteuid() == 0 else ("bubblewrap", "namespaces")
    kinds: tuple[Kind, ...] = (*first, "landlock")
    reasons = {kind: why_not(kind) for kind in kinds}
    for kind, reason in reasons.items():
        if reason is None:
            return Box(kind)
    told = "; ".join(f"{kind}: {reason}" for kind, reason in reasons.items())
    raise UserError(
        f"no sandbox for programs that a model writes can be built here ({told}). To run them with limits only, able to read and"
        ' write what you can: reward = "code-in-processes"'
    )
