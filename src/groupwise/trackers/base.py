"""What a tracker's module offers: a function `open_destination(Opening) -> Destination`, in `groupwise.trackers.NAME`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

SAMPLE_COLUMNS = ("rank", "prompt", "answer", "completion", "reward", "correct", "stop")
"""The columns of a table of samples: the keys of a line of rollouts/step-*.jsonl."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What a destination is opened with."""

    home: Path
    """RUN/trackers, where a destination keeps files of its own."""
    project: str
    name: str
    """What the run is called there."""
    recipe: Mapping[str, Any]
    """The resolved recipe."""
    identity: str | None
    """What the destination called itself when it was first opened; None: it is opened for the first time."""
    offline: bool
    """Whether nothing may leave this machine."""


class Destination(Protocol):
    """A run as a tracker knows it, to be written to in the order of steps."""

    identity: str
    """By which the run is found again when it is taken up later."""

    def write(self, step: int, numbers: Mapping[str, float], bins: Mapping[str, Sequence[float]]) -> None:
        """Metrics of a step or an evaluation; `bins` are sums over bins, in the order of the bins."""
        ...

    def write_samples(self, step: int, rows: Sequence[Sequence[Any]]) -> None:
        """Completions of a step; the entries of a row are `SAMPLE_COLUMNS`."""
        ...

    def write_report(self, step: int, page: Path) -> None:
        """The report of the finished run, one HTML page."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


def open_destination(tracker: str, opening: Opening) -> Destination:
    """The destination of a tracker by name."""
    destination: Destination = import_module(f"groupwise.trackers.{tracker}").open_destination(opening)
    return destination


def histogram(counts: Sequence[float]) -> tuple[list[float], list[int]]:
    """Sums over bins as the pair (counts, edges) that numpy.histogram gives; bin i lies between the edges i and i + 1."""
    return list(counts), list(range(len(counts) + 1))
