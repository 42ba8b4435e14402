"""Follow run directories as they are written, kill and resume included, by reading what is new in them. They may be on another
machine's disk: nothing but reads, and no notices of the file system, which shared disks do not send."""

import os
import stat
from bisect import insort
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from groupwise.errors import UserError
from groupwise.evidence.history import Noted, Segment, event_of
from groupwise.evidence.places import runs_in
from groupwise.evidence.reading import LeftOut, parsed
from groupwise.evidence.records import Metrics
from groupwise.evidence.runs import Run, assembled, check_run, read_settings
from groupwise.evidence.tail import Tail

MOST_ADDED = 200
"""Runs that one path may add: more are rarely meant, and reading them takes minutes."""
READ = ("recipe.toml", "segments.jsonl", "metrics.jsonl", "events.jsonl")


Waits = Literal["absent", "empty", "unreadable"]
"""No directory, nothing of a run in it, or something that is wrong."""


class Followed:
    """One run's directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run: Run | None = None
        """As it was read last; it stays when its directory goes."""
        self.reason = ""
        """Why it cannot be read; empty: it can, or there is no run yet."""
        self.waits: Waits = "absent"
        """Why there is no run."""
        self.seen = False
        """Whether it was looked at."""
        self.anew = False
        """Whether it was read from its beginning when it was looked at last, which takes longer than usual."""
        self._was_refused = False
        """Whether `run` says that it cannot be read any more."""
        self._metrics, self._events = Metrics(), list[Noted]()
        self._of_metrics, self._of_events = LeftOut(), LeftOut()
        self._metrics_file, self._events_file = Tail(path / "metrics.jsonl"), Tail(path / "events.jsonl")
        self._settings: tuple[dict[str, Any], list[Segment]] = {}, []
        self._of_settings, self._signatures = LeftOut(), tuple[object, ...]()
        """What of them cannot be read; and what tells that their files have changed."""

    def poll(self) -> bool:
        """Read what is new; returns whether anything is."""
        self.seen, self.anew = True, self.run is None
        try:
            if not self.path.is_dir():
                return self._refused("absent")
            if self.run is None and not any(os.path.lexists(self.path / name) for name in READ):
                return self._refused("empty")
            self._check_files()
            if self.run is None:
                check_run(self.path)
            grown = self._metrics_file.read(self._take_metrics, self._forget_metrics)
            noted = self._events_file.read(self._take_event, self._forget_events)
            changed = self._read_settings()
            if self.run is not None and not (grown or noted or changed or self._was_refused):
                return False
            left_out = LeftOut()
            for tail, of_file in ((self._metrics_file, self._of_metrics), (self._events_file, self._of_events)):
                left_out.include(of_file)
                if tail.problem:
                    left_out.add(tail.path.name, tail.problem)
            left_out.include(self._of_settings)
            self.run, self.reason = assembled(self.path, self._settings, self._metrics, list(self._events), left_out), ""
            self._was_refused = False
        except UserError as error:
            return self._refused("unreadable", str(error).removeprefix(f"{self.path}: ").removeprefix(f"{self.path}/"))
        except OSError as error:
            return self._refused("unreadable", f"{Path(error.filename or self.path).name}: {error.strerror or error}")
        return True

    def _read_settings(self) -> bool:
        """Read the settings where their files have changed, or could not be read; returns whether they were read."""
        signatures = tuple(_signature(self.path / name) for name in READ[:2])
        if signatures == self._signatures and not self._of_settings.failed:
            return False
        left_out = LeftOut()
        self._settings = read_settings(self.path, left_out)
        self._of_settings, self._signatures = left_out, signatures
        return True

    def _check_files(self) -> None:
        for name in READ:
            found = _stat(self.path / name)
            if found is not None and not stat.S_ISREG(found.st_mode):  # a named pipe would be waited for
                raise UserError(f"{self.path}/{name}: is not a file")

    def _refused(self, waits: Waits, reason: str = "") -> bool:
        changed = (waits, reason) != (self.waits, self.reason)
        self.waits, self.reason = waits, reason
        if self.run is None:
            return changed
        if changed and reason:
            self.run.note(UserError(reason))
            self._was_refused = True
        return changed and reason != ""

    def _take_metrics(self, number: int, line: bytes) -> None:
        if (found := parsed(line, "metrics.jsonl", number, self._of_metrics)) is not None:
            self._metrics.add(found, self._of_metrics, line=number)

    def _forget_metrics(self) -> None:
        self.anew = True
        self._metrics, self._of_metrics = Metrics(), LeftOut()

    def _take_event(self, number: int, line: bytes) -> None:
        if (found := parsed(line, "events.jsonl", number, self._of_events)) is None:
            return
        event = event_of(found, self._of_events, "events.jsonl", number)
        if event is not None:
            insort(self._events, event, key=lambda event: event.step)

    def _forget_events(self) -> None:
        self._events, self._of_events = [], LeftOut()


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _signature(path: Path) -> tuple[int, ...] | None:
    found = _stat(path)
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns) if found is not None else None


class Following:
    """The runs that a user watches: each path that was named is a run, or a ladder or directory in which new ones appear."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.places = list(paths)
        self.left_out: set[Path] = set()
        """Runs in those places that the user has removed, resolved."""
        self.followed: dict[Path, Followed] = {}
        """By resolved path."""

    def look(self) -> bool:
        """Look for runs in the places; returns whether there are others than before. A run whose directory has gone stays."""
        wanted: dict[Path, Path] = {}
        gone: dict[Path, Path] = {}
        known = [(key, one.path) for key, one in self.followed.items() if one.run is not None]
        for place in self.places:
            inside, at = {resolved(path): path for path in runs_in(place)}, resolved(place)
            lost = {key: path for key, path in known if key not in inside and key.is_relative_to(at)}
            wanted |= inside or ({} if lost else {at: place})
            gone |= lost
        kept = {
            key: self.followed.get(key) or Followed(path)
            for key, path in self._in_place(wanted, gone).items()
            if key not in self.left_out
        }
        changed = kept.keys() != self.followed.keys()
        self.followed = kept
        return changed

    def _in_place(self, wanted: dict[Path, Path], gone: dict[Path, Path]) -> dict[Path, Path]:
        """Both, those that have gone where they were: the order gives runs their colours."""
        before, order = list(self.followed), list(wanted)
        for key in (key for key in before if key in gone and key not in wanted):
            earlier = [other for other in before[: before.index(key)] if other in order]
            order.insert(order.index(earlier[-1]) + 1 if earlier else 0, key)
        return {key: wanted.get(key) or gone[key] for key in order}

    def poll(self) -> bool:
        """Read what is new in the runs; returns whether anything is."""
        return sum(one.poll() for one in self.followed.values()) > 0  # each is to be read

    def add(self, path: Path, found: Sequence[Path]) -> None:
        """Follow a path too. `found`: the runs there, of `addable`."""
        self.left_out = self.left_out - set(found)
        if resolved(path) not in {resolved(place) for place in self.places}:
            self.places.append(path)

    def remove(self, key: Path) -> None:
        """Follow a run no longer. `key`: its resolved path."""
        self.places = [place for place in self.places if resolved(place) != key]
        self.left_out = self.left_out | {key}  # another thread may be reading it

    @property
    def runs(self) -> list[Run]:
        """Those that could be read."""
        return [one.run for one in self if one.run is not None]

    def __iter__(self) -> Iterator[Followed]:
        return iter(self.followed.values())


def addable(path: Path) -> list[Path]:
    """The runs at a path, resolved.

    Raises:
        UserError: there are none, or more than a page is for.
    """
    found = [resolved(run) for run in runs_in(path, MOST_ADDED + 1)]
    if len(found) > MOST_ADDED:
        raise UserError(f"{path}: there are more than {MOST_ADDED} runs in it; name a directory below it")
    if not found:
        raise UserError(f"{path}: not a run directory (no recipe.toml with records beside it), and no directory with runs in it")
    return found


def resolved(path: Path) -> Path:
    """Where a path leads; itself where links lead in a circle."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        return path.absolute()
