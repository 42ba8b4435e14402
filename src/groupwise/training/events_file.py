"""events.jsonl: what a run said of itself, one JSON object a line."""

import threading
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from groupwise.files import DiskError
from groupwise.text import json_line
from groupwise.training.events import Event, Warned
from groupwise.training.metrics_file import append_line


class EventsFile:
    """A `Recorder` that appends each `Warned` to a file. Lines stay when a run is resumed from an earlier step: what they say did
    happen. Whether they can be written never decides about the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()

    def record(self, event: Event) -> None:
        if not isinstance(event, Warned):
            return
        fields = {
            "step": event.step,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "kind": event.kind,
            "name": event.name,
            "text": event.text,
            "advice": event.advice,
            **({"traceback": event.traceback} if event.traceback else {}),
        }
        with self._lock, suppress(DiskError):  # a full disk is one of the things that are said here
            append_line(self.path, (json_line(fields) + "\n").encode())
