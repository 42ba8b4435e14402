"""What a page says about runs, assembled from what each part of the evidence finds in them."""

import time
from collections.abc import Mapping, Sequence

from groupwise.config import dump
from groupwise.evidence.completions import readable
from groupwise.evidence.figures import figures
from groupwise.evidence.finding import measure_name
from groupwise.evidence.findings import shared_findings
from groupwise.evidence.headline import summary, tiles
from groupwise.evidence.history import value_text
from groupwise.evidence.lines import clock, marks
from groupwise.evidence.naming import Group, cut, differences, grouped, run_id, run_names, title
from groupwise.evidence.phrases import Phrase
from groupwise.evidence.runs import Run, measure
from groupwise.evidence.shapes import Document, Finding, Noted, RunShape, SegmentShape, Setting, Text
from groupwise.evidence.status import status
from groupwise.evidence.verdicts import comparisons
from groupwise.text import shortened, visible

MOST_EVENTS, MOST_CHANGES, MOST_LEFT_OUT = 200, 50, 200
"""How many events and changed settings of a run the page lists, and how many lines about what could not be read."""
LONGEST_RECIPE, LONGEST_PATH, LONGEST_EVENT, LONGEST_FINDING = 30_000, 400, 600, 3000
"""Characters of a recipe, of a path, and of the texts of an event and of a finding on the page."""


def document(runs: Sequence[Run]) -> Document:
    """The page's data, but for the completions."""
    groups = grouped(runs)
    members = [run for group in groups for run in group.runs]
    names = run_names(groups)
    now, drawn = time.time(), figures(groups)  # first, since they add to what could not be read
    found = [finding for group in groups for finding in told(group)]
    shown = [_run(run, group, names, now) for group in groups for run in group.runs]
    return {
        "title": title(groups),
        "measure": measure_name(measure(members)).as_json(),
        "settings": [_setting(group) for group in groups],
        "runs": shown,
        "tiles": tiles(groups, found, [run["status"] for run in shown]),
        "summary": summary(groups),
        "differences": differences(groups),
        "comparisons": comparisons(groups),
        "findings": found,
        "events": events(members),
        "segments": segments(members),
        "left_out": left_out(members, names),
        "marks": marks(groups),
        "figures": drawn,
    }


def told(group: Group) -> list[Finding]:
    """The findings of a setting's runs, as the page has them."""
    return [
        {"setting": group.id, "kind": item.kind, "title": _shown(item.title), "text": _shown(item.text), "figure": item.figure}
        for item in shared_findings(group.runs)
    ]


def _shown(text: Phrase) -> Text:
    return {language: visible(shortened(written, LONGEST_FINDING)) for language, written in text.as_json().items()}


def _setting(group: Group) -> Setting:
    return {"id": group.id, "name": group.name, "runs": [run_id(run) for run in group.runs], "clock": clock(group.runs)}


def _run(run: Run, group: Group, names: Mapping[str, str], now: float) -> RunShape:
    id = run_id(run)
    shape: RunShape = {
        "id": id,
        "name": names[id],
        "path": cut(visible(run.path.as_posix()), LONGEST_PATH),
        "setting": group.id,
        "seed": run.seed,
        "status": status(run, now),
        "readable": readable(run),
        "recipe": visible(shortened(dump(run.recipe), LONGEST_RECIPE), lines=True),
    }
    return {**shape, "clock": clock([run])} if len(group.runs) > 1 else shape


def events(runs: Sequence[Run]) -> list[Noted]:
    """What the runs noted, in the order of time: the last `MOST_EVENTS` of each."""
    found: list[Noted] = [
        {
            "run": run_id(run),
            "step": event.step,
            "time": visible(event.time[:40]),
            "kind": visible(event.kind[:40]),
            "text": visible(shortened(event.text, LONGEST_EVENT)),
            "advice": visible(shortened(event.advice, LONGEST_EVENT)),
        }
        for run in runs
        for event in run.events[-MOST_EVENTS:]
    ]
    return sorted(found, key=lambda event: event["time"]) if len(runs) > 1 else found


def segments(runs: Sequence[Run]) -> list[SegmentShape]:
    """Where runs were resumed, and with which other settings; nothing of runs that never were."""
    return [
        {
            "run": run_id(run),
            "first": segment.first_step,
            "started": visible(segment.started[:19].replace("T", " ")),
            "version": visible(segment.version[:40]),
            "changed": [
                visible(f"{cut(key, 200)}: {value_text(old)} → {value_text(new)}")
                for key, (old, new) in list(segment.changed.items())[:MOST_CHANGES]
            ],
        }
        for run in runs
        if len(run.segments) > 1
        for segment in run.segments
    ]


def left_out(runs: Sequence[Run], names: Mapping[str, str]) -> list[str]:
    """What could not be read, by run and file."""
    lines = [visible(f"{names[run_id(run)]}: {line}") for run in runs for line in run.left_out]
    return lines[:MOST_LEFT_OUT]
