"""Recorders that a recipe's `trackers.names` adds to a run's directory and the terminal. None of them can stop or slow a run."""

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from groupwise.config import Source, TrackersSection
from groupwise.errors import RunError, UserError, nearest
from groupwise.guard import user_code, user_code_at_start
from groupwise.plugins import is_reference, load_function
from groupwise.training.events import Event, Recorder
from groupwise.workers.child import text_of

MakeRecorder = Callable[[Path, Mapping[str, Any]], Recorder]


class Sender:
    """A tracker that a process of its own tells of the run: `groupwise.trackers` reads the run's directory and sends it.

    So a library that hangs, or is slow, or takes the process down with it, costs the run nothing.
    """

    def __init__(self, tracker: str, run: Path, recipe: Mapping[str, Any]) -> None:
        self.tracker, self.run = tracker, run
        self.timeout = float(recipe["trackers"]["timeout"])
        self.log = run / "trackers" / f"{tracker}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def record(self, event: Event) -> None:
        """Start the process with the first event, when a resumed run's directory is rewound; it finds events itself.

        Raises:
            RuntimeError: the process has ended.
        """
        if self.process is None:
            self.log.parent.mkdir(exist_ok=True)
            with self.log.open("ab") as log:
                self.process = self._start(log)
        elif self.process.poll() is not None:
            raise RuntimeError(self._why(self.process.returncode))

    def close(self) -> None:
        """Wait until everything is sent.

        Raises:
            RuntimeError: it failed, or takes too long.
        """
        process = self.process
        if process is None or process.stdin is None:
            return
        process.stdin.close()  # which tells the process that the run is over
        try:
            if process.wait(self.timeout):
                raise RuntimeError(self._why(process.returncode))
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"not finished after trackers.timeout = {self.timeout:g} s{self._later()}") from error
        finally:
            self.stop()

    def stop(self) -> None:
        """End the process and its children at once."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _start(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            # -P: a file wandb.py where the user works is not the library.
            [sys.executable, "-P", "-m", "groupwise.trackers", self.tracker, str(self.run)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the run, which then says that it is over
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )

    def _why(self, code: int) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        said = lines[-1].rstrip(".") if code > 0 and lines else f"its process ended with code {code}"
        return f"{said}{self._later()}"

    def _later(self) -> str:
        return f". More is in {self.log}; to send the rest later: groupwise track {self.run} --to {self.tracker}"


NAMES = ("trackio", "wandb", "swanlab", "tensorboard", "mlflow")
"""Trackers with a module in `groupwise.trackers`; each is also the name of its library and of the extra that installs it."""
TRACKERS: dict[str, MakeRecorder] = {name: partial(Sender, name) for name in NAMES}
"""Name -> a function of (run directory, resolved recipe). To add one: a module with such a function, and one line here."""


@dataclass(frozen=True, slots=True)
class Tracker:
    """A recorder to be made."""

    name: str
    """As a run's recipe can find it again: the user's own by an absolute path."""
    make: MakeRecorder


def find_trackers(settings: TrackersSection, source: Source) -> list[Tracker]:
    """What makes the recorders that a recipe names.

    Raises:
        UserError: there is none of that name, or its library is not installed.
    """
    found: list[Tracker] = []
    for name in settings.names:
        try:
            if is_reference(name):
                own = load_function(name, Path(source.path).parent)
                found.append(Tracker(own.reference, own.function))
            elif name in TRACKERS:
                check_installed(name)
                found.append(Tracker(name, TRACKERS[name]))
            else:
                raise UserError(f'there is no tracker {name!r}{nearest(name, TRACKERS)}; your own is "file.py:name"')
        except UserError as error:
            raise source.error("trackers.names", str(error)) from error
    if len({tracker.name for tracker in found}) < len(found):
        raise source.error("trackers.names", "names a tracker twice")
    return found


def check_installed(tracker: str) -> None:
    """Raises:
    UserError: the tracker's library is not installed.
    """
    if tracker in NAMES and find_spec(tracker) is None:
        raise UserError(f"{tracker!r} needs a library that is not installed: pip install 'groupwise[{tracker}]'")


def make_trackers(trackers: Sequence[Tracker], run: Path, recipe: Mapping[str, Any]) -> list[Recorder]:
    """The recorders of a run.

    Raises:
        UserError: one cannot be made, or is no recorder.
    """
    made = []
    for tracker in trackers:
        name = tracker.name.rpartition(":")[2]
        with user_code_at_start(f"trackers.names: {name}"):
            recorder = tracker.make(run, recipe)
        if not hasattr(recorder, "record"):
            raise UserError(f"trackers.names: {name} gives {type(recorder).__name__}, which has no record()")
        made.append(recorder)
    return made


class Guarded:
    """A recorder in a thread of its own: if it raises or falls behind, that is said once, and it is left out from then on."""

    WAITING = 16
    """How many events may wait for it. They hold a step's batch each, so that memory limits them."""

    def __init__(self, name: str, recorder: Recorder, note: Callable[[str], None], patience: float) -> None:
        """`note`: shows a text to the user; `patience`: seconds that the end of a run waits for it."""
        self.name, self.recorder, self.note, self.patience = name, recorder, note, patience
        self.events: queue.Queue[Event | None] = queue.Queue(self.WAITING)
        self.failed = False
        self.thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self.thread.start()

    def record(self, event: Event) -> None:
        if self.failed:
            return
        try:
            self.events.put_nowait(event)
        except queue.Full:
            self._fail(f"falls behind by {self.WAITING} events")

    def close(self) -> None:
        """Wait until it has recorded everything; Ctrl-C ends the waiting."""
        try:
            if not self.failed:
                self.events.put(None, timeout=self.patience)
                self.thread.join(self.patience + 5)  # a `Sender` gives up by itself, and knows more
            if self.thread.is_alive() and not self.failed:
                self._fail(f"not finished after {self.patience:g} s")
        except queue.Full:
            self._fail(f"not finished after {self.patience:g} s")
        except KeyboardInterrupt:
            self._fail("not waited for any longer")
        finally:
            if isinstance(self.recorder, Sender):
                self.recorder.stop()

    def _run(self) -> None:
        try:
            while (event := self.events.get()) is not None:
                self._call(self.recorder.record, event)
            if close := getattr(self.recorder, "close", None):
                self._call(close)
        except BaseException as error:  # a tracker's library, or the user's own, may raise anything
            own = "" if isinstance(error, RuntimeError | RunError) else f"{type(error).__name__}: "
            self._fail(f"{own}{text_of(error)}")

    def _call(self, method: Callable[..., Any], *arguments: Any) -> None:
        if isinstance(self.recorder, Sender):
            method(*arguments)
        else:
            with user_code("it", let=BaseException):
                method(*arguments)

    def _fail(self, reason: str) -> None:
        if not self.failed:
            self.failed = True
            self.note(f"tracker {self.name}: {reason}. The run does not need it.")
