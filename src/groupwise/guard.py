"""Around code of the user's that runs in the process that trains: parts of the algorithm, samplers, trackers.

It is given the trainer's own objects, so it must be trusted. What it can do by mistake is caught here: whatever it raises,
SystemExit and KeyboardInterrupt too, becomes one error that names the key, and what it changes for the whole process is put back
and refused. `os._exit` and a crash of the interpreter cannot be caught. In a thread of its own, as trackers have, only what it
raises is caught: the main thread may change the same values meanwhile, for instance while it loads a model.
"""

import asyncio
import contextlib
import copy
import functools
import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from groupwise.errors import RunError, UserError, is_out_of_memory
from groupwise.workers.child import text_of

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STREAMS = {0: "standard input", 1: "standard output", 2: "standard error"}


@dataclass(slots=True)
class Watch:
    """What the user's code must leave as it is."""

    signalled: bool = False
    """Whether a signal came, whose handler may have raised something in the user's code."""
    _process: int = field(default_factory=os.getpid)
    _before: dict[str, Any] = field(default_factory=dict)
    _handlers: dict[signal.Signals, Any] = field(default_factory=dict)
    _streams: dict[int, tuple[int, tuple[int, int] | None]] = field(default_factory=dict)
    """Descriptor -> a copy of it, and which file it is."""

    def begin(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._before = {name: read() for name, (read, _) in STATE.items()}
        for number in STREAMS:
            with contextlib.suppress(OSError):
                self._streams[number] = os.dup(number), _file_of(number)
        for number in SIGNALS:
            if callable(before := signal.getsignal(number)):
                self._handlers[number] = before
                signal.signal(number, self._signal)

    def _signal(self, number: int, frame: object) -> None:
        self.signalled = True
        self._handlers[signal.Signals(number)](number, frame)

    def end(self) -> str | None:
        """Put back what was changed; returns what that was. A process that was forked meanwhile ends here, and trains nothing."""
        if os.getpid() != self._process:
            os._exit(1)
        changed = []
        for which, handler in self._handlers.items():
            if signal.getsignal(which) != self._signal:
                changed.append(f"the handler of {which.name}")
            signal.signal(which, handler)
        for number, (kept, file) in self._streams.items():
            if _file_of(number) != file:
                os.dup2(kept, number)
                changed.append(f"descriptor {number}, which is {STREAMS[number]}")
            os.close(kept)
        for name, before in self._before.items():
            read, write = STATE[name]
            if (now := read()) != before:
                write(before)
                changed.append(f"{name} from {before} to {now}")
        for name in ("stdout", "stderr") if self._before else ():
            if getattr(getattr(sys, name), "closed", False):
                setattr(sys, name, open(1 if name == "stdout" else 2, "w", closefd=False))  # noqa: SIM115
                changed.append(f"sys.{name}, which it closed")
        self._handlers, self._streams = {}, {}
        return " and ".join(changed) or None


def _directory() -> str:
    try:
        return os.getcwd()  # noqa: PTH109
    except FileNotFoundError:  # somebody removed it
        return ""


def _change_directory(path: str) -> None:
    with contextlib.suppress(OSError):
        os.chdir(path)


STATE: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's deterministic mode": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "the working directory": (_directory, _change_directory),
}
"""What holds for the whole process: how it is read, and how it is set."""


def _file_of(descriptor: int) -> tuple[int, int] | None:
    try:
        found = os.fstat(descriptor)
    except OSError:
        return None
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def user_code(place: str, let: type[BaseException] | tuple[()] = ()) -> Iterator[None]:
    """Within: code of the user's.

    Args:
        place: what it is, for a message: "algorithm.surrogate = 'mine.py:loss'".
        let: what may be raised as it is.

    Raises:
        RunError: it raised something, or changed what holds for the whole process.
    """
    watch = Watch()
    watch.begin()
    try:
        yield
    except BaseException as error:  # the user's code may raise anything
        watch.end()
        if passes(error, watch) or isinstance(error, let):
            raise
        raise failure(place, error) from error
    if (changed := watch.end()) is not None:
        raise RunError(f"{place} changed {changed}, for the whole process: let it put that back before it returns")


@contextlib.contextmanager
def user_code_at_start(place: str, let: type[BaseException] | tuple[()] = ()) -> Iterator[None]:
    """As `user_code`, before training has begun.

    Raises:
        UserError: it raised something, or changed what holds for the whole process.
    """
    try:
        with user_code(place, let):
            yield
    except RunError as error:
        raise UserError(str(error)) from error


def passes(error: BaseException, watch: Watch) -> bool:
    """Whether the user's code is not the cause: a signal came, memory ran out, or the task under way was told to stop."""
    if watch.signalled or is_cancelled(error):
        return True
    try:
        return is_out_of_memory(error)
    except BaseException as own:  # the text of the user's exception may raise anything
        return isinstance(own, MemoryError)


def failure(place: str, error: BaseException) -> RunError:
    """The error that says what the user's code raised, and on which line."""
    if isinstance(error, RunError | UserError):
        return RunError(f"{place}: {error}")
    line, traceback = "", error.__traceback__
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if os.path.basename(file) in place:  # noqa: PTH119 as it is called there
            line = f" ({os.path.basename(file)}, line {traceback.tb_lineno})"  # noqa: PTH119
        traceback = traceback.tb_next
    text = text_of(error)
    return RunError(f"{place}: {type(error).__name__}{': ' if text else ''}{text}{line}")


def is_cancelled(error: BaseException) -> bool:
    """Whether the task under way was told to stop, and did not raise this by itself."""
    if not isinstance(error, asyncio.CancelledError):
        return False
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop runs here
        return False
    return task is not None and task.cancelling() > 0


HEAP_TYPE = 1 << 9
"""The flag of types that were made by a class statement."""


def guarded(part: Any, place: str) -> Any:
    """A function, or an object that can be called, each call of it and of its methods within `user_code`.

    An object stays an instance of its class, with the same attributes, so that a dataclass keeps its settings.
    """
    kind = type(part)
    if not kind.__flags__ & HEAP_TYPE:  # a function
        return _guard(part, place)
    names = [name for name in dir(kind) if name == "__call__" or not name.startswith("_")]
    methods = {name: _guard(getattr(kind, name), place) for name in names if inspect.isfunction(getattr(kind, name))}
    own = type(kind.__name__, (kind,), {"__slots__": (), "__module__": kind.__module__, **methods})
    other = copy.copy(part)
    object.__setattr__(other, "__class__", own)
    return other


def _guard(function: Callable[..., Any], place: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        with user_code(place):
            return function(*arguments, **named)

    return call
