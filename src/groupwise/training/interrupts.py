"""Ctrl-C and SIGTERM, acted on between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class Interrupted(Exception):
    """The user asked the run to stop; its checkpoint is written."""


@dataclass(slots=True)
class Interrupt:
    """Whether a stop was asked for."""

    requested: bool = False


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Within: the first Ctrl-C (or SIGTERM) is noted, to be acted on when the step is over; the second acts at once."""
    interrupt = Interrupt()

    def note(signum: int, frame: object) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True

    in_main_thread = threading.current_thread() is threading.main_thread()  # the only one that may set handlers
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
