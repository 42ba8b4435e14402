"""What a page says about runs, assembled from what each part of the evidence finds in them."""

import time
from collections.abc import Mapping, Sequence

from groupwise.config import dump
from groupwise.evidence.completions import readable
from groupwise.evidence.findings import findings
from groupwise.evidence.headline import summary, tiles
from groupwise.evidence.history import value_text
from groupwise.evidence.naming import Group, cut, differences, grouped, run_id, run_names, title
from groupwise.evidence.phrases import Phrase, phrase, same
from groupwise.evidence.runs import Run, measure
from groupwise.evidence.shapes import Clock, Document, Finding, Noted, RunShape, SegmentShape, Setting
from groupwise.evidence.status import status
from groupwise.text import shortened, visible

MOST_EVENTS, MOST_CHANGES, MOST_LEFT_OUT = 200, 50, 200
"""How many events and changed settings of a run the page lists, and how many lines about what could not be read."""
LONGEST_RECIPE, LONGEST_PATH = 30_000, 400
"""Characters of a recipe and of a path on the page."""


def document(runs: Sequence[Run]) -> Document:
    """The page's data, but for the completions."""
    groups = grouped(runs)
    members = [run for group in groups for run in group.runs]
    names = run_names(groups)
    found = [finding for group in groups for finding in shared_findings(group)]
    shown = [_run(run, group, names) for group in groups for run in group.runs]
    return {
        "title": title(groups),
        "measure": same(measure(members).name).as_json(),
        "settings": [_setting(group) for group in groups],
        "runs": shown,
        "tiles": tiles(groups, found, [run["status"] for run in shown]),
        "summary": summary(groups),
        "differences": differences(groups),
        "comparisons": [],
        "findings": found,
        "events": events(members),
        "segments": segments(members),
        "left_out": left_out(members, names),
        "figures": [],
    }


def shared_findings(group: Group) -> list[Finding]:
    """Findings of runs that differ in their seed only, each title once: the numbers are of the first run that has it, the title says how
    many do."""
    found: dict[str, list[Finding]] = {}
    for run in group.runs:
        for item in findings(run):
            title, text = same(item.title), same(visible(item.text))
            found.setdefault(title.en, []).append(
                {
                    "setting": group.id,
                    "kind": item.kind,
                    "title": title.as_json(),
                    "text": text.as_json(),
                    "figure": item.figure,
                }
            )
    shown = [items[0] for items in found.values()]
    if len(group.runs) > 1:
        counts = [len(items) for items in found.values()]
        shown = [
            {
                **item,
                "title": phrase("summary", "in_runs", title=Phrase(**item["title"]), count=count, all=len(group.runs)).as_json(),
            }
            for item, count in zip(shown, counts, strict=True)
        ]
    return sorted(shown, key=lambda item: ("unhealthy", "watch", "healthy").index(item["kind"]))


def _setting(group: Group) -> Setting:
    clock: Clock = {"steps": [], "completions": [], "seconds": []}
    return {"id": group.id, "name": group.name, "runs": [run_id(run) for run in group.runs], "clock": clock}


def _run(run: Run, group: Group, names: Mapping[str, str]) -> RunShape:
    id = run_id(run)
    return {
        "id": id,
        "name": names[id],
        "path": cut(visible(run.path.as_posix()), LONGEST_PATH),
        "setting": group.id,
        "seed": run.seed,
        "status": status(run, time.time()),
        "readable": readable(run),
        "recipe": visible(shortened(dump(run.recipe), LONGEST_RECIPE), lines=True),
    }


def events(runs: Sequence[Run]) -> list[Noted]:
    """What the runs noted, the last `MOST_EVENTS` of each."""
    return [
        {
            "run": run_id(run),
            "step": event.step,
            "time": visible(event.time[:40]),
            "kind": visible(event.kind[:40]),
            "text": visible(event.text),
            "advice": visible(event.advice),
        }
        for run in runs
        for event in run.events[-MOST_EVENTS:]
    ]


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
