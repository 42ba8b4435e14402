"""Follow run directories as they are written, kill and resume included, by reading what is new in them. They may be on another
machine's disk: nothing but reads, and no notices of the file system, which shared disks do not send."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from groupwise.errors import UserError
from groupwise.evidence.places import runs_in
from groupwise.evidence.runs import Run, open_run

FILES = ("metrics.jsonl", "events.jsonl", "segments.jsonl", "recipe.toml")


@dataclass(slots=True)
class Followed:
    """One run's directory."""

    path: Path
    run: Run | None = None
    """As it was read last; it stays when its directory goes."""
    reason: str = ""
    """Why it cannot be read."""
    seen: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Of each file what tells that it has changed."""

    def poll(self) -> bool:
        """Read what is new; returns whether anything is."""
        seen = {name: found for name in FILES if (found := _signature(self.path / name)) is not None}
        if seen == self.seen and (self.run is not None or self.reason):
            return False
        if self.run is not None and not seen:  # gone, or its disk is: what is known is kept
            return False
        self.seen, before = seen, self.reason
        try:
            self.run, self.reason = open_run(self.path), ""
        except UserError as error:
            self.reason = str(error).removeprefix(f"{self.path}: ")
            return self.reason != before
        return True


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
        wanted: dict[Path, Path] = {}
        for place in self.places:
            for path in runs_in(place) or [place]:
                wanted.setdefault(path.resolve(), path)
        for key, one in self.followed.items():
            if one.run is not None and any(key.is_relative_to(place.resolve()) for place in self.places):
                wanted.setdefault(key, one.path)
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

    def __iter__(self) -> Iterator[Followed]:
        return iter(self.followed.values())
