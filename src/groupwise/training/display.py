"""Progress on the terminal: a live display, or plain lines where the output is no terminal."""

import time
from collections.abc import Iterator, Mapping

from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from groupwise.terminal import Terminal
from groupwise.text import shortened
from groupwise.training.events import Evaluated, Event, StepDone
from groupwise.training.metrics_file import TRAINED

COLUMNS = {
    "eval/pass@1": ("held-out pass@1", "{:.3f}"),
    "eval/reward": ("held-out reward", "{:.3f}"),
    "train/pass_rate": ("train pass rate", "{:.3f}"),
    TRAINED: ("reward", "{:.3f}"),
    "entropy": ("entropy", "{:.3f}"),
    "groups/zero_variance": ("zero-variance groups", "{:.0%}"),
    "length/mean": ("length", "{:.1f}"),
    "tools/calls": ("tool calls", "{:.2f}"),
    "clip_fraction": ("clipped", "{:.4f}"),
    "cluster/age_max": ("age", "{:.0f}"),
    "cluster/groups_under_way": ("under way", "{:.0f}"),
    "cluster/idle/learner": ("learner idle", "{:.0%}"),
    "cluster/idle": ("samplers idle", "{:.0%}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
}
"""Metric -> (what it is called, how it is written)."""


LONGEST_NOTE = 4000
"""Characters of a note that are shown; the message of an error may hold a whole completion."""


class Display:
    """Shows the newest value of each metric, and the time that is left."""

    def __init__(self, console: Terminal, steps: int, start: int = 0) -> None:
        self.console, self.steps, self.start = console, steps, start
        self.step = start
        self.values: dict[str, float] = {}
        self.trail: list[float] = []
        self._advised: set[str] = set()
        self._started = time.monotonic()
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._live:
            self._live.stop()

    def begin_at(self, step: int) -> None:
        """The run is taken up after this step."""
        self.start = self.step = step

    def record(self, event: Event) -> None:
        """Show what an event says; the display is a `Recorder`."""
        if isinstance(event, StepDone):
            self._update(event.step, event.metrics)
        elif isinstance(event, Evaluated):
            self._update(event.step, event.evaluation.metrics)
        elif event.kind != "fault":  # which is raised, and shown by whoever started the run
            known = event.name in self._advised
            self._advised |= {event.name} - {""}
            self.note(f"step {event.step}: {event.text}", "" if known else event.advice)

    def _update(self, step: int, metrics: Mapping[str, float | list[float]]) -> None:
        self.step = step
        self.values |= {name: value for name, value in metrics.items() if not isinstance(value, list)}
        trained = TRAINED in metrics
        if trained:
            self.trail.append(self.values["train/pass_rate" if "train/pass_rate" in metrics else TRAINED])
        if self._live:
            self._live.update(self._panel())
        elif trained:
            self.console.print(f"step {step}/{self.steps}  {self._line()}  {self._left()} left", soft_wrap=True)

    def note(self, text: str, advice: str = "") -> None:
        said = Text(shortened(text, LONGEST_NOTE)).append(f". {advice}" if advice else "", "dim")
        self.console.print(said, soft_wrap=True)

    def _items(self) -> list[tuple[str, str]]:
        return [(name, form.format(self.values[key])) for key, (name, form) in self._columns()]

    def _columns(self) -> Iterator[tuple[str, tuple[str, str]]]:
        """Of the metrics that are there; rewards only where there are no pass rates."""
        instead = {"eval/reward": "eval/pass@1", TRAINED: "train/pass_rate"}
        for key, column in COLUMNS.items():
            if key in self.values and instead.get(key) not in self.values:
                yield key, column

    def _line(self) -> str:
        return "  ".join(f"{name} {value}" for name, value in self._items())

    def _left(self) -> str:
        done = self.step - self.start
        if done == 0:
            return "?"
        seconds = round((time.monotonic() - self._started) / done * (self.steps - self.step))
        return f"{seconds // 60}:{seconds % 60:02d}"

    def _panel(self) -> Panel:
        table = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=self.steps, completed=self.step, width=40)
        table.add_row(f"step {self.step}/{self.steps}", bar, f"{self._left()} left")
        for name, value in self._items():
            table.add_row(
                name, Text(value, style="bold"), _sparkline(self.trail) if name in ("train pass rate", "reward") else ""
            )
        return Panel(table, title="groupwise", border_style="cyan")


def _sparkline(values: list[float], width: int = 40) -> str:
    marks = "▁▂▃▄▅▆▇█"
    return "".join(marks[min(7, int(value * 8))] for value in values[-width:])
