"""`groupwise report`: one self-contained HTML page about one run, or one that compares several."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pyarrow.compute as pc
import vl_convert
from rich.text import Text

from groupwise.config import dump
from groupwise.errors import UserError
from groupwise.evidence.charts import Figure
from groupwise.evidence.figures import draw_all
from groupwise.evidence.finding import Finding
from groupwise.evidence.findings import shared_findings
from groupwise.evidence.history import value_text
from groupwise.evidence.page import asset, embed, embed_script, render, write
from groupwise.evidence.runs import Measure, Run, by_setting, measure
from groupwise.evidence.statistics import interval
from groupwise.text import shortened, visible

SHOWN_TOKENS = 4000
"""How many tokens of a completion the page shows, the first and the last ones."""
SHOWN_CHARACTERS = 8000
"""How many characters of a prompt it shows."""
SHOWN_GROUPS, SHOWN_COMPLETIONS = 6, 4
"""How many groups of a recorded step the page shows, and how many completions of each: those with the highest and lowest rewards."""
MOST_EVENTS = 200
"""How many events of a run the page lists."""


def write_page(runs: Sequence[Run], out: Path) -> list[Finding]:
    """Write the page about `runs` to `out`; returns the findings, for the terminal."""
    groups = by_setting(runs)
    found = {name: shared_findings(members) for name, members in groups.items()}
    figures = draw_all(groups)
    page = render(
        "report.html",
        title=" · ".join(groups),
        summary=summary(groups),
        measure=measure(runs).name,
        findings=list(found.items()),
        several=len(groups) > 1,
        figures=figures,
        specs=embed({figure.id: _spec(figure) for figure in figures}),
        completions=embed(readable_completions(runs[0])),
        recipes=[(run.path.as_posix(), dump(run.recipe)) for run in runs],
        read=runs[0].path.as_posix(),
        left_out=[f"{run.path.as_posix()}/{line}" for run in runs for line in run.left_out],
        courses=courses(runs),
        events=[(run.path.as_posix(), run.events[:MOST_EVENTS], len(run.events)) for run in runs if run.events],
        bundle=embed_script(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")),
        script=asset("report.js"),
        style=asset("page.css"),
    )
    write(out, page)
    return [finding for items in found.values() for finding in items]


def courses(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The rows of the table of segments, of the runs that were resumed: from which step, when, by which version, what changed."""
    return [
        {
            "run": run.path.as_posix(),
            "first": f"{segment.first_step:,}",
            "started": segment.started[:19].replace("T", " "),
            "version": segment.version,
            "changed": [f"{key}: {value_text(old)} → {value_text(new)}" for key, (old, new) in segment.changed.items()],
        }
        for run in runs
        if len(run.segments) > 1
        for segment in run.segments
    ]


def write_pictures(runs: Sequence[Run], directory: Path) -> list[Path]:
    """Write each figure as a PNG; returns the files."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {directory}: {error.strerror}") from error
    written = []
    for figure in draw_all(by_setting(runs)):
        path = directory / f"{figure.id}.png"
        figure.chart.properties(width=480, title=figure.title).save(path, scale_factor=2)
        written.append(path)
    return written


def summary(groups: dict[str, list[Run]]) -> list[dict[str, str]]:
    """The rows of the table at the top of the page, one per setting: steps, accuracy before and after, completions, seconds."""
    rows = []
    scored = measure(run for runs in groups.values() for run in runs)
    for name, runs in groups.items():
        seconds = [run.cumulative[max(run.cumulative)][1] for run in runs]
        rollouts = [run.cumulative[max(run.cumulative)][0] for run in runs]
        rows.append(
            {
                "setting": name,
                "runs": str(len(runs)),
                "steps": str(max((run.steps[-1]["step"] for run in runs if run.steps), default=0)),
                "before": _mean(scored, [run.first(scored.key, 1) for run in runs]),
                "after": _mean(scored, [run.last(scored.key, 1) for run in runs if len(run.evaluations) > 1]),
                "rollouts": f"{sum(rollouts) / len(runs):,.0f}",
                "seconds": f"{sum(seconds) / len(runs):,.0f}",
            }
        )
    return rows


def _mean(scored: Measure, values: list[float]) -> str:
    """Their mean over seeds, with its 95 % interval if there are several."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "–"
    mean = interval(known)
    return scored.text(mean.mean) + ("" if math.isnan(mean.half) else f" ± {scored.text(mean.half)}")


def readable_completions(run: Run) -> list[dict[str, Any]]:
    """Tokens to show on the page: completions with the highest and lowest rewards in a few groups of the first, middle and last recorded steps."""
    steps = run.token_steps()
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []
    shown = []
    for step in chosen:
        table = run.readable_tokens(step)
        if table is None:
            continue
        names = (
            "group",
            "row",
            "prompt",
            "text",
            "reward",
            "correct",
            "stop",
            "advantage",
            "ratio",
            "entropy",
            "clipped",
            "old_logprob",
        )
        roles = [name for name in ("role",) if name in table.column_names]
        table = table.filter(pc.less(table["group"], 4 * SHOWN_GROUPS)).select([*names, *roles])
        rows: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for token in table.to_pylist():
            rows.setdefault((token["group"], token["row"]), []).append(token)
        by_group: dict[int, list[list[dict[str, Any]]]] = {}
        for (group, _), tokens in rows.items():
            by_group.setdefault(group, []).append(tokens)
        mixed_first = sorted(by_group, key=lambda group: len({tokens[0]["reward"] for tokens in by_group[group]}) == 1)
        for group in mixed_first[:SHOWN_GROUPS]:
            scored = [tokens for tokens in by_group[group] if tokens[0]["reward"] is not None]
            ranked = sorted(scored, key=lambda tokens: -tokens[0]["reward"])
            half = SHOWN_COMPLETIONS // 2
            picked = ranked if len(ranked) <= SHOWN_COMPLETIONS else ranked[:half] + ranked[-half:]
            if picked:
                shown.append(
                    {
                        "step": step,
                        "prompt": visible(shortened(ranked[0][0]["prompt"], SHOWN_CHARACTERS), lines=True),
                        "completions": [_completion(tokens) for tokens in picked],
                    }
                )
    return shown


def _completion(tokens: list[dict[str, Any]]) -> dict[str, Any]:
    first, left_out = tokens[0], max(0, len(tokens) - SHOWN_TOKENS)
    start = (min(len(tokens), SHOWN_TOKENS) + 1) // 2
    tokens = tokens[:start] + tokens[start + left_out :]
    return {
        "left_out": left_out,
        "start": start,
        "reward": _round(first["reward"]),
        "correct": first["correct"],
        "stop": first["stop"],
        "text": [visible(shortened(token["text"], 1000), lines=True) for token in tokens],
        "advantage": [_round(token["advantage"]) for token in tokens],
        "ratio": [_round(token["ratio"]) for token in tokens],
        "entropy": [_round(token["entropy"]) for token in tokens],
        "clipped": [token["clipped"] for token in tokens],
        "probability": [_round(_exp(token["old_logprob"])) for token in tokens],
        "role": [token.get("role", "assistant") for token in tokens],
    }


def _exp(value: float | None) -> float | None:
    return None if value is None else math.exp(value)


def _round(value: float | None) -> float | None:
    """Keep three significant digits: enough to read, and the page stays small."""
    return None if value is None else float(f"{value:.3g}")


def _spec(figure: Figure) -> dict[str, Any]:
    """The Vega-Lite specification of a figure."""
    spec: dict[str, Any] = figure.chart.configure(
        background="transparent", autosize=alt.AutoSizeParams(type="fit-x", contains="padding")
    ).to_dict(validate=False)  # it was checked part by part when it was made
    return spec


def as_text(items: Sequence[Finding]) -> list[Text]:
    """Each finding as a line for the terminal."""
    colours = {"unhealthy": "red", "watch": "yellow", "healthy": "green"}
    return [Text.assemble((item.kind, colours[item.kind]), f"  {item.title.en}: {item.text.en}") for item in items]
