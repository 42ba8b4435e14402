"""What changed of a page's data, so that a step costs the network and the browser a few points for each line."""

from collections.abc import Mapping, Sequence
from typing import Any

from groupwise.evidence.shapes import Document, Figure, Line, Noted, Patch

MEMBERS = ("settings", "runs")
"""Parts of the document of which few fields change with every step."""
LISTS = ("steps", "values", "low", "high", "means")
"""Of a line: one entry for each point."""
SCALARS = ("seeds", "stretch")
"""Of a line: may change while it grows."""


def patches(before: Document, after: Document) -> Patch:
    """What makes `after` of `before`; empty if they are alike.

    Returns:
        "parts": keys of the document with their new values; "events": how many of the first to "keep", how many of the next to
        "drop", and which to "add" at the end; "runs" and "settings": {id: {field: new value}}, where they are the same ones;
        "figures": {"order": ids, if they are others; "whole": {id: figure}; "lines": {id: {line id: points}}}, points being how many
        to "keep" and what comes after these in each list.
    """
    found: Patch = {}
    old, new = dict(before), dict(after)
    parts = {key: value for key, value in new.items() if key not in ("figures", "events", *MEMBERS) and value != old.get(key)}
    if after["events"] != before["events"]:
        found["events"] = _moved(before["events"], after["events"])
    for key in MEMBERS:
        fields = _fields(old[key], new[key])
        if fields is None:
            parts[key] = new[key]
        elif fields:
            found[key] = fields
    if parts:
        found["parts"] = parts
    if figures := _figures(before["figures"], after["figures"]):
        found["figures"] = figures
    return found


def _moved(old: Sequence[Noted], new: Sequence[Noted]) -> dict[str, Any]:
    """A list from which the oldest of a run go while others are added."""
    keep = _common(old, new)
    before, now = old[keep:], new[keep:]
    drop = before.index(now[0]) if now and now[0] in before else len(before)
    if before[drop:] != now[: len(before) - drop]:
        drop = len(before)
    return {"keep": keep, "drop": drop, "add": now[len(before) - drop :]}


def _fields(before: Any, after: Any) -> dict[str, dict[str, Any]] | None:
    """What changed in each of the members; None: they are others."""
    if [member["id"] for member in before] != [member["id"] for member in after]:
        return None
    found = {}
    for old, new in zip(before, after, strict=True):
        if changed := {key: value for key, value in new.items() if value != old.get(key)}:
            found[new["id"]] = changed
    return found


def _figures(before: Sequence[Figure], after: Sequence[Figure]) -> dict[str, Any]:
    known = {figure["id"]: figure for figure in before}
    order = [figure["id"] for figure in after]
    whole: dict[str, Figure] = {}
    lines: dict[str, dict[str, Any]] = {}
    for figure in after:
        old = known.get(figure["id"])
        changed = _grown(old, figure) if old is not None else None
        if changed is None:
            whole[figure["id"]] = figure
        elif changed:
            lines[figure["id"]] = changed
    found: dict[str, Any] = {"order": order} if order != [figure["id"] for figure in before] else {}
    return found | ({"whole": whole} if whole else {}) | ({"lines": lines} if lines else {})


def _grown(old: Figure, new: Figure) -> dict[str, Any] | None:
    """The changes of its lines' points, by line; None: something else changed."""
    if _without(old, "lines") != _without(new, "lines"):
        return None
    before, after = old.get("lines", []), new.get("lines", [])
    if len(before) != len(after):
        return None
    found = {}
    for first, second in zip(before, after, strict=True):
        if _without(first, *LISTS, *SCALARS) != _without(second, *LISTS, *SCALARS):
            return None
        if any((first[name] is None) != (second[name] is None) for name in ("low", "high", "means")):
            return None
        if changed := _points(first, second):
            found[second["id"]] = changed
    return found


def _without(value: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key not in names}


def _points(old: Line, new: Line) -> dict[str, Any]:
    """How many points stay, and what comes after them; empty: nothing changed."""
    lists = [(name, new[name], old[name]) for name in LISTS if new[name] is not None]  # type: ignore[literal-required]
    keep = min(_common(before, now) for _, now, before in lists)
    if keep == len(new["steps"]) == len(old["steps"]) and all(old[name] == new[name] for name in SCALARS):  # type: ignore[literal-required]
        return {}
    tails = {name: list(now[keep:]) for name, now, _ in lists}
    return {"keep": keep, **tails, "seeds": new["seeds"], "stretch": new["stretch"]}


def _common(old: Sequence[Any], new: Sequence[Any]) -> int:
    """How many entries two lists begin with alike, by comparing halves."""
    low, high = 0, min(len(old), len(new))
    if old[:high] == new[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if old[low:middle] == new[low:middle]:
            low = middle
        else:
            high = middle
    return low
