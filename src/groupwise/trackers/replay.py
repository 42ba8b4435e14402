"""Send what a run's directory holds to a tracker, each record once, however often the run or the tracker is stopped.

What has been sent is kept in RUN/trackers/NAME.json, by step. A record that is in metrics.jsonl twice, since a resumed run does
some steps again, is sent once.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from groupwise.config import Source, TrackersSection, explain, read_tree
from groupwise.errors import UserError
from groupwise.evidence.reading import LeftOut, number, read_objects, step_of
from groupwise.evidence.report import write_page
from groupwise.evidence.runs import open_run
from groupwise.files import write_atomically
from groupwise.text import shortened, visible
from groupwise.trackers.base import SAMPLE_COLUMNS, Destination, Opening, open_destination
from groupwise.training.metrics_file import METRICS, TRAINED

LONGEST_SAMPLE = 20_000
"""Characters of a text in a table of samples."""


def read_recipe(run: Path) -> tuple[dict[str, Any], TrackersSection]:
    """A run's recipe, and the settings of its trackers.

    Raises:
        UserError: `run` is no run directory, or its recipe is not what it was.
    """
    recipe = run / "recipe.toml"
    if not recipe.is_file():
        raise UserError(f"{run}: not a run directory: it has no recipe.toml")
    tree, text = read_tree(recipe)
    section, source = tree.get("trackers", {}), Source(recipe, text)
    if not isinstance(section, dict):
        raise source.error("trackers", f"expected a table, not {section!r}")
    try:
        return tree, TrackersSection.model_validate(section)
    except ValidationError as error:
        raise explain(error, TrackersSection, source, "trackers.") from error


class Replay:
    """A run on its way to one tracker. Use `locked` around it, so that no other process sends the same."""

    def __init__(self, run: Path, tracker: str) -> None:
        """Raises:
        UserError: see `read_recipe`.
        """
        self.run, self.tracker = run, tracker
        self.recipe, self.settings = read_recipe(run)
        training = self.recipe.get("training")
        self.steps = step_of(training.get("steps") if isinstance(training, dict) else None) or 0
        self.state_path = run / "trackers" / f"{tracker}.json"
        state = self._state()
        self.identity: str | None = state.get("identity")
        self.sent: tuple[int, int] = tuple(state.get("sent", (-1, 0)))
        """(step, 1 for an evaluation and 0 for a training step) of the last record that was sent."""
        self.reported: int = state.get("reported", -1)
        """The step of the last report that was sent."""
        self.position = 0
        """How many bytes of metrics.jsonl have been read."""
        self.destination: Destination | None = None

    def _state(self) -> dict[str, Any]:
        """
        Raises:
            UserError: what is kept of the records that were sent cannot be read.
        """
        try:
            state: dict[str, Any] = json.loads(self.state_path.read_bytes()) if self.state_path.exists() else {}
            _, _ = state.get("sent", (-1, 0))
        except (ValueError, TypeError, AttributeError, RecursionError, OSError) as error:
            raise UserError(
                f"{self.state_path}: cannot be read, so it is not known what was sent; remove it to send all again: {error}"
            ) from error
        return state

    def send_new(self) -> int:
        """Send the records that have not been sent; returns how many that were."""
        count = 0
        for record in self._unread():
            key = (record["step"], 0 if TRAINED in record else 1)
            if key > self.sent:
                self._send(record)
                self.sent = key
                self._save()
                count += 1
        return count

    def finish(self) -> None:
        """Send the report, if the run is complete and that has not been done, and close the destination."""
        try:
            if self.sent == (self.steps, 1) and self.reported < self.steps:
                self._opened().write_report(self.steps, self._report())
                self.reported = self.steps
                self._save()
        finally:
            if self.destination is not None:
                self.destination.close()
                self.destination = None

    def _report(self) -> Path:
        """The page about the run, which the first tracker to need it writes."""
        page = self.run / "report.html"
        with locked(self.run, "report", wait=True):
            if not page.exists() or page.stat().st_mtime < (self.run / METRICS).stat().st_mtime:
                write_page([open_run(self.run)], page)
        return page

    def _unread(self) -> Iterator[dict[str, Any]]:
        """Records of lines that are complete; from the start again where a resumed run made the file shorter."""
        path = self.run / METRICS
        if not path.exists():
            return
        if path.stat().st_size < self.position:
            self.position = 0
        with path.open("rb") as file:
            file.seek(self.position)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.position += len(line)
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):  # a damaged line
                    continue
                if isinstance(record, dict) and (step := step_of(record.get("step"))) is not None:
                    yield {**record, "step": step}

    def _send(self, record: dict[str, Any]) -> None:
        """A record's numbers, and its step's samples where they are due; what was not finite is null in the file."""
        step = record.pop("step")
        lists = {key: value for key, value in record.items() if isinstance(value, list) and None not in map(number, value)}
        single = {key: value[0] for key, value in lists.items() if len(value) == 1}
        numbers = {key: value for key, value in record.items() if number(value) is not None}
        bins = {key: value for key, value in lists.items() if key not in single}
        self._opened().write(step, numbers | single, bins)
        every, samples = self.settings.samples_every, self.run / "rollouts" / f"step-{step:06d}.jsonl"
        due = every > 0 and (step % every == 0 or step in (1, self.steps))
        if TRAINED in record and due and samples.exists():
            rows = [row for _, row in read_objects(samples, LeftOut())]
            self._opened().write_samples(step, [[_shown(row.get(column)) for column in SAMPLE_COLUMNS] for row in rows])

    def _opened(self) -> Destination:
        if self.destination is None:
            opening = Opening(
                home=self.run / "trackers",
                project=self.settings.project,
                name=self.settings.name or self.run.resolve().name,
                recipe=self.recipe,
                identity=self.identity,
                offline=self.settings.offline,
            )
            self.destination = open_destination(self.tracker, opening)
            self.identity = self.destination.identity
            self._save()
        return self.destination

    def _save(self) -> None:
        state = {"identity": self.identity, "sent": self.sent, "reported": self.reported}
        write_atomically(self.state_path, json.dumps(state))


def _shown(value: Any) -> Any:
    """A cell of a table of samples: trackers escape HTML and nothing else."""
    return visible(shortened(value, LONGEST_SAMPLE), lines=True) if isinstance(value, str) else value


@contextmanager
def locked(run: Path, name: str, *, wait: bool) -> Iterator[None]:
    """The right to send a run to the tracker `name`, which one process has at a time: that of a killed run may still be sending.

    Raises:
        UserError: another process has it, and this one is not to wait.
    """
    home = run / "trackers"
    home.mkdir(exist_ok=True)
    descriptor = os.open(home / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UserError(f"{run}: another process is sending it to {name}") from error
        yield
    finally:
        os.close(descriptor)


def send_all(run: Path, tracker: str) -> int:
    """Send what a tracker has not been told of a run; returns how many records that were.

    Raises:
        UserError: it is no run, or another process is sending it.
    """
    if not (run / "recipe.toml").is_file():
        raise UserError(f"{run}: not a run directory: it has no recipe.toml")
    with locked(run, tracker, wait=False):
        replay = Replay(run, tracker)
        try:
            return replay.send_new()
        finally:
            replay.finish()
