"""Recorders that a recipe's `trackers.names` adds to a run's directory and the terminal."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from groupwise.config import Source, TrackersSection
from groupwise.errors import UserError, nearest
from groupwise.plugins import is_reference, load_function
from groupwise.training.events import Recorder

TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Recorder]] = {}
"""Name -> a function of (run directory, resolved recipe). To add one: a module with such a function, and one line here."""


def build_trackers(settings: TrackersSection, source: Source, run: Path, recipe: Mapping[str, Any]) -> list[Recorder]:
    """The recorders that a recipe names.

    Raises:
        UserError: there is none of that name.
    """
    found = []
    for name in settings.names:
        try:
            if is_reference(name):
                make = load_function(name, Path(source.path).parent).function
            elif name in TRACKERS:
                make = TRACKERS[name]
            else:
                raise UserError(f'there is no tracker {name!r}{nearest(name, TRACKERS)}; your own is "file.py:name"')
        except UserError as error:
            raise source.error("trackers.names", str(error)) from error
        found.append(make(run, recipe))
    return found
