"""SwanLab: online where the library is logged in, else with `offline = true` in RUN/trackers/swanlab for `swanlab sync`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import swanlab

from groupwise.trackers.base import SAMPLE_COLUMNS, Opening


class SwanLab:
    """A run of SwanLab, found again by its id."""

    def __init__(self, opening: Opening) -> None:
        self.identity = opening.identity or uuid4().hex[:12]
        self.run: Any = swanlab.init(
            project=opening.project,
            name=opening.name,
            id=self.identity,
            resume="allow",
            config=dict(opening.recipe),
            log_dir=str(opening.home / "swanlab"),
            mode="offline" if opening.offline else None,  # None: as SWANLAB_MODE says
        )

    def write(self, step: int, numbers: Mapping[str, float], bins: Mapping[str, Sequence[float]]) -> None:
        """SwanLab has no histograms with given sums, so each bin is a number of its own."""
        each = {f"{key}/{i:02d}": value for key, sums in bins.items() for i, value in enumerate(sums)}
        self.run.log({**numbers, **each}, step=step)

    def write_samples(self, step: int, rows: Sequence[Sequence[Any]]) -> None:
        table = swanlab.echarts.Table()
        table.add(list(SAMPLE_COLUMNS), [list(row) for row in rows])
        self.run.log({"samples": table}, step=step)

    def write_report(self, step: int, page: Path) -> None:
        self.run.log({"report": swanlab.Html(page.read_text(encoding="utf-8"))}, step=step)

    def close(self) -> None:
        swanlab.finish()


def open_destination(opening: Opening) -> SwanLab:
    return SwanLab(opening)
