"""Weights & Biases: online where the library is logged in, else with `offline = true` in RUN/trackers/wandb for `wandb sync`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import wandb

from groupwise.trackers.base import SAMPLE_COLUMNS, Opening, histogram


class WeightsAndBiases:
    """A run of wandb, found again by its id. Records of one step are merged by wandb, and steps that it has are ignored."""

    def __init__(self, opening: Opening) -> None:
        self.identity = opening.identity or uuid4().hex[:12]
        self.run: Any = wandb.init(
            project=opening.project,
            name=opening.name,
            id=self.identity,
            resume="allow",
            config=dict(opening.recipe),
            dir=str(opening.home),
            mode="offline" if opening.offline else None,  # None: as WANDB_MODE says
            settings=wandb.Settings(console="off", silent=True),
        )

    def write(self, step: int, numbers: Mapping[str, float], bins: Mapping[str, Sequence[float]]) -> None:
        histograms = {key: wandb.Histogram(np_histogram=histogram(sums)) for key, sums in bins.items()}
        self.run.log({**numbers, **histograms}, step=step)

    def write_samples(self, step: int, rows: Sequence[Sequence[Any]]) -> None:
        self.run.log({"samples": wandb.Table(columns=list(SAMPLE_COLUMNS), data=[list(row) for row in rows])}, step=step)

    def write_report(self, step: int, page: Path) -> None:
        self.run.log({"report": wandb.Html(page.read_text(encoding="utf-8"), inject=False)}, step=step)

    def close(self) -> None:
        self.run.finish()
        wandb.teardown()  # waits until its own process has written everything, which finish() does not


def open_destination(opening: Opening) -> WeightsAndBiases:
    return WeightsAndBiases(opening)
