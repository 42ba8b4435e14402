"""The papers' diagnostic figures, drawn from recorded runs as Vega-Lite charts.

Each figure is a function of runs grouped by setting (the runs of a group differ in their seed only). It returns None if the
runs did not record the metrics that it shows.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import altair as alt
import pyarrow.compute as pc

from groupwise.algorithms.diagnostics import LENGTH_EDGES, PROBABILITY_EDGES
from groupwise.evidence.charts import HEIGHT, Figure, Groups, data, figure, legend, lines, short
from groupwise.evidence.runs import Measure, measure
from groupwise.evidence.vega_processes import ages, faults, idle, queues

SAMPLED_TOKENS = 1200
"""About how many tokens a scatter plot shows per setting."""


def draw_all(groups: Groups) -> list[Figure]:
    """Every figure for which the runs recorded data."""
    return [drawn for make in FIGURES if (drawn := make(groups)) is not None]


def accuracy(groups: Groups) -> Figure | None:
    return figure(
        "accuracy", "Held-out results", f"The {_measure(groups).name} on problems that are not in the training data. Bands: 95 % interval over seeds.",
        _held_out(groups),
    )  # fmt: skip


def _measure(groups: Groups) -> Measure:
    return measure(run for runs in groups.values() for run in runs)


def _held_out(groups: Groups, **axis: Any) -> Any:
    """The held-out score of every run, by step or by what `axis` says."""
    found = _measure(groups)
    return lines(groups, {found.key: f"held-out {found.name}"}, y=found.name, percent=found.percent, **axis)


def accuracy_by_rollouts(groups: Groups) -> Figure | None:
    return figure(
        "accuracy-rollouts", "Held-out results by completions generated",
        f"The {_measure(groups).name} against the total number of completions generated, including those that dynamic sampling "
        "discards (DAPO, figure 6).",
        _held_out(groups, x="completions generated", x_of=lambda run, step: run.cumulative.get(step, (0.0, 0.0))[0]),
    )  # fmt: skip


def accuracy_by_time(groups: Groups) -> Figure | None:
    return figure(
        "accuracy-time", "Held-out results by time", f"The {_measure(groups).name} against the seconds spent in rollouts and in the learner.",
        _held_out(groups, x="time (s)", x_of=lambda run, step: run.cumulative.get(step, (0.0, 0.0))[1]),
    )  # fmt: skip


def rewards(groups: Groups) -> Figure | None:
    keys = dict.fromkeys(str(key) for runs in groups.values() for run in runs for record in run.steps[-1:] for key in record)
    components = {key: key.removeprefix("reward/part/") for key in keys if key.startswith("reward/part/")}
    return figure(
        "rewards", "Reward by component", "Mean of the reward from which advantages are computed, and of each component that it is the sum of.",
        lines(groups, {"reward/shaped_mean": "total", **(components if len(components) > 1 else {})}, y="mean reward"),
    )  # fmt: skip


def entropy(groups: Groups) -> Figure | None:
    return figure(
        "entropy", "Entropy", "Mean entropy of the policy over trained tokens. If it collapses, the policy stops exploring (DAPO, figure 2b).",
        lines(groups, {"entropy": "entropy"}, y="entropy (nats per token)"),
    )  # fmt: skip


def group_shares(groups: Groups) -> Figure | None:
    return figure(
        "groups", "Groups by outcome",
        "Shares of the generated groups whose completions are all correct, all wrong, or mixed; of a graded reward, whose rewards are "
        "equal or mixed. With rewards of correctness alone, all but the mixed have zero variance and give group-relative advantages of "
        "zero (DAPO, figure 3b).",
        lines(groups, {"groups/mixed": "mixed", "groups/all_correct": "all correct", "groups/all_wrong": "all wrong",
                       "groups/equal": "equal rewards"},
              y="share of groups", percent=True),
    )  # fmt: skip


def utilisation(groups: Groups) -> Figure | None:
    return figure(
        "utilisation", "Response utilisation",
        "Share of completions whose advantage is not zero (DCPO, section 4), and the effective share when completions contribute in "
        "proportion to |A|: (Σ|A|)² / (B ΣA²) for B completions.",
        lines(groups, {"utilisation": "A ≠ 0", "utilisation/effective": "effective, by |A|"}, y="share of completions", percent=True),
    )  # fmt: skip


def clipping(groups: Groups) -> Figure | None:
    return figure(
        "clip", "Clipped tokens", "Share of trained tokens whose gradient was changed by the lower or the upper clip bound (GSPO, figure 2).",
        lines(groups, {"clip_fraction_low": "lower bound", "clip_fraction_high": "upper bound"}, y="share of trained tokens", percent=True),
    )  # fmt: skip


def clipped_probability(groups: Groups) -> Figure | None:
    return figure(
        "clip-probability", "Probability of tokens clipped at the upper bound", "Mean π_old of the tokens that the upper bound clipped (DAPO, figure 3a).",
        lines(groups, {"clip/high_probability": "mean π_old"}, y="mean π_old"),
    )  # fmt: skip


def clipping_by_probability(groups: Groups) -> Figure | None:
    edges = [0.0, *PROBABILITY_EDGES, 1.0]
    rows = []
    for setting, runs in groups.items():
        totals = {
            name: _summed([run.total(f"by_probability/{name}") for run in runs])
            for name in ("tokens", "clipped_low", "clipped_high")
        }
        for i, tokens in enumerate(totals["tokens"] if all(totals.values()) else []):
            if tokens > 0:
                bin_label = f"{edges[i]:g} to {edges[i + 1]:g}"
                rows += [
                    {"bin": bin_label, "bound": bound, "share": totals[name][i] / tokens, "tokens": tokens, "setting": setting}
                    for name, bound in (("clipped_low", "lower"), ("clipped_high", "upper"))
                ]
    if not any(row["share"] for row in rows):
        return None
    order = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)]
    several = len(groups) > 1
    chart = alt.Chart(data(rows)).mark_bar().encode(
        x=alt.X("bin:N", sort=order, title="π_old of the token", axis=alt.Axis(labelAngle=-40)),
        xOffset="setting:N" if several else "bound:N",
        y=alt.Y("share:Q", title="share of tokens clipped", axis=alt.Axis(format="%")),
        color=alt.Color("setting:N" if several else "bound:N", title=None, sort=list(groups) if several else None, legend=legend()),
        opacity=alt.Opacity("bound:N", title=None, scale=alt.Scale(domain=["upper", "lower"], range=[1, 0.45])) if several else alt.value(1),
        tooltip=["setting:N", "bin:N", "bound:N", alt.Tooltip("share:Q", format=".2%"), "tokens:Q"],
    )  # fmt: skip
    return figure(
        "clip-by-probability", "Clipped tokens by probability", "Share of the tokens in each range of π_old that each bound clipped, over the whole run.",
        chart.properties(width="container", height=HEIGHT),
    )  # fmt: skip


def log_ratios(groups: Groups) -> Figure | None:
    return figure(
        "spread", "Size of the log ratios",
        "Of log(π / π_old): the standard deviation over tokens, and the root mean square over completions of the mean over a "
        "completion's tokens (the log of GSPO's ratio) and of their sum (the log ratio of the whole sequence).",
        lines(groups, {"spread/token": "token (standard deviation)", "spread/sequence": "sequence mean (RMS)",
                       "spread/product": "sequence sum (RMS)"}, y="log ratio (nats)", log=True),
    )  # fmt: skip


def log_ratios_by_length(groups: Groups) -> Figure | None:
    starts = [1, *LENGTH_EDGES]
    rows = []
    for setting, runs in groups.items():
        counts = _summed([run.total("by_length/rows") for run in runs])
        for name, title in (("mean_square", "mean of token log ratios"), ("sum_square", "sum of token log ratios")):
            for start, count, square in zip(
                starts, counts, _summed([run.total(f"by_length/{name}") for run in runs]), strict=False
            ):
                if count >= 20 and square > 0:
                    rows.append(
                        {
                            "length": start * 1.4,
                            "rms": math.sqrt(square / count),
                            "quantity": title,
                            "setting": setting,
                            "completions": count,
                        }
                    )
    if len({row["length"] for row in rows}) < 2:
        return None
    several = len(groups) > 1
    chart = alt.Chart(data(rows)).mark_line(point=True).encode(
        x=alt.X("length:Q", scale=alt.Scale(type="log"), title="completion length (tokens)"),
        y=alt.Y("rms:Q", scale=alt.Scale(type="log"), title="root mean square (nats)"),
        color=alt.Color("setting:N" if several else "quantity:N", title=None, sort=list(groups) if several else None, legend=legend()),
        strokeDash=alt.StrokeDash("quantity:N", title=None, legend=legend() if several else None),
        tooltip=["setting:N", "quantity:N", "length:Q", "rms:Q", "completions:Q"],
    )  # fmt: skip
    return figure(
        "spread-length", "Size of the log ratios by length",
        "Root mean square of a completion's mean and summed log ratio by its length T, over the whole run. If the tokens' log ratios "
        "were independent, the sum would grow as √T and the mean would fall as 1/√T (GSPO, section 3).",
        chart.properties(width="container", height=HEIGHT),
    )  # fmt: skip


def lengths(groups: Groups) -> Figure | None:
    return figure(
        "length", "Completion length", "Mean over all completions, and over those that ended with an end-of-sequence token (DAPO, figure 4).",
        lines(groups, {"length/mean": "all", "length/finished": "not truncated"}, y="mean completion length (tokens)"),
    )  # fmt: skip


def truncated(groups: Groups) -> Figure | None:
    return figure(
        "truncated", "Truncated completions", "Share of completions that reached rollouts.max_tokens (DAPO, figure 5).",
        lines(groups, {"length/truncated": "truncated"}, y="share of completions", percent=True),
    )  # fmt: skip


def turns(groups: Groups) -> Figure | None:
    return figure(
        "turns", "Turns and tool calls", "In each completion: the turns of the policy, and the tools that it called.",
        lines(groups, {"turns/mean": "turns", "tools/calls": "tool calls"}, y="mean number"),
    )  # fmt: skip


def divergences(groups: Groups) -> Figure | None:
    names = {
        "approx_kl": "KL(π_old ‖ π) within a step",
        "kl_ref": "KL to the reference",
        "sampler_gap_mean": "mean |Δ log π|, sampler and learner",
    }
    return figure(
        "kl", "KL divergences and sampler mismatch", "Per token: KL divergences by the algorithm's estimator (k3 for π_old), and the mean absolute difference between the sampler's and the learner's log-probabilities.",
        lines(groups, names, y="nats per token", log=True),
    )  # fmt: skip


def gradient(groups: Groups) -> Figure | None:
    return figure(
        "gradient",
        "Gradient norm",
        "Before gradient clipping, averaged over the updates of a step.",
        lines(groups, {"grad_norm": "gradient norm"}, y="gradient norm", log=True),
    )


def dropped(groups: Groups) -> Figure | None:
    names = {
        "dropped/zero_variance": "groups: zero variance (all correct or all wrong)",
        "dropped/unselected": "groups: mixed, but not selected",
        "dropped/surplus": "groups: more than the batch holds",
        "dropped/failed": "groups: no completion could be scored",
        "groups/too_old": "groups: older than max_age",
        "dropped/filtered": "completions: truncated (overlong filtering)",
    }
    used = {key: name for key, name in names.items() if any(any(run.values(key)) for runs in groups.values() for run in runs)}
    return (
        figure(
            "dropped",
            "Discarded data",
            "Groups and completions discarded in each step, by reason.",
            lines(groups, used, y="count"),
        )
        if used
        else None
    )


def times(groups: Groups) -> Figure | None:
    names = {"seconds/rollouts": "rollouts", "seconds/learner": "learner", "seconds/scoring": "scoring (included in rollouts)"}
    return figure("time", "Time by phase", "Wall-clock time of each step.", lines(groups, names, y="time (s)"))


def memory(groups: Groups) -> Figure | None:
    return figure(
        "memory",
        "Peak memory",
        "Highest so far, of the GPU if there is one, else of the process. A critic adds a second model with its own gradients and optimiser state.",
        lines(groups, {"memory/peak_mib": "peak memory"}, y="peak memory (MiB)"),
    )


def speed(groups: Groups) -> Figure | None:
    return figure(
        "speed",
        "Throughput",
        "Completion tokens of the training batch, divided by the seconds of the whole step (rollouts and learner).",
        lines(groups, {"tokens_per_second": "throughput"}, y="tokens per second"),
    )


def ratio_by_probability(groups: Groups) -> Figure | None:
    """A scatter plot of tokens from the middle recorded step of the first run of each setting."""
    rows = []
    for setting, runs in groups.items():
        recorded = runs[0].token_steps()
        table = runs[0].readable_tokens(recorded[len(recorded) // 2]) if recorded else None
        if table is not None:
            table = table.filter(pc.and_(pc.is_valid(table["ratio"]), pc.is_valid(table["old_logprob"])))
            every = max(1, len(table) // SAMPLED_TOKENS)
            columns = [table[name].to_pylist()[::every] for name in ("old_logprob", "ratio", "clipped", "text", "advantage")]
            rows += [
                {"p": short(math.exp(old)), "ratio": short(min(max(ratio, 1e-6), 1e6)), "clipped": "clipped" if clipped else "not clipped", "token": text,
                 "A": short(a), "setting": setting}
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
    return figure(
        "ratio", "Token ratios by probability",
        "Tokens of the middle recorded step, at the update that trained on them. The ratio is the token's own, also where the algorithm "
        "clips a ratio of the sequence.",
        chart.properties(width="container", height=HEIGHT),
    )  # fmt: skip


def _summed(lists: Sequence[list[float]]) -> list[float]:
    """Element-wise sum of the lists that are not empty."""
    return [sum(column) for column in zip(*(values for values in lists if values), strict=True)]


FIGURES: tuple[Callable[[Groups], Figure | None], ...] = (
    accuracy, accuracy_by_rollouts, accuracy_by_time, rewards, entropy, group_shares, utilisation, clipping, clipped_probability,
    clipping_by_probability, ratio_by_probability, log_ratios, log_ratios_by_length, lengths, turns, truncated, divergences, gradient, dropped,
    times, memory, speed, ages, queues, idle, faults,
)  # fmt: skip
