"""What every figure is made with: lines with intervals over seeds, legends, embedded data."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import altair as alt
from altair.utils.schemapi import debug_mode

from groupwise.evidence.runs import Run
from groupwise.evidence.statistics import interval

Groups = dict[str, list[Run]]
"""Name of a setting -> its runs, which differ in their seed only."""
HEIGHT = 220
MOST_POINTS = 600
"""How many steps of a line are drawn; of a longer run the lowest and the highest of each stretch of steps."""
MOST_MARKS = 40
"""How many events are marked in a figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A chart with its title and caption."""

    id: str
    title: str
    caption: str
    """What it shows, and the paper's figure or section that it follows."""
    chart: Any
    """An Altair chart."""


def lines(
    groups: Groups,
    metrics: dict[str, str],
    *,
    y: str,
    percent: bool = False,
    log: bool = False,
    x: str = "step",
    x_of: Callable[[Run, int], float] | None = None,
) -> Any:
    """Draw one line per setting and metric: the mean over seeds, with its 95 % interval as a band if there are several seeds.

    Args:
        groups: runs by setting.
        metrics: metric key -> label.
        y, x: titles of the axes.
        percent: write y as a percentage.
        log: logarithmic y axis; values of at most 0 are left out.
        x_of: (run, step) -> x coordinate; None: the step.

    Returns:
        An Altair chart, or None if no run recorded any of the metrics.
    """
    rows = _rows(groups, metrics, percent=percent, log=log, x_of=x_of)
    if not rows:
        return None
    several, many = len(groups) > 1, len(metrics) > 1
    scale = alt.Scale(type="log") if log else alt.Scale(zero=False)
    axis = alt.Axis(format="%") if percent else alt.Axis()
    base = alt.Chart(data(rows)).encode(x=alt.X("x:Q", title=x, axis=alt.Axis(tickMinStep=1) if not x_of else alt.Axis()))
    order = list(groups) if several else list(metrics.values())
    color = alt.Color(
        "setting:N" if several else "metric:N", title=None, sort=order, legend=legend() if several or many else None
    )
    line = base.mark_line(strokeWidth=2).encode(
        y=alt.Y("y:Q", title=y, scale=scale, axis=axis),
        color=color,
        tooltip=["setting:N", "metric:N", "step:Q", "y:Q", "low:Q", "high:Q", "runs:Q"],
    )
    if several and many:
        line = line.encode(strokeDash=alt.StrokeDash("metric:N", title=None, legend=legend()))
    band = base.mark_area(opacity=0.18).encode(y=alt.Y("low:Q", scale=scale), y2="high:Q", color=color, detail="metric:N")
    layers = [band, line] if any("low" in row for row in rows) else [line]
    if x_of is None and (marked := marks(groups)):
        layers = [_rules(marked), *layers]
    chart = alt.layer(*layers) if len(layers) > 1 else line
    return chart.properties(width="container", height=HEIGHT)


def _rows(
    groups: Groups, metrics: dict[str, str], *, percent: bool, log: bool, x_of: Callable[[Run, int], float] | None
) -> list[dict[str, Any]]:
    """The points of `lines`."""
    rows = []
    for setting, runs in groups.items():
        for metric, name in metrics.items():
            points: dict[int, list[tuple[float, float]]] = {}
            for run in runs:
                for step, value in run.series(metric):
                    if math.isfinite(value) and not (log and value <= 0):
                        points.setdefault(step, []).append((x_of(run, step) if x_of else step, value))
            for step, pairs in thinned(sorted(points.items())):
                mean = interval([value for _, value in pairs])
                mean_x = sum(x_value for x_value, _ in pairs) / len(pairs)
                row = {"x": mean_x, "step": step, "y": mean.mean, "setting": setting, "metric": name, "runs": mean.count}
                if not math.isnan(mean.half):
                    low = max(mean.low, mean.mean / 10) if log else mean.low
                    row |= {"low": max(low, 0.0), "high": min(mean.high, 1.0)} if percent else {"low": low, "high": mean.high}
                rows.append({key: short(value) for key, value in row.items()})
    return rows


def thinned(points: list[tuple[int, list[tuple[float, float]]]]) -> list[tuple[int, list[tuple[float, float]]]]:
    """At most `MOST_POINTS` of the (step, values of runs), so that peaks stay: the lowest and highest of each stretch of steps."""
    if len(points) <= MOST_POINTS:
        return points

    def height(point: tuple[int, list[tuple[float, float]]]) -> float:
        return sum(value for _, value in point[1]) / len(point[1])

    kept = {points[0][0]: points[0], points[-1][0]: points[-1]}
    stretches = MOST_POINTS // 2 - 1
    for i in range(stretches):
        stretch = points[len(points) * i // stretches : len(points) * (i + 1) // stretches]
        kept |= {point[0]: point for point in (min(stretch, key=height), max(stretch, key=height))}
    return [kept[step] for step in sorted(kept)]


def marks(groups: Groups) -> list[dict[str, Any]]:
    """Where a single run noted warnings and faults, and where its settings changed; of several runs nothing is marked."""
    runs = [run for members in groups.values() for run in members]
    if len(runs) != 1:
        return []
    run = runs[0]
    found = [(event.step, event.name or event.kind) for event in run.events if event.kind != "note"]
    found += [(segment.first_step, "settings changed") for segment in run.segments if segment.changed]
    found = [(step, name) for step, name in dict.fromkeys(found) if step <= run.last_step]
    return [{"x": step, "noted": name} for step, name in found[:: max(1, -(-len(found) // MOST_MARKS))]]


def _rules(marked: list[dict[str, Any]]) -> Any:
    """Thin vertical lines."""
    rule = alt.Chart(data(marked)).mark_rule(strokeDash=[3, 3], strokeWidth=1.5, color="#b8860b", opacity=0.8)
    return rule.encode(x="x:Q", tooltip=["noted:N", alt.Tooltip("x:Q", title="step")])


def legend() -> Any:
    """The legend that all figures share, below the plot."""
    return alt.Legend(orient="bottom", columns=2, labelLimit=400, symbolOpacity=1)


def data(rows: list[dict[str, Any]]) -> Any:
    """Data embedded in the chart's specification, so that a page needs no other file."""
    with debug_mode(False):  # Altair would check each of the values against its schema, which takes seconds
        return alt.Data(values=rows)  # type: ignore[no-untyped-call]


def short(value: Any) -> Any:
    """Round to five significant digits: a plot shows no more, and the page is half the size."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def figure(id: str, title: str, caption: str, chart: Any) -> Figure | None:
    """A figure of the chart, or None if there is no chart."""
    return None if chart is None else Figure(id=id, title=title, caption=caption, chart=chart)
