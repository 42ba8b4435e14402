"""Follow run directories as they are written, kill and resume included, by reading what is new in them. They may be on another
machine's disk: nothing but reads, and no notices of the file system, which shared disks do not send."""

from bisect import insort
from collections.abc import Iterable, Iterator
from pathlib import Path

from groupwise.errors import UserError
from groupwise.evidence.history import Noted, event_of
from groupwise.evidence.places import runs_in
from groupwise.evidence.reading import LeftOut, parsed
from groupwise.evidence.records import Metrics
from groupwise.evidence.runs import Run, assembled, check_run
from groupwise.evidence.tail import Tail


class Followed:
    """One run's directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run: Run | None = None
        """As it was read last; it stays when its directory goes."""
        self.reason = ""
        """Why it cannot be read; empty: its directory is not there yet."""
        self._metrics, self._events = Metrics(), list[Noted]()
        self._of_metrics, self._of_events = LeftOut(), LeftOut()
        self._metrics_file, self._events_file = Tail(path / "metrics.jsonl"), Tail(path / "events.jsonl")
        self._settings: tuple[object, ...] = ()
        """Tells that the settings have changed."""

    def poll(self) -> bool:
        """Read what is new; returns whether anything is."""
        try:
            if not self.path.is_dir():
                return self._refused("")
            if self.run is None:
                check_run(self.path)
            grown = self._metrics_file.read(self._take_metrics, self._forget_metrics)
            noted = self._events_file.read(self._take_event, self._forget_events)
            settings = tuple(_signature(self.path / name) for name in ("recipe.toml", "segments.jsonl"))
            if self.run is not None and not grown and not noted and settings == self._settings:
                return False
            left_out = LeftOut()
            for tail, of_file in ((self._metrics_file, self._of_metrics), (self._events_file, self._of_events)):
                left_out.include(of_file)
                if tail.problem:
                    left_out.add(tail.path.name, tail.problem)
            self.run, self.reason = assembled(self.path, self._metrics, list(self._events), left_out), ""
            self._settings = settings
        except (UserError, OSError) as error:
            return self._refused(str(error).removeprefix(f"{self.path}: "))
        return True

    def _refused(self, reason: str) -> bool:
        changed, self.reason = self.run is None and reason != self.reason, reason
        return changed

    def _take_metrics(self, number: int, line: bytes) -> None:
        if (found := parsed(line, "metrics.jsonl", number, self._of_metrics)) is not None:
            self._metrics.add(found, self._of_metrics, line=number)

    def _forget_metrics(self) -> None:
        self._metrics, self._of_metrics = Metrics(), LeftOut()

    def _take_event(self, number: int, line: bytes) -> None:
        if (found := parsed(line, "events.jsonl", number, self._of_events)) is None:
            return
        event = event_of(found, self._of_events, "events.jsonl", number)
        if event is not None:
            insort(self._events, event, key=lambda event: event.step)

    def _forget_events(self) -> None:
        self._events, self._of_events = [], LeftOut()


def _signature(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


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
        known = [(key, one) for key, one in self.followed.items() if one.run is not None]
        wanted: dict[Path, Path] = {}
        for place in self.places:
            inside = {path.resolve(): path for path in runs_in(place)}
            inside |= {key: one.path for key, one in known if key not in inside and key.is_relative_to(place.resolve())}
            wanted |= inside or {place.resolve(): place}
        kept = {key: self.followed.get(key) or Followed(path) for key, path in wanted.items() if key not in self.left_out}
        changed = kept.keys() != self.followed.keys()
        self.followed = kept
        return changed

    def poll(self) -> bool:
        """Read what is new in the runs; returns whether anything is."""
        return sum(one.poll() for one in self.followed.values()) > 0  # each is to be read

    def add(self, path: Path) -> None:
        """Follow a path too.

        Raises:
            UserError: there is no run at it.
        """
        found = [run.resolve() for run in runs_in(path)]
        if not found:
            raise UserError(
                f"{path}: not a run directory (no recipe.toml with records beside it), and no directory with runs in it"
            )
        self.left_out -= set(found)
        if not all(run in self.followed for run in found):
            self.places.append(path)

    def remove(self, key: Path) -> None:
        """Follow a run no longer. `key`: its resolved path."""
        self.places = [place for place in self.places if place.resolve() != key]
        self.left_out.add(key)

    @property
    def runs(self) -> list[Run]:
        """Those that could be read."""
        return [one.run for one in self if one.run is not None]

    def __iter__(self) -> Iterator[Followed]:
        return iter(self.followed.values())
