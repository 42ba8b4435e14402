"""What a page says about runs, assembled from what each part of the evidence finds in them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from groupwise.evidence.phrases import same
from groupwise.evidence.runs import Run, by_setting, measure
from groupwise.evidence.shapes import Document


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Runs that differ in their seed only."""

    id: str
    name: str
    runs: Sequence[Run]


def grouped(runs: Sequence[Run]) -> list[Group]:
    """The runs by setting, with ids that stay the same whichever other runs there are."""
    return [Group(id=_id("s", name), name=name, runs=members) for name, members in by_setting(runs).items()]


def run_id(run: Run) -> str:
    """The same for the same directory."""
    return _id("r", str(run.path.resolve()))


def _id(kind: str, text: str) -> str:
    return kind + hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=5).hexdigest()


def document(runs: Sequence[Run]) -> Document:
    """The page's data, but for the completions."""
    groups = grouped(runs)
    scored = measure(runs)
    nothing: list[Any] = []
    return {
        "title": " · ".join(group.name for group in groups),
        "measure": same(scored.name).as_json(),
        "settings": nothing,
        "runs": nothing,
        "tiles": nothing,
        "summary": nothing,
        "differences": {"keys": [], "rows": []},
        "comparisons": nothing,
        "findings": nothing,
        "events": nothing,
        "segments": nothing,
        "left_out": [f"{run.path.as_posix()}/{line}" for run in runs for line in run.left_out],
        "figures": nothing,
    }
