"""The papers' diagnostic figures of recorded runs, as data: which metrics each shows, and what must be known to read it.

Runs are grouped by setting; those of a group differ in their seed only. A figure is left out if no run recorded its metrics.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from groupwise.evidence.distributions import distributions
from groupwise.evidence.finding import measure_name
from groupwise.evidence.lines import Curve, line, mean_over_seeds, of_run, points_of
from groupwise.evidence.naming import Group, run_id
from groupwise.evidence.phrases import Phrase, phrase, same
from groupwise.evidence.runs import Measure, Run, measure
from groupwise.evidence.shapes import About, Axis, Constant, Figure, Line
from groupwise.evidence.statistics import FEWEST_SEEDS
from groupwise.text import shortened, visible

GROUPS = ("learning", "health", "policy", "cost")
WEIGHTED = "reward/weighted/"
"""Beginning of the names of the reward's components, each times its weight."""
MOST_COMPONENTS, LONGEST_COMPONENT = 12, 60
"""Components of the reward that are drawn, and characters of a name."""
MOST_EVALUATED = 6
"""Evaluations of more runs are drawn without their own intervals, which would cover each other."""
MOST_ENDED = 3
"""Settings of which it is said that their runs end at different steps."""
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
UNEQUAL = 0.05
"""Runs of a setting that end this share of its steps apart, or less, are not told apart: those of a ladder train side by side."""

Kind = Literal["learning", "health", "policy", "cost"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """A figure of metrics over training steps. Its texts are the table `id` of figures_text.toml."""

    id: str
    group: Kind
    metrics: Mapping[str, str]
    """Metric -> key of its label."""
    percent: bool = False
    log: bool = False


TRAINING = (
    Lines(id="groups", group="learning", percent=True, metrics={
        "groups/mixed": "mixed", "groups/all_correct": "all_correct", "groups/all_wrong": "all_wrong", "groups/equal": "equal"}),
    Lines(id="utilisation", group="learning", percent=True, metrics={"utilisation": "used", "utilisation/effective": "effective"}),
    Lines(id="entropy", group="health", metrics={"entropy": "entropy"}),
    Lines(id="kl", group="health", log=True, metrics={"approx_kl": "within", "kl_ref": "reference", "sampler_gap_mean": "sampler"}),
    Lines(id="gradient", group="health", log=True, metrics={"grad_norm": "norm"}),
    Lines(id="length", group="health", metrics={"length/mean": "all", "length/finished": "finished"}),
    Lines(id="truncated", group="health", percent=True, metrics={"length/truncated": "truncated"}),
    Lines(id="turns", group="health", metrics={"turns/mean": "turns", "tools/calls": "calls"}),
    Lines(id="clip", group="policy", percent=True, metrics={"clip_fraction_low": "low", "clip_fraction_high": "high"}),
    Lines(id="clip-probability", group="policy", metrics={"clip/high_probability": "mean"}),
    Lines(id="spread", group="policy", log=True, metrics={"spread/token": "token", "spread/sequence": "mean", "spread/product": "sum"}),
    Lines(id="time", group="cost", metrics={"seconds/rollouts": "rollouts", "seconds/learner": "learner", "seconds/scoring": "scoring"}),
    Lines(id="speed", group="cost", metrics={"tokens_per_second": "speed"}),
    Lines(id="memory", group="cost", metrics={"memory/peak_mib": "peak"}),
    Lines(id="dropped", group="cost", metrics={
        "dropped/zero_variance": "zero_variance", "dropped/unselected": "unselected", "dropped/surplus": "surplus",
        "dropped/failed": "failed", "groups/too_old": "too_old", "dropped/filtered": "filtered"}),
    Lines(id="age", group="cost", metrics={"cluster/age_mean": "mean", "cluster/age_max": "max"}),
    Lines(id="queues", group="cost", metrics={
        "cluster/groups_under_way": "under_way", "cluster/groups_finished": "finished", "cluster/waiting": "waiting"}),
    Lines(id="idle", group="cost", percent=True, metrics={"cluster/idle/learner": "learner", "cluster/idle": "samplers"}),
    Lines(id="restarts", group="cost", metrics={
        "cluster/sampler_restarts": "samplers", "cluster/learner_restarts": "learner", "cluster/reissued": "reissued"}),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawn:
    """A curve, and whose it is."""

    group: Group
    run: Run | None
    """None: the mean over the group's seeds."""
    seeds: int
    curve: Curve


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """A figure of lines before its numbers are looked at."""

    id: str
    group: Kind
    labels: Mapping[str, Phrase]
    """Metric -> label."""
    percent: bool = False
    log: bool = False
    values: Mapping[str, Phrase]
    """For its texts."""
    note: Phrase | None = None


def figures(groups: Sequence[Group]) -> list[Figure]:
    """Every figure for which the runs recorded data, those of a heading together."""
    wanted = [_accuracy(groups), _rewards(groups), *(_training(lines) for lines in TRAINING)]
    recorded = [(group, {name for run in group.runs for name in _names(run)}) for group in groups]
    count = sum(_lines_of(group) * len(names & one.labels.keys()) for one in wanted for group, names in recorded)
    most = points_of(count)
    made = [figure for one in wanted if (figure := _figure(one, groups, most)) is not None] + distributions(groups)
    return sorted(made, key=lambda figure: GROUPS.index(figure["group"]))


def _names(run: Run) -> list[str]:
    return [*run.steps.names(), *run.evaluations.names()]


def _lines_of(group: Group) -> int:
    """How many numbers there are to a step of a metric: a mean has an interval."""
    return min(len(group.runs), FEWEST_SEEDS) if len({run.seed for run in group.runs}) >= FEWEST_SEEDS else len(group.runs)


def _training(lines: Lines) -> _Wanted:
    labels = {metric: phrase("figures", f"{lines.id}.{key}") for metric, key in lines.metrics.items()}
    return _Wanted(id=lines.id, group=lines.group, labels=labels, percent=lines.percent, log=lines.log, values={})


def _accuracy(groups: Sequence[Group]) -> _Wanted:
    scored = measure(run for group in groups for run in group.runs)
    name = measure_name(scored)
    return _Wanted(id="accuracy", group="learning", labels={scored.key: name}, percent=scored.percent, values={"measure": name})


def _rewards(groups: Sequence[Group]) -> _Wanted:
    """The reward and, where it is a sum of several, its components; which and how many is the user's choice."""
    every = dict.fromkeys(name for group in groups for run in group.runs for name in run.steps.names())
    beginning = WEIGHTED
    names = [name for name in every if name.startswith(beginning)]
    if not names:  # runs of earlier versions: the total and the task's part are before weights and a KL penalty, and add up
        beginning = "reward/part/"
        names = [name for name in every if name.startswith(beginning) and "/" not in name.removeprefix(beginning)]
    shown = names[:MOST_COMPONENTS] if len(names) > 1 else []
    parts = {name: same(visible(shortened(name.removeprefix(beginning), LONGEST_COMPONENT))) for name in shown}
    left_out = len(names) - len(shown) if shown else 0
    return _Wanted(
        id="rewards",
        group="learning",
        labels={"reward/shaped_mean": phrase("figures", "rewards.total"), **parts},
        values={},
        note=phrase("figures", "left_out", count=left_out) if left_out else None,
    )


def _figure(wanted: _Wanted, groups: Sequence[Group], most: int) -> Figure | None:
    """The figure of lines; None: no run recorded any of its metrics."""
    found = {metric: drawn for metric in wanted.labels if (drawn := list(_curves(groups, metric, wanted)))}
    if not found:
        return None
    band: Phrase | None = None
    if wanted.id == "accuracy":
        found, band = _with_noise(found, measure(run for group in groups for run in group.runs))
    lines: list[Line] = []
    constants: list[Constant] = []
    about: list[About] = []
    for dash, (metric, label) in enumerate(wanted.labels.items()):
        drawn = found.get(metric, [])
        if drawn and (value := _constant(drawn)) is not None:
            constants.append({"label": label.as_json(), "value": number_text(value, wanted.percent)})
            continue
        lines += [
            line(one.curve, id=f"{one.group.id}/{run_id(one.run) if one.run else ''}/{metric}", setting=one.group.id,
                 run=run_id(one.run) if one.run else None, label=label, dash=dash, seeds=one.seeds, most=most, broken=not metric.startswith("eval/"))
            for one in drawn
        ]  # fmt: skip
    if lines:
        about = _about([one for drawn in found.values() for one in drawn])
    axis: Axis = {
        "title": phrase("figures", f"{wanted.id}.y", **wanted.values).as_json(),
        "percent": wanted.percent,
        "log": wanted.log,
    }
    figure: Figure = {
        "id": wanted.id,
        "group": wanted.group,
        "title": phrase("figures", f"{wanted.id}.title").as_json(),
        "caption": phrase("figures", f"{wanted.id}.caption", **wanted.values).as_json(),
        "kind": "lines",
        "y": axis,
        "lines": lines,
        "constants": constants,
        "about": about,
    }
    if band:
        figure["band"] = band.as_json()
    if wanted.note:
        figure["note"] = wanted.note.as_json()
    return figure


def _curves(groups: Sequence[Group], metric: str, wanted: _Wanted) -> Iterator[_Drawn]:
    """What each group has of a metric: the mean over its seeds; of one or two seeds, which have no interval, the runs themselves."""
    for group in groups:
        having = [run for run in group.runs if len(run.column(metric)[0])]
        seeds = len({run.seed for run in having})
        if seeds >= FEWEST_SEEDS:
            curve = mean_over_seeds(having, metric, percent=wanted.percent, log=wanted.log)
            yield _Drawn(group=group, run=None, seeds=seeds, curve=curve)
        else:
            yield from (_Drawn(group=group, run=run, seeds=1, curve=of_run(run, metric)) for run in having)


def _constant(drawn: Sequence[_Drawn]) -> float | None:
    """The value that all curves have at all steps; None: there are others, or too few steps to say."""
    ends = {end for one in drawn for end in one.curve.extent}
    return ends.pop() if len(ends) == 1 and max(len(one.curve.steps) for one in drawn) >= 3 else None


def number_text(value: float, percent: bool) -> str:
    """A number in a sentence of any language."""
    if percent:
        return f"{100 * value:.4g}%".replace("-", "−")
    text = f"{value:,.0f}" if value == round(value) and abs(value) < 1e9 else f"{value:.4g}"
    factor, _, power = text.partition("e")
    if not power:
        return factor.replace("-", "−")
    return ("" if factor == "1" else f"{factor} × ".replace("-", "−")) + f"10{str(int(power)).translate(RAISED)}"


def _with_noise(found: dict[str, list[_Drawn]], scored: Measure) -> tuple[dict[str, list[_Drawn]], Phrase | None]:
    """Held-out results of single runs with the interval of each evaluation, which has so many problems; and what must be said of it.

    It tells what other problems of the same kind would give. The problems of one run stay the same, so its changes are less noisy.
    Where a setting has an interval over its seeds none is added: two kinds in one figure would be mistaken for each other.
    """
    drawn = [one for several in found.values() for one in several]
    if len(drawn) > MOST_EVALUATED or any(one.run is None for one in drawn):
        return found, None
    problems: set[int] = set()
    noisy: dict[str, list[_Drawn]] = {}
    for metric, several in found.items():
        noisy[metric] = [replace(one, curve=_evaluated(one, scored, problems)) for one in several]
    counts = sorted(problems)
    if not counts:
        return found, None
    text = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,}–{counts[-1]:,}"
    return noisy, phrase("figures", "evaluation", problems=text)


def _evaluated(one: _Drawn, scored: Measure, problems: set[int]) -> Curve:
    """A run's evaluations with their intervals; adds to `problems` how many they had."""
    assert one.run is not None
    counts = dict(one.run.series("eval_problems"))
    spreads = dict(one.run.series("eval/reward_std"))
    steps, values = one.curve.steps, one.curve.values
    low, high = np.full(len(steps), np.nan), np.full(len(steps), np.nan)
    for i, (step, value) in enumerate(zip(steps.tolist(), values.tolist(), strict=True)):
        count = int(counts.get(step, 0))
        if count > 1:
            low[i], high[i] = scored.ends(value, count, spreads.get(step, np.nan))
            problems.add(count)
    return Curve(steps, values, low, high)


def _about(drawn: Sequence[_Drawn]) -> list[About]:
    """What must be said of settings with two seeds, and of means over runs that end at different steps."""
    alone = {(one.group.id, run_id(one.run)) for one in drawn if one.run}
    few = [id for id, count in Counter(id for id, _ in alone).items() if count > 1]
    said: list[About] = [{"settings": sorted(few), "text": phrase("figures", "few_seeds").as_json()}] if few else []
    for group in {one.group.id: one.group for one in drawn if one.run is None}.values():
        ends = sorted(run.last_step for run in group.runs)
        if ends[-1] - ends[0] > UNEQUAL * ends[-1]:
            said.append({"settings": [group.id], "text": phrase("figures", "unequal", name=group.name).as_json()})
    return said[: 1 + MOST_ENDED]
