"""trackio: a local database that `trackio show` draws; TRACKIO_SPACE_ID and TRACKIO_SERVER_URL send it elsewhere."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trackio

from groupwise.trackers.base import SAMPLE_COLUMNS, Opening, histogram

ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
"""Environment variables that send a run over the network."""


class Trackio:
    """A run of trackio, found again by its name."""

    def __init__(self, opening: Opening) -> None:
        self.identity = opening.name
        if opening.offline:
            for name in ELSEWHERE:
                os.environ.pop(name, None)
        self.run: Any = trackio.init(
            project=opening.project,
            name=opening.name,
            config=dict(opening.recipe),
            resume="never" if opening.identity is None else "allow",
            embed=False,
        )

    def write(self, step: int, numbers: Mapping[str, float], bins: Mapping[str, Sequence[float]]) -> None:
        histograms = {key: trackio.Histogram(np_histogram=histogram(sums)) for key, sums in bins.items()}
        self.run.log({**numbers, **histograms}, step=step)

    def write_samples(self, step: int, rows: Sequence[Sequence[Any]]) -> None:
        table = trackio.Table(columns=list(SAMPLE_COLUMNS), data=[list(row) for row in rows])
        self.run.log({"samples": table}, step=step)

    def write_report(self, step: int, page: Path) -> None:
        self.run.log({"report": trackio.Html(page.read_text(encoding="utf-8"))}, step=step)

    def close(self) -> None:
        self.run.finish()


def open_destination(opening: Opening) -> Trackio:
    return Trackio(opening)
