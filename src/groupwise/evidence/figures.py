"""The papers' figures, drawn from runs. Each is made of groups of runs that differ in their seed only, and is left out
where the runs have nothing to show in it."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import pyarrow.compute as pc

from groupwise.algorithms.diagnostics import LENGTH_EDGES, PROBABILITY_EDGES
from groupwise.evidence.runs import Run
from groupwise.evidence.statistics import interval

Groups = dict[str, list[Run]]
HEIGHT = 220
SAMPLED_TOKENS = 1200


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A chart and what it is about."""

    id: str
    title: str
    caption: str
    """What it shows, and which figure of which paper asks for it."""
    chart: Any


def draw_all(groups: Groups) -> list[Figure]:
    """Every figure that the runs have data for."""
    return [figure for make in FIGURES if (figure := make(groups)) is not None]


def lines(
    groups: Groups,
    metrics: dict[str, str],
    *,
    y: str,
    percent: bool = False,
    log: bool = False,
    x: str = "step",
    along: Callable[[Run, int], float] | None = None,
) -> Any:
    """A line for each setting and metric, with the 95 % interval of the mean where there are several seeds; None: no data.

    Args:
        groups: runs by setting.
        metrics: metric -> what it is called.
        y, x: titles of the axes.
        percent, log: how y is written and scaled.
        along: where on the x axis a run's step lies; left out: at the step.
    """
    rows = []
    for setting, runs in groups.items():
        for metric, name in metrics.items():
            points: dict[int, list[tuple[float, float]]] = {}
            for run in runs:
                for step, value in run.series(metric):
                    if math.isfinite(value) and not (log and value <= 0):
                        points.setdefault(step, []).append((along(run, step) if along else step, value))
            for step, found in sorted(points.items()):
                mean = interval([value for _, value in found])
                at = sum(place for place, _ in found) / len(found)
                row = {"x": at, "step": step, "y": mean.mean, "setting": setting, "metric": name, "runs": mean.count}
                if not math.isnan(mean.half):
                    low = max(mean.low, mean.mean / 10) if log else mean.low
                    row |= {"low": max(low, 0.0), "high": min(mean.high, 1.0)} if percent else {"low": low, "high": mean.high}
                rows.append({key: _short(value) for key, value in row.items()})
    if not rows:
        return None
    several, many = len(groups) > 1, len(metrics) > 1
    scale = alt.Scale(type="log") if log else alt.Scale(zero=False)
    axis = alt.Axis(format="%") if percent else alt.Axis()
    base = alt.Chart(data(rows)).encode(x=alt.X("x:Q", title=x, axis=alt.Axis(tickMinStep=1) if not along else alt.Axis()))
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
    chart = alt.layer(band, line) if any("low" in row for row in rows) else line
    return chart.properties(width="container", height=HEIGHT)


def legend() -> Any:
    return alt.Legend(orient="bottom", columns=2, labelLimit=400, symbolOpacity=1)


def data(rows: list[dict[str, Any]]) -> Any:
    """Rows that travel inside the chart."""
    return alt.Data(values=rows)  # type: ignore[no-untyped-call]


def _short(value: Any) -> Any:
    """Five digits are all that a plot can show, and a page of them is half the size."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _figure(id: str, title: str, caption: str, chart: Any) -> Figure | None:
    return None if chart is None else Figure(id=id, title=title, caption=caption, chart=chart)


def accuracy(groups: Groups) -> Figure | None:
    return _figure(
        "accuracy", "Held-out accuracy", "pass@1 on problems that are never trained on; a band is the 95 % interval over seeds.",
        lines(groups, {"eval/pass@1": "held-out pass@1"}, y="pass@1", percent=True),
    )  # fmt: skip


def accuracy_by_rollouts(groups: Groups) -> Figure | None:
    return _figure(
        "accuracy-rollouts", "Accuracy against rollouts",
        "The same by completions generated: dynamic sampling pays for its batches in these (DAPO, figure 6).",
        lines(groups, {"eval/pass@1": "held-out pass@1"}, y="pass@1", percent=True, x="completions generated",
              along=lambda run, step: run.cumulative.get(step, (0.0, 0.0))[0]),
    )  # fmt: skip


def accuracy_by_time(groups: Groups) -> Figure | None:
    return _figure(
        "accuracy-time", "Accuracy against time", "The same by seconds of rollouts and learner.",
        lines(groups, {"eval/pass@1": "held-out pass@1"}, y="pass@1", percent=True, x="seconds",
              along=lambda run, step: run.cumulative.get(step, (0.0, 0.0))[1]),
    )  # fmt: skip


def rewards(groups: Groups) -> Figure | None:
    parts = dict.fromkeys(str(key) for runs in groups.values() for run in runs for record in run.steps[-1:] for key in record)
    named = {key: key.removeprefix("reward/part/") for key in parts if key.startswith("reward/part/")}
    return _figure(
        "rewards", "Reward by component", "What the reward that advantages are made of is the sum of.",
        lines(groups, {"reward/shaped_mean": "all", **(named if len(named) > 1 else {})}, y="mean reward"),
    )  # fmt: skip


def entropy(groups: Groups) -> Figure | None:
    return _figure(
        "entropy", "Entropy", "Mean entropy of the policy over trained tokens, in nats. A collapse ends exploration (DAPO, figure 2b).",
        lines(groups, {"entropy": "entropy"}, y="nats"),
    )  # fmt: skip


def group_shares(groups: Groups) -> Figure | None:
    return _figure(
        "groups", "All right, all wrong, mixed",
        "Shares of the groups that were generated. Only mixed groups teach a group-relative algorithm (DAPO, figure 3b).",
        lines(groups, {"groups/mixed": "mixed", "groups/all_correct": "all right", "groups/all_wrong": "all wrong"},
              y="share of groups", percent=True),
    )  # fmt: skip


def utilisation(groups: Groups) -> Figure | None:
    return _figure(
        "utilisation", "Response utilisation",
        "Share of completions with an advantage other than zero (DCPO, section 4), and the share that carries the signal when "
        "each counts by its |A|: (sum |A|)² / (B sum A²).",
        lines(groups, {"utilisation": "A ≠ 0", "utilisation/effective": "weighted by |A|"}, y="share of completions", percent=True),
    )  # fmt: skip


def clipping(groups: Groups) -> Figure | None:
    return _figure(
        "clip", "Clipped tokens", "Share of trained tokens whose gradient the clip changed, by the bound that did (GSPO, figure 2).",
        lines(groups, {"clip_fraction_low": "lower bound", "clip_fraction_high": "upper bound"}, y="share of tokens", percent=True),
    )  # fmt: skip


def clipped_probability(groups: Groups) -> Figure | None:
    return _figure(
        "clip-probability", "How likely up-clipped tokens were", "Mean π_old of tokens held by the upper bound (DAPO, figure 3a).",
        lines(groups, {"clip/high_probability": "mean π_old"}, y="π_old"),
    )  # fmt: skip


def clipping_by_probability(groups: Groups) -> Figure | None:
    edges = [0.0, *PROBABILITY_EDGES, 1.0]
    rows = []
    for setting, runs in groups.items():
        totals = {
            name: _summed([run.total(f"by_probability/{name}") for run in runs])
            for name in ("tokens", "clipped_low", "clipped_high")
        }
        for i, tokens in enumerate(totals["tokens"]):
            if tokens:
                where = f"{edges[i]:g} to {edges[i + 1]:g}"
                rows += [
                    {"bin": where, "bound": bound, "share": totals[name][i] / tokens, "tokens": tokens, "setting": setting}
                    for name, bound in (("clipped_low", "lower"), ("clipped_high", "upper"))
                ]
    if not any(row["share"] for row in rows):
        return None
    order = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)]
    several = len(groups) > 1
    chart = alt.Chart(data(rows)).mark_bar().encode(
        x=alt.X("bin:N", sort=order, title="π_old of the token", axis=alt.Axis(labelAngle=-40)),
        xOffset="setting:N" if several else "bound:N",
        y=alt.Y("share:Q", title="share clipped", axis=alt.Axis(format="%")),
        color=alt.Color("setting:N" if several else "bound:N", title=None, sort=list(groups) if several else None, legend=legend()),
        opacity=alt.Opacity("bound:N", title=None, scale=alt.Scale(domain=["upper", "lower"], range=[1, 0.45])) if several else alt.value(1),
        tooltip=["setting:N", "bin:N", "bound:N", alt.Tooltip("share:Q", format=".2%"), "tokens:Q"],
    )  # fmt: skip
    return _figure(
        "clip-by-probability", "Whom the clip holds", "Share of tokens that each bound clipped, by how likely the token was, over the whole run.",
        chart.properties(width="container", height=HEIGHT),
    )  # fmt: skip


def spreads(groups: Groups) -> Figure | None:
    return _figure(
        "spread", "Spread of the ratios",
        "Standard deviation of tokens' log ratios, and root mean square of a completion's mean (GSPO's ratio) and summed "
        "log ratio (the ratio of whole sequences).",
        lines(groups, {"spread/token": "token", "spread/sequence": "sequence, mean", "spread/product": "sequence, product"},
              y="log ratio", log=True),
    )  # fmt: skip


def spread_by_length(groups: Groups) -> Figure | None:
    starts = [1, *LENGTH_EDGES]
    rows = []
    for setting, runs in groups.items():
        counts = _summed([run.total("by_length/rows") for run in runs])
        for name, title in (("mean_square", "mean of log ratios"), ("sum_square", "sum of log ratios")):
            for start, count, square in zip(
                starts, counts, _summed([run.total(f"by_length/{name}") for run in runs]), strict=False
            ):
                if count >= 20 and square > 0:
                    rows.append(
                        {
                            "length": start * 1.4,
                            "spread": math.sqrt(square / count),
                            "what": title,
                            "setting": setting,
                            "rows": count,
                        }
                    )
    if len({row["length"] for row in rows}) < 2:
        return None
    several = len(groups) > 1
    chart = alt.Chart(data(rows)).mark_line(point=True).encode(
        x=alt.X("length:Q", scale=alt.Scale(type="log"), title="tokens in the completion"),
        y=alt.Y("spread:Q", scale=alt.Scale(type="log"), title="root mean square"),
        color=alt.Color("setting:N" if several else "what:N", title=None, sort=list(groups) if several else None, legend=legend()),
        strokeDash=alt.StrokeDash("what:N", title=None, legend=legend() if several else None),
        tooltip=["setting:N", "what:N", "length:Q", "spread:Q", "rows:Q"],
    )  # fmt: skip
    return _figure(
        "spread-length", "Spread against length",
        "Over the whole run, by length: if tokens drift independently the sum grows with √T and the mean falls with it "
        "(GSPO, section 3).",
        chart.properties(width="container", height=HEIGHT),
    )  # fmt: skip


def lengths(groups: Groups) -> Figure | None:
    return _figure(
        "length", "Length", "Mean tokens of all completions and of those that ended by themselves (DAPO, figure 4).",
        lines(groups, {"length/mean": "all", "length/finished": "finished"}, y="tokens"),
    )  # fmt: skip


def truncated(groups: Groups) -> Figure | None:
    return _figure(
        "truncated", "Cut off at the limit", "Share of completions that reached max_tokens (DAPO, figure 5).",
        lines(groups, {"length/truncated": "truncated"}, y="share of completions", percent=True),
    )  # fmt: skip


def divergences(groups: Groups) -> Figure | None:
    names = {
        "approx_kl": "from π_old within a step",
        "kl_ref": "from the reference",
        "sampler_gap_mean": "learner against sampler, |Δ log π|",
    }
    return _figure(
        "kl", "Distance of the policies", "Estimates in nats per token, k3 where it is a divergence.",
        lines(groups, names, y="nats", log=True),
    )  # fmt: skip


def gradient(groups: Groups) -> Figure | None:
    return _figure(
        "gradient",
        "Gradient norm",
        "Before clipping, mean of the step's updates.",
        lines(groups, {"grad_norm": "norm"}, y="norm", log=True),
    )


def dropped(groups: Groups) -> Figure | None:
    names = {
        "dropped/uniform": "groups: all right or all wrong",
        "dropped/surplus": "groups: more than the batch needs",
        "groups/too_old": "groups: too old",
        "dropped/filtered": "completions: truncated and filtered",
    }
    used = {key: name for key, name in names.items() if any(any(run.values(key)) for runs in groups.values() for run in runs)}
    return _figure("dropped", "What was dropped, and why", "In each step.", lines(groups, used, y="count")) if used else None


def times(groups: Groups) -> Figure | None:
    names = {"seconds/rollouts": "rollouts", "seconds/learner": "learner", "seconds/scoring": "scoring (part of rollouts)"}
    return _figure("time", "Where the time goes", "Seconds of each step.", lines(groups, names, y="seconds"))


def memory(groups: Groups) -> Figure | None:
    return _figure(
        "memory",
        "Peak memory",
        "The most so far, of the GPU or of the process; a critic is a second model with moments of its own.",
        lines(groups, {"memory/peak_mib": "peak"}, y="MiB"),
    )


def speed(groups: Groups) -> Figure | None:
    return _figure(
        "speed",
        "Speed",
        "Completion tokens trained on by seconds of the whole step.",
        lines(groups, {"tokens_per_second": "tokens/s"}, y="tokens/s"),
    )


def ratio_by_probability(groups: Groups) -> Figure | None:
    """Tokens of a step in the middle, of the first run of each setting."""
    rows = []
    for setting, runs in groups.items():
        written = runs[0].token_steps()
        if written:
            table = runs[0].tokens(written[len(written) // 2])
            table = table.filter(pc.is_valid(table["ratio"]))
            every = max(1, len(table) // SAMPLED_TOKENS)
            columns = [table[name].to_pylist()[::every] for name in ("old_logprob", "ratio", "clipped", "text", "advantage")]
            rows += [
                {"p": _short(math.exp(old)), "ratio": _short(min(max(ratio, 1e-6), 1e6)), "clipped": "clipped" if clipped else "free", "token": text,
                 "A": _short(a), "setting": setting}
                for old, ratio, clipped, text, a in zip(*columns, strict=True)
            ]  # fmt: skip
    if not rows:
        return None
    chart = alt.Chart(data(rows)).mark_circle(size=18, opacity=0.5).encode(
        x=alt.X("p:Q", title="π_old", scale=alt.Scale(domain=[0, 1])),
        y=alt.Y("ratio:Q", title="ratio π / π_old", scale=alt.Scale(type="log", nice=False)),
        color=alt.Color("clipped:N" if len(groups) == 1 else "setting:N", title=None, legend=legend()),
        tooltip=["token:N", "p:Q", "ratio:Q", "A:Q", "clipped:N", "setting:N"],
    )  # fmt: skip
    return _figure(
        "ratio", "Tokens: ratio against probability", "Tokens of a recorded step in the middle of the run, as their own update saw them.",
        chart.properties(width="container", height=HEIGHT),
    )  # fmt: skip


def _summed(lists: Sequence[list[float]]) -> list[float]:
    return [sum(column) for column in zip(*(values for values in lists if values), strict=True)]


FIGURES: tuple[Callable[[Groups], Figure | None], ...] = (
    accuracy, accuracy_by_rollouts, accuracy_by_time, rewards, entropy, group_shares, utilisation, clipping, clipped_probability,
    clipping_by_probability, ratio_by_probability, spreads, spread_by_length, lengths, truncated, divergences, gradient, dropped,
    times, memory, speed,
)  # fmt: skip
