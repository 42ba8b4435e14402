"""Signals. SIGINT, SIGTERM and SIGHUP stop a run when its step is over, and at once when they come again; SIGUSR1 asks for a
checkpoint."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAVE = signal.SIGUSR1
FAREWELL_LIMIT = 2.0
"""Seconds that a process which is to end at once takes to say so, on a terminal that may be gone or stopped, and for each thing
that it removes."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop. Its checkpoint is written."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        return exit_code(self.number)


def exit_code(number: int) -> int:
    """What the command line exits with: a terminal that was closed asks for the same as SIGTERM."""
    return 128 + (signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)


def survive_save() -> None:
    """Keep a SIGUSR1 that comes before or after anybody hears it from ending the process. It is not ignored, since programs that
    this process starts would inherit that."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(SAVE, lambda *_: None)


class Interrupt:
    """What signals have asked for."""

    def __init__(self, end: Callable[[int], None] | None = None, note: Callable[[str], None] | None = None) -> None:
        """`end`: ends the run at once, from any thread; None: KeyboardInterrupt is raised. `note`: shows a text to the user."""
        self.end, self.note = end, note
        self.stop: int | None = None
        """The signal that asked the run to stop after its step."""
        self.save = False
        """Whether a checkpoint was asked for."""
        self.at_once = True
        """Whether the first signal already stops at once: outside of steps there is nothing to finish."""
        self.raised = False
        """Whether KeyboardInterrupt was raised for a signal."""
        self.release: Callable[[], None] = lambda: None
        """Give the signals back to the handlers that they had before."""

    def hear(self, number: int) -> None:
        """Note a signal, or stop at once.

        Raises:
            KeyboardInterrupt: at once, and there is no `end`.
        """
        if number == SAVE:
            self.save = True
        elif self.at_once or self.stop is not None:
            if self.end is None:
                self.raised = True
                raise KeyboardInterrupt
            self.end(number)
        else:
            self.stop = number
            if self.note is not None:
                text = f"{signal.Signals(number).name}: finishing the step and saving it; once more stops at once"
                # In a thread: what was interrupted may hold the terminal.
                threading.Thread(target=self.note, args=(text,), daemon=True).start()

    @contextmanager
    def in_steps(self) -> Iterator[None]:
        """Within: the first signal waits for the end of the step."""
        self.at_once = False
        try:
            yield
        finally:
            self.at_once = True


@contextmanager
def interruptible(interrupt: Interrupt) -> Iterator[None]:
    """Within: `interrupt` hears the signals, until it is released. Outside of the main thread, which alone may set handlers,
    nothing is heard."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # nohup ignores SIGHUP, and a shell's script SIGINT for what it runs in the background: such are meant for others.
    numbers = [*(number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN), SAVE]
    watcher = None if interrupt.end is None else _Watcher(interrupt)

    def handle(number: int, frame: FrameType | None) -> None:
        if watcher is None:
            interrupt.hear(number)

    before: dict[int, Any] = {number: signal.signal(number, handle) for number in numbers}

    def release() -> None:
        interrupt.release = lambda: None
        _in_child.clear()
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # None: set by other than Python
        if watcher is not None:
            watcher.close()

    interrupt.release = release
    _in_child[:] = [release]
    try:
        yield
    finally:
        interrupt.release()


class _Watcher:
    """A thread that hears each signal when it comes. Python's own handlers wait until the main thread is done with the call into
    C++ that it is in, which a backward pass or a library of the user's may hold for minutes."""

    def __init__(self, interrupt: Interrupt) -> None:
        self.interrupt = interrupt
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        self.before = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._run, name="signals", daemon=True).start()

    def close(self) -> None:
        signal.set_wakeup_fd(self.before)
        self.writer.close()

    def _run(self) -> None:
        with self.reader:
            while numbers := self.reader.recv(64):
                for number in numbers:
                    if number in (*STOPS, SAVE):
                        self.interrupt.hear(number)


_in_child: list[Callable[[], None]] = []
"""Gives the signals back in a forked process: those that its parent sends to it are its own, and must end it."""
os.register_at_fork(after_in_child=lambda: [release() for release in _in_child[:]])


_at_forced_end: list[Callable[[], None]] = []


@contextmanager
def at_forced_end(remove: Callable[[], None]) -> Iterator[None]:
    """Within: an end at once calls this, for what a killed process would leave in memory."""
    _at_forced_end.append(remove)
    try:
        yield
    finally:
        _at_forced_end.remove(remove)


def ending(farewell: Callable[[], None]) -> Callable[[int], None]:
    """An `end` for `Interrupt` that ends the process. Nothing is unwound but what `at_forced_end` was told, so that nothing can
    hold it up or complain; all files are as after a kill, from which a run goes on."""

    def end(number: int) -> None:
        for call in (farewell, *_at_forced_end):
            called = threading.Thread(target=call, daemon=True)
            called.start()
            called.join(FAREWELL_LIMIT)
        os._exit(exit_code(number))

    return end
