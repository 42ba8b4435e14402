"""Recorders that a recipe's `trackers.names` adds to a run's directory and the terminal."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from groupwise.config import Source, TrackersSection
from groupwise.errors import UserError, nearest
from groupwise.plugins import is_reference, load_function
from groupwise.training.events import Recorder

MakeRecorder = Callable[[Path, Mapping[str, Any]], Recorder]
TRACKERS: dict[str, MakeRecorder] = {}
"""Name -> a function of (run directory, resolved recipe). To add one: a module with such a function, and one line here."""


def find_trackers(settings: TrackersSection, source: Source) -> list[MakeRecorder]:
    """What makes the recorders that a recipe names.

    Raises:
        UserError: there is none of that name.
    """
    found: list[MakeRecorder] = []
    for name in settings.names:
        try:
            if is_reference(name):
                found.append(load_function(name, Path(source.path).parent).function)
            elif name in TRACKERS:
                found.append(TRACKERS[name])
            else:
                raise UserError(f'there is no tracker {name!r}{nearest(name, TRACKERS)}; your own is "file.py:name"')
        except UserError as error:
            raise source.error("trackers.names", str(error)) from error
    return found


def make_trackers(makers: Sequence[MakeRecorder], run: Path, recipe: Mapping[str, Any]) -> list[Recorder]:
    """The recorders of a run.

    Raises:
        UserError: one cannot be made, or is no recorder.
    """
    made = []
    for make in makers:
        try:
            recorder = make(run, recipe)
        except Exception as error:  # the user's tracker may raise anything
            raise UserError(f"trackers.names: {getattr(make, '__name__', make)}: {type(error).__name__}: {error}") from error
        if not hasattr(recorder, "record"):
            raise UserError(
                f"trackers.names: {getattr(make, '__name__', make)} gives {type(recorder).__name__}, which has no record()"
            )
        made.append(recorder)
    return made
