"""Commands of groupwise in processes of their own, which no signal to this one leaves behind."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import IO

from groupwise.training.interrupts import STOPS, Interrupted

LOOK = 0.1
"""Seconds between two looks for signals."""


class Commands:
    """Runs commands, and passes on to them the signals that this process gets."""

    def __init__(self) -> None:
        self.signals: list[int] = []
        """Those that came. No command begins after the first."""

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within: signals that ask this process to stop go to the commands that run. Only for the main thread; in another one
        nothing is heard.

        Raises:
            Interrupted: at the end, if one came.
        """
        before = {}
        if threading.current_thread() is threading.main_thread():
            ours = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]  # ignored: nohup
            before = {number: signal.signal(number, self._hear) for number in ours}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # None: set by other than Python
        if self.signals:
            raise Interrupted(self.signals[0])

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.signals.append(number)

    def run(self, arguments: Sequence[str], output: IO[str], environment: Mapping[str, str]) -> int | None:
        """Run `groupwise ARGUMENTS` to its end, from any thread; returns its exit code, or None if a signal came before."""
        if self.signals:
            return None
        process = subprocess.Popen(
            [sys.executable, "-m", "groupwise.experiments.child", str(os.getpid()), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C comes once, from here
        )
        passed = 0
        while True:
            try:
                return process.wait(LOOK)
            except subprocess.TimeoutExpired:
                for number in self.signals[passed:]:
                    process.send_signal(number)
                    passed += 1
