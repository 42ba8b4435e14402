"""How a run went: the segments between its resumes, whose settings may differ, and the events that it recorded."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groupwise.config.effects import BY_ROUNDING, effect
from groupwise.config.trees import changes
from groupwise.errors import short
from groupwise.evidence.reading import LeftOut, clean_recipe, read_objects, step_of

MISSING = "not set"


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Steps of a run that were done with one set of settings, between a start or resume and the next."""

    first_step: int
    started: str
    version: str
    """groupwise's."""
    changed: Mapping[str, tuple[Any, Any]]
    """Dotted key -> its value in the segment before and in this one."""
    recipe: Mapping[str, Any]
    """All settings; empty: not recorded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """An event of a run: something that a person should know."""

    step: int
    time: str
    kind: str
    """ "note", "warning" or "fault"."""
    name: str
    text: str
    advice: str


def read_segments(path: Path, left_out: LeftOut) -> list[Segment]:
    """The segments of segments.jsonl of which steps may be left, in order: a resume undoes the steps from its first one on.

    What changed is compared anew where both segments recorded their settings, since the segment before may have been undone.
    """
    segments: list[Segment] = []
    for line, found in read_objects(path, left_out):
        first = step_of(found.get("first_step"))
        if first is None:
            left_out.add(path.name, "has no first_step", line)
            continue
        segments = [segment for segment in segments if segment.first_step < first]
        recipe = found.get("recipe")
        recipe = clean_recipe(recipe, path.name, left_out) if isinstance(recipe, dict) else {}
        before = segments[-1] if segments else None
        if before is None:
            changed = {}
        else:
            changed = _pairs(changes(before.recipe, recipe) if before.recipe and recipe else found.get("changed"))
        segments.append(
            Segment(
                first_step=first,
                started=text_of(found.get("started")),
                version=text_of(found.get("groupwise")),
                changed=changed,
                recipe=recipe,
            )
        )
    return segments


def _pairs(changed: Any) -> dict[str, tuple[Any, Any]]:
    """Pairs of an old and a new value; None: not set."""
    items = changed.items() if isinstance(changed, dict) else ()
    pairs = {key: pair for key, pair in items if isinstance(pair, list) and len(pair) == 2}
    return {key: (MISSING if old is None else old, MISSING if new is None else new) for key, (old, new) in pairs.items()}


def course(segments: Iterable[Segment], last_step: int) -> dict[str, str]:
    """Settings that changed on the way and change results, as text: "0.0001, then 1e-05 from step 31".

    Args:
        segments: of one run.
        last_step: the last step that is recorded; a segment that did no step changed nothing.
    """
    found: dict[str, str] = {}
    for segment in segments:
        if segment.first_step > last_step:
            continue
        for key, (old, new) in segment.changed.items():
            if effect(key, segment.recipe) not in ("", BY_ROUNDING):
                found[key] = f"{found.get(key) or value_text(old)}, then {value_text(new)} from step {segment.first_step:,}"
    return found


def value_text(value: Any) -> str:
    """A setting as a label has it."""
    return value[:60] if isinstance(value, str) else short(value, 60)


def text_of(value: Any) -> str:
    return value[:2000] if isinstance(value, str) else "" if value is None else short(value)


def read_events(path: Path, left_out: LeftOut) -> list[Noted]:
    """The events of events.jsonl, by step."""
    events = [event_of(found, left_out, path.name, line) for line, found in read_objects(path, left_out)]
    return sorted(filter(None, events), key=lambda event: event.step)


def event_of(found: Mapping[str, Any], left_out: LeftOut, file: str, line: int) -> Noted | None:
    """The event in an object of events.jsonl; None, and a note in `left_out`: there is none."""
    step = step_of(found.get("step"))
    if step is None:
        left_out.add(file, "has no step", line)
        return None
    kind, name, text, advice, time = (text_of(found.get(key)) for key in ("kind", "name", "text", "advice", "time"))
    return Noted(step=step, time=time, kind=kind or "note", name=name, text=text, advice=advice)
