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
        self._lock = Lock()

    def run(self, box: Box, source: str, stdin: str, limits: Limits) -> Outcome:
        """As `Box.run`.

        Raises:
            SandboxError: the box could not be built.
        """
        with self._take(box, limits) or Program(box, limits) as program:
            program.give(source, stdin)
            with self._lock:
                short = len(self._ready) < AHEAD
            if short:
                with contextlib.suppress(SandboxError):  # which concerns the next program, not this one
                    ahead = Program(box, limits)
                    with self._lock:
                        self._ready.append(ahead)
            return program.outcome()

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
        self._ready, self._lock = [], Lock()


WAITING = Waiting()
atexit.register(WAITING.close)
os.register_at_fork(after_in_child=WAITING.forget)
