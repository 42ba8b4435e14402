"""Boxes that are started ahead: while a program runs, the box of the next one is built and its interpreter started.

Each runs one program and is thrown away, so that no program finds anything that another one left.
"""

import atexit
import contextlib
import os
from threading import Lock

from groupwise.rewards.boxes import Limits, Outcome, SandboxError
from groupwise.rewards.sandbox import Box, Program

AHEAD = min(4, os.cpu_count() or 1)
"""Boxes that wait for a program."""


class Waiting:
    """Boxes of one kind and with the same limits that wait for a program."""

    def __init__(self) -> None:
        self._ready: list[Program] = []
        self._building = 0
        """Boxes that are being built, each by the thread that runs a program; they count as waiting."""
        self._lock = Lock()

    def run(self, box: Box, source: str, stdin: str, limits: Limits) -> Outcome:
        """As `Box.run`.

        Raises:
            SandboxError: the box could not be built.
        """
        with self._take(box, limits) or Program(box, limits) as program:
            program.give(source, stdin)
            self._build(box, limits)
            return program.outcome()

    def _build(self, box: Box, limits: Limits) -> None:
        """Start the box of a later program, if too few wait."""
        with self._lock:
            if len(self._ready) + self._building >= AHEAD:
                return
            self._building += 1
        built: list[Program] = []
        try:
            with contextlib.suppress(SandboxError):  # which concerns the later program, not the one that runs
                built = [Program(box, limits)]
        finally:
            with self._lock:
                self._building -= 1
                self._ready += built

    def _take(self, box: Box, limits: Limits) -> Program | None:
        while True:
            with self._lock:
                if not self._ready:
                    return None
                program = self._ready.pop(0)
            if program.box == box and program.limits == limits and program.waits:
                return program
            program.close()

    def close(self) -> None:
        with self._lock:
            ended, self._ready = self._ready, []
        for program in ended:
            program.close()

    def forget(self) -> None:
        """In a forked process, whose parent they belong to."""
        self._ready, self._building, self._lock = [], 0, Lock()


WAITING = Waiting()
atexit.register(WAITING.close)
os.register_at_fork(after_in_child=WAITING.forget)
