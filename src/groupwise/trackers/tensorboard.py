"""TensorBoard: event files in RUN/trackers/tensorboard, to be shown with `tensorboard --logdir RUN`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from groupwise.config import dump
from groupwise.trackers.base import SAMPLE_COLUMNS, Opening, histogram


class TensorBoard:
    """A directory of event files; a run that is taken up again adds a file to it."""

    def __init__(self, opening: Opening) -> None:
        self.identity = "tensorboard"
        self.writer: Any = SummaryWriter(str(opening.home / "tensorboard"))
        if opening.identity is None:
            self.writer.add_text("recipe", f"```toml\n{dump(dict(opening.recipe))}\n```", 0)

    def write(self, step: int, numbers: Mapping[str, float], bins: Mapping[str, Sequence[float]]) -> None:
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, step)
        for key, sums in bins.items():
            counts, edges = histogram(sums)
            centres = [edge + 0.5 for edge in edges[:-1]]
            self.writer.add_histogram_raw(
                key,
                min=0.0,
                max=float(edges[-1]),
                num=sum(counts),
                sum=sum(count * centre for count, centre in zip(counts, centres, strict=True)),
                sum_squares=sum(count * centre**2 for count, centre in zip(counts, centres, strict=True)),
                bucket_limits=[float(edge) for edge in edges[1:]],
                bucket_counts=counts,
                global_step=step,
            )
        self.writer.flush()

    def write_samples(self, step: int, rows: Sequence[Sequence[Any]]) -> None:
        lines = [_row(SAMPLE_COLUMNS), _row(["---"] * len(SAMPLE_COLUMNS)), *map(_row, rows)]
        self.writer.add_text("samples", "\n".join(lines), step)
        self.writer.flush()

    def write_report(self, step: int, page: Path) -> None:
        """TensorBoard shows no pages, so it is told where the page lies."""
        self.writer.add_text("report", f"`{page}`", step)

    def close(self) -> None:
        self.writer.close()


def _row(values: Sequence[Any]) -> str:
    """A row of a Markdown table; texts keep their line breaks."""
    cells = [str(value).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", "<br>") for value in values]
    return f"| {' | '.join(cells)} |"


def open_destination(opening: Opening) -> TensorBoard:
    return TensorBoard(opening)
