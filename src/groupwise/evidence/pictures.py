"""Figures as pictures (`--format png`): each kind of figure translated to a Vega-Lite chart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import altair as alt
import numpy as np
from altair.utils.schemapi import debug_mode

from groupwise.errors import UserError
from groupwise.evidence.figures import figures
from groupwise.evidence.lines import clock, marks
from groupwise.evidence.naming import grouped, run_id, run_names
from groupwise.evidence.runs import Run
from groupwise.evidence.shapes import Axis, Clock, Figure, Line, Mark

WIDTH, HEIGHT, SCALE = 480, 220, 2
NOTED = "#b8860b"
"""Colour of the lines where something was noted."""
Names = Mapping[str, str]
"""Of settings and of runs, by id."""


def charts(runs: Sequence[Run]) -> dict[str, Any]:
    """Every figure for which the runs recorded data, as an Altair chart, by id. The held-out results are there three times: by step,
    by completions generated (`accuracy-rollouts`) and by seconds (`accuracy-time`)."""
    groups = grouped(runs)
    names = {group.id: group.name for group in groups} | run_names(groups)
    if any(len(group.runs) > 1 for group in groups):
        names |= {run_id(run): f"{group.name}, seed {run.seed}" for group in groups for run in group.runs}
    clocks = {group.id: clock(group.runs) for group in groups} | {
        run_id(run): clock([run]) for group in groups for run in group.runs
    }
    noted = marks(groups)
    made: dict[str, Any] = {}
    for figure in figures(groups):
        if figure["kind"] == "lines" and not figure["lines"]:
            continue  # all its metrics are constant
        made[figure["id"]] = _titled(figure, _chart(figure, names, noted))
        if figure["id"] == "accuracy":
            made["accuracy-rollouts"] = _titled(
                figure, _lines(_on_clock(figure, clocks, "completions"), names, "completions generated")
            )
            made["accuracy-time"] = _titled(figure, _lines(_on_clock(figure, clocks, "seconds"), names, "time (s)"))
    return made


def write_pictures(runs: Sequence[Run], directory: Path) -> list[Path]:
    """Write each figure as a PNG; returns the files.

    Raises:
        UserError: the directory cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {directory}: {error.strerror}") from error
    written = []
    for id, chart in charts(runs).items():
        path = directory / f"{id}.png"
        chart.save(path, scale_factor=SCALE)
        written.append(path)
    return written


def _titled(figure: Figure, chart: Any) -> Any:
    """With what must be known to read it below its title."""
    banded = [line for line in figure.get("lines", []) if line["low"]]
    said = [figure["note"]["en"]] if "note" in figure else []
    said += [about["text"]["en"] for about in figure.get("about", [])]
    if banded:
        seeds = sorted({line["seeds"] for line in banded})
        over = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        said.append(
            f"Bands: {figure['band']['en'] if 'band' in figure else f'95% interval of the mean over {over} seeds' + (', of its logarithm' if figure['y']['log'] else '')}."
        )
    said += [f"{constant['label']['en']}: {constant['value']} in all steps" for constant in figure.get("constants", [])]
    title = alt.Title(figure["title"]["en"], subtitle=said, anchor="start", subtitleColor="#666")
    return chart.properties(width=WIDTH, height=HEIGHT, title=title)


def _chart(figure: Figure, names: Names, noted: Sequence[Mark]) -> Any:
    if figure["kind"] == "lines":
        return _lines(figure, names, "step", noted)
    return {"bars": _bars, "dots": _dots, "curve": _curve}[figure["kind"]](figure, names)


def _on_clock(figure: Figure, clocks: Mapping[str, Clock], axis: Literal["completions", "seconds"]) -> Figure:
    """The figure of lines over completions or seconds in place of steps."""
    moved: list[Line] = []
    for line in figure["lines"]:
        own = clocks[line["run"] or line["setting"]]
        at: Any = np.interp(line["steps"], own["steps"], own[axis]).tolist()
        moved.append({**line, "steps": at})
    return {**figure, "lines": moved}


def _lines(figure: Figure, names: Names, x: str, noted: Sequence[Mark] = ()) -> Any:
    rows = [
        {"x": step, "y": value, "low": low, "high": high, "setting": names[line["run"] or line["setting"]], "metric": line["label"]["en"],
         "line": line["id"]}
        for line in figure["lines"]
        for step, value, low, high in zip(line["steps"], line["values"], *(line[end] or [None] * len(line["steps"]) for end in ("low", "high")), strict=True)
        if value is not None and not (figure["y"]["log"] and value <= 0)
    ]  # fmt: skip
    several = len({row["setting"] for row in rows}) > 1
    many = len({row["metric"] for row in rows}) > 1
    scale = _scale(figure["y"], zero=False)
    base = alt.Chart(data(rows)).encode(x=alt.X("x:Q", title=x, axis=alt.Axis(tickMinStep=1)))
    color = _color("setting" if several else "metric", shown=several or many)
    line = base.mark_line(strokeWidth=2).encode(
        y=alt.Y("y:Q", title=figure["y"]["title"]["en"], scale=scale, axis=_axis(figure["y"])), color=color, detail="line:N"
    )
    if several and many:
        line = line.encode(strokeDash=alt.StrokeDash("metric:N", title=None, sort=None, legend=legend()))
    layers = [line]
    if any(row["low"] is not None for row in rows):
        band = base.mark_area(opacity=0.18).encode(y=alt.Y("low:Q", scale=scale), y2="high:Q", color=color, detail="line:N")
        layers = [band.transform_filter("isValid(datum.low)"), line]
    if noted:
        rule = alt.Chart(data([{"x": mark["step"]} for mark in noted])).mark_rule(strokeDash=[3, 3], color=NOTED)
        layers = [rule.encode(x="x:Q"), *layers]
    return alt.layer(*layers)


def _bars(figure: Figure, names: Names) -> Any:
    bins = figure["bins"]
    rows = _points(figure, names)
    rows = [{**row, "bin": bins[int(row["x"])]} for row in rows]
    several = len({row["setting"] for row in rows}) > 1
    chart = alt.Chart(data(rows)).mark_bar().encode(
        x=alt.X("bin:N", sort=list(bins), title=figure["x"]["title"]["en"], axis=alt.Axis(labelAngle=-40)),
        xOffset=alt.XOffset("setting:N" if several else "series:N", sort=None),
        y=alt.Y("y:Q", title=figure["y"]["title"]["en"], axis=_axis(figure["y"])),
        color=_color("setting" if several else "series"),
    )  # fmt: skip
    return chart.encode(opacity=alt.Opacity("series:N", title=None, sort=None, legend=legend())) if several else chart


def _dots(figure: Figure, names: Names) -> Any:
    rows = _points(figure, names)
    rows = [{**row, "clipped": "clipped" if row["flag"] else "not clipped"} for row in rows]
    several = len({row["setting"] for row in rows}) > 1
    return alt.Chart(data(rows)).mark_circle(size=18, opacity=0.5).encode(
        x=alt.X("x:Q", title=figure["x"]["title"]["en"], scale=alt.Scale(domain=[0, 1])),
        y=alt.Y("y:Q", title=figure["y"]["title"]["en"], scale=alt.Scale(type="log", nice=False)),
        color=_color("setting" if several else "clipped"),
    )  # fmt: skip


def _curve(figure: Figure, names: Names) -> Any:
    rows = _points(figure, names)
    several = len({row["setting"] for row in rows}) > 1
    chart = alt.Chart(data(rows)).mark_line(point=True).encode(
        x=alt.X("x:Q", title=figure["x"]["title"]["en"], scale=_scale(figure["x"])),
        y=alt.Y("y:Q", title=figure["y"]["title"]["en"], scale=_scale(figure["y"])),
        color=_color("setting" if several else "series"),
        detail="series:N",
    )  # fmt: skip
    return chart.encode(strokeDash=alt.StrokeDash("series:N", title=None, sort=None, legend=legend())) if several else chart


def _points(figure: Figure, names: Names) -> list[dict[str, Any]]:
    return [
        {"x": x, "y": y, "flag": flag, "series": series["label"]["en"], "setting": names[series["setting"]]}
        for series in figure["series"]
        for x, y, flag in zip(series["x"], series["y"], series.get("flags") or [False] * len(series["x"]), strict=True)
        if y is not None
    ]


def _axis(of: Axis) -> Any:
    return alt.Axis(format="%") if of["percent"] else alt.Axis()


def _scale(of: Axis, **more: Any) -> Any:
    return alt.Scale(type="log") if of["log"] else alt.Scale(**more)


def _color(field: str, *, shown: bool = True) -> Any:
    return alt.Color(f"{field}:N", title=None, sort=None, legend=legend() if shown else None)


def legend() -> Any:
    """The legend that all pictures share, below the plot."""
    return alt.Legend(orient="bottom", columns=2, labelLimit=400, symbolOpacity=1)


def data(rows: list[dict[str, Any]]) -> Any:
    """Data embedded in the chart's specification."""
    with debug_mode(False):  # Altair would check each of the values against its schema, which takes seconds
        return alt.Data(values=rows)  # type: ignore[no-untyped-call]
