"""The figures' numbers: means and intervals over seeds by hand, peaks that stay, lines that grow at their end only."""

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from groupwise.evidence import lines
from groupwise.evidence.document import document
from groupwise.evidence.figures import GROUPS, figures, number_text
from groupwise.evidence.history import Noted, Segment
from groupwise.evidence.lines import (
    FEWEST_POINTS,
    MOST_POINTS,
    clock,
    marks,
    mean_over_seeds,
    numbers,
    points_of,
    rounded,
    thinned,
)
from groupwise.evidence.naming import grouped
from groupwise.evidence.pictures import charts
from groupwise.evidence.reading import LeftOut
from groupwise.evidence.records import Metrics, Records
from groupwise.evidence.runs import Run
from groupwise.evidence.shapes import Figure

Metric = Callable[[int], float | list[float] | None]


def made(
    name: str,
    steps: int,
    metrics: Mapping[str, Metric],
    *,
    seed: int = 0,
    rate: float = 1e-4,
    scores: Mapping[int, float] | None = None,
    **more: Any,
) -> Run:
    """A run whose metrics are functions of the step."""
    records = [
        {"step": step, "reward/mean": 0.5, **{key: of(step) for key, of in metrics.items()}} for step in range(1, steps + 1)
    ]
    evaluated = [{"step": step, "eval/pass@1": score, "eval_problems": 100.0} for step, score in (scores or {}).items()]
    recipe = {"seed": seed, "algorithm": {"name": "dapo"}, "learner": {"learning_rate": rate}}
    return Run(path=Path(name), recipe=recipe, steps=Records(records), evaluations=Records(evaluated), **more)


def drawn(*runs: Run) -> dict[str, Figure]:
    found = figures(grouped(runs))
    json.dumps(found, allow_nan=False)
    return {figure["id"]: figure for figure in found}


def test_the_mean_over_three_seeds_by_hand() -> None:
    """At step 2 the seeds have 1, 2 and 3: mean 2, standard deviation 1, t = 4.303, so ± 4.303 / √3 = 2.484."""
    runs = [made(f"r{k}", 3, {"entropy": lambda step, k=k: 1.0 + k if step == 2 else 5.0}, seed=k) for k in range(3)]
    (line,) = drawn(*runs)["entropy"]["lines"]
    assert (line["steps"], line["values"], line["seeds"], line["run"]) == ([1, 2, 3], [5.0, 2.0, 5.0], 3, None)
    assert line["low"] == [5.0, pytest.approx(2 - 2.4841, abs=1e-3), 5.0]
    assert line["high"] == [5.0, pytest.approx(2 + 2.4841, abs=1e-3), 5.0]
    shares = [made(f"s{k}", 3, {"length/truncated": lambda step, k=k: k / 2 / step}, seed=k) for k in range(3)]
    (share,) = drawn(*shares)["truncated"]["lines"]
    assert share["low"] == [0.0, 0.0, 0.0] and share["high"] is not None and share["high"][0] == 1.0


def test_the_interval_of_a_logarithmic_figure_is_of_the_logarithm() -> None:
    """1, 2 and 3: ± 2.4841 around 2 ends below 0; of log 2, the half is 2.4841 / 2. Of 0, 0 and 0 there is none."""
    runs = [made(f"r{k}", 3, {"grad_norm": lambda step, k=k: (1.0 + k) * (step != 2)}, seed=k) for k in range(3)]
    figure = drawn(*runs)["gradient"]
    (line,) = figure["lines"]
    assert figure["y"]["log"] and line["values"] == [2.0, 0.0, 2.0]
    assert line["low"] == [pytest.approx(2 * math.exp(-1.24207), rel=1e-4), None, line["low"] and line["low"][2]]
    assert line["high"] == [pytest.approx(2 * math.exp(1.24207), rel=1e-4), None, line["high"] and line["high"][2]]


def test_numbers_in_sentences() -> None:
    said = [number_text(value, False) for value in (1e-6, -2.5e-7, 0.25, 12_345.0, 1e12, 0.0)]
    assert said == ["10⁻⁶", "−2.5 × 10⁻⁷", "0.25", "12,345", "10¹²", "0"] and number_text(-0.125, True) == "−12.5%"


def test_a_second_calculation_of_means_where_seeds_have_other_steps() -> None:
    rng = np.random.default_rng(3)
    recorded = [{int(step): float(rng.normal()) for step in rng.permutation(40)[: 10 + 7 * k] + 1} for k in range(5)]
    curve = mean_over_seeds([made(f"r{k}", 40, {"m": values.get}, seed=k) for k, values in enumerate(recorded)], "m")
    assert curve.low is not None
    for step, mean, low in zip(curve.steps.tolist(), curve.values, curve.low, strict=True):
        own = [values[step] for values in recorded if step in values]
        assert mean == pytest.approx(statistics.fmean(own))
        t = {3: 4.3027, 4: 3.1824, 5: 2.7764}.get(len(own), math.nan)
        half = t * statistics.stdev(own) / math.sqrt(len(own)) if len(own) > 2 else math.nan
        assert low == pytest.approx(mean - half, rel=1e-4, nan_ok=True)


def test_two_seeds_have_a_line_each_and_a_note() -> None:
    metrics: dict[str, Metric] = {"entropy": lambda step: 1 / step}
    two = [made(f"two{k}", 5, metrics, seed=k) for k in range(2)]
    three = [made(f"three{k}", 5, metrics, seed=k, rate=1e-3) for k in range(3)]
    figure = drawn(*two, *three)["entropy"]
    assert [(line["seeds"], line["run"] is None, line["low"] is None) for line in figure["lines"]] == [
        (1, False, True), (1, False, True), (3, True, False),
    ]  # fmt: skip
    (about,) = figure["about"]
    assert about["settings"] == [figure["lines"][0]["setting"]] and about["text"]["en"].startswith("Fewer than three seeds")
    assert drawn(two[0])["entropy"]["about"] == [] and drawn(*three)["entropy"]["about"] == []
    stopped = [*three[:2], made("three2", 2, metrics, seed=2, rate=1e-3)]
    figure = drawn(*stopped)["entropy"]
    assert "where some have ended" in figure["about"][0]["text"]["en"]
    assert (
        figure["lines"][0]["low"] is not None and [end is None for end in figure["lines"][0]["low"]] == [False] * 2 + [True] * 3
    )


def test_runs_of_one_seed_are_no_further_seeds() -> None:
    again = [made(f"r{k}", 3, {"entropy": lambda step, k=k: 1.0 + k + step}, seed=k // 2) for k in range(4)]
    lines = drawn(*again)["entropy"]["lines"]
    assert [line["seeds"] for line in lines] == [1] * 4 and all(line["low"] is None for line in lines)
    (line,) = drawn(*again, made("r4", 3, {"entropy": lambda step: 5.5 + step}, seed=2))["entropy"]["lines"]
    assert line["seeds"] == 3 and line["values"] == pytest.approx([(1.5 + 3.5 + 5.5) / 3 + step for step in (1, 2, 3)], rel=1e-4)
    assert line["low"] and line["low"][0] == pytest.approx(4.5 - 4.3027 * 2 / math.sqrt(3), abs=1e-3)


def test_a_single_runs_evaluations_have_their_own_interval() -> None:
    """60 % of 100 problems, z² = 3.84: (60 + 1.92) / 103.84 = 0.5963, ± 1.96 √(100 · 0.6 · 0.4 + 0.96) / 103.84 = 0.0943."""
    one = made("a", 4, {}, scores={0: 0.6, 4: 0.7, 5: 0.0})
    figure = drawn(one)["accuracy"]
    assert figure["band"]["en"] == "95% interval of each evaluation by itself, from its 100 problems"
    (line,) = figure["lines"]
    assert line["low"] and line["high"] and line["low"][0] == pytest.approx(0.5020, abs=1e-4) and line["low"][2] == 0.0
    others = [made(f"b{k}", 4, {}, seed=k, rate=1e-3, scores={0: 0.6, 4: 0.7 + k / 10}) for k in range(3)]
    figure = drawn(one, *others)["accuracy"]
    assert "band" not in figure and [line["low"] is None for line in figure["lines"]] == [True, False]


def test_long_lines_keep_their_peaks_and_change_at_their_end_only() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    values[54_321] = 9.0
    chosen, stretch = thinned(values, 4096)
    assert len(chosen) <= 4096 and 54_321 in chosen and chosen[0] == 0 and chosen[-1] == 99_999 and (np.diff(chosen) > 0).all()
    for start in range(0, 100_000, stretch):
        part = values[start : start + stretch]
        assert {start + int(part.argmin()), start + int(part.argmax())} <= set(chosen.tolist())
    longer, same_stretch = thinned(np.append(values, [50.0, -50.0]), 4096)
    assert same_stretch == stretch and 100_000 in longer and 100_001 in longer
    alike = int(np.searchsorted(chosen, 100_000 // stretch * stretch))
    assert (longer[:alike] == chosen[:alike]).all() and alike > 3000
    assert thinned(values[:4096], 4096)[1] == 1


def test_long_lines_are_smoothed_over_all_values() -> None:
    """Of a value that is seldom other than 0: the middle between a stretch's lowest and highest would be far too high."""
    rare: Metric = lambda step: 1.0 if step % 100 == 0 else 0.0  # noqa: E731
    (line,) = drawn(made("a", 100_000, {"entropy": rare}))["entropy"]["lines"]
    stretch, means = line["stretch"], line["means"]
    assert stretch > 1 and means is not None and len(means) == len(line["steps"]) < MOST_POINTS + 1
    for step, mean in list(zip(line["steps"], means, strict=True))[::97]:
        first = (step - 1) // stretch * stretch + 1
        own = [rare(number) for number in range(first, min(first + stretch, 100_001))]
        assert mean == pytest.approx(np.mean(own), abs=1e-5)
    assert np.mean(means) == pytest.approx(0.01, rel=0.02)  # each stretch counts twice, whatever it holds
    (short,) = drawn(made("b", 100, {"entropy": rare}))["entropy"]["lines"]
    assert short["means"] is None


def test_a_line_is_broken_where_it_has_no_value_for_long() -> None:
    """Values at every second step, none from 22 to 60; the break stands at the step after 20."""
    recorded: Metric = lambda step: float(step) if step % 2 == 0 and not 20 < step < 61 else None  # noqa: E731
    (line,) = drawn(made("a", 100, {"clip/high_probability": recorded}))["clip-probability"]["lines"]
    at = line["steps"].index(21)
    assert line["values"][at - 1 : at + 2] == [20.0, None, 62.0] and line["values"].count(None) == 1
    assert list(line["steps"]) == sorted(line["steps"])
    long: Metric = lambda step: math.sin(step) if not 20_000 < step < 60_000 else None  # noqa: E731
    (line,) = drawn(made("b", 100_000, {"entropy": long}))["entropy"]["lines"]
    assert line["values"].count(None) == 1 and line["steps"][line["values"].index(None)] == 20_001


def test_all_lines_of_a_page_share_its_points(monkeypatch: pytest.MonkeyPatch) -> None:
    assert points_of(1) == points_of(60) == MOST_POINTS and points_of(10**9) == FEWEST_POINTS
    assert all(points_of(count) & (points_of(count) - 1) == 0 for count in range(1, 3000, 7))
    monkeypatch.setattr(lines, "PAGE_POINTS", 400)
    wave: Metric = lambda step: math.sin(step)  # noqa: E731
    runs = [made(f"r{k}", 500, {"entropy": wave, "grad_norm": wave}, rate=10.0**-k) for k in range(4)]
    shown = [line for figure in drawn(*runs).values() for line in figure.get("lines", [])]
    assert all(len(line["steps"]) <= FEWEST_POINTS and line["stretch"] == 32 for line in shown) and len(shown) == 8


def test_what_never_changes_is_said_and_not_drawn() -> None:
    metrics: dict[str, Metric] = {
        "groups/mixed": lambda step: step / 10,
        "groups/all_wrong": lambda _: 0.25,
        "dropped/surplus": lambda _: 0.0,
    }
    found = drawn(made("a", 4, metrics), made("b", 4, metrics, rate=1e-3))
    assert {line["label"]["en"] for line in found["groups"]["lines"]} == {"mixed"}
    assert [(constant["label"]["zh"], constant["value"]) for constant in found["groups"]["constants"]] == [("全部错误", "25%")]
    assert found["dropped"]["lines"] == [] and found["dropped"]["constants"][0]["value"] == "0"
    other = {**metrics, "groups/all_wrong": lambda _: 0.5}
    assert len(drawn(made("a", 4, metrics), made("b", 4, other, rate=1e-3))["groups"]["lines"]) == 4
    assert drawn(made("a", 2, metrics))["groups"]["constants"] == []  # too soon to say


def test_marks_name_what_was_noted() -> None:
    event = Noted(step=3, time="", kind="warning", name="n", text="entropy \u202efell", advice="")
    late = Noted(step=9, time="", kind="fault", name="n", text="beyond the last step", advice="")
    changed = Segment(first_step=4, started="", version="", changed={"learner.learning_rate": (1, 2)}, recipe={})
    run = made("a", 5, {"entropy": float}, events=[event, late], segments=[changed])
    expected = [{"step": 3, "text": "entropy \\u202efell"}, {"step": 4, "text": "learner.learning_rate"}]
    assert marks(grouped([run])) == expected
    two = marks(grouped([run, made("b", 5, {"entropy": float}, rate=1e-3)]))
    assert two[0]["text"].startswith("a · dapo") and two[0]["text"].endswith(": entropy \\u202efell")


def test_hostile_names_of_components_and_many_of_them() -> None:
    names = ["<b>\u202ex", "y" * 500, *(f"part {i}" for i in range(40))]
    found = drawn(made("a", 4, {f"reward/part/{name}": float for name in names} | {"reward/shaped_mean": float}))["rewards"]
    labels = [line["label"]["en"] for line in found["lines"]]
    assert len(labels) == 13 and labels[1] == "<b>\\u202ex" and len(labels[2]) < 100
    assert found["note"]["en"] == "30 more components are not drawn."


def test_components_of_the_reward_add_up_to_it() -> None:
    """Weighted ones; of runs of earlier versions the task's reward as a whole, since its own components had no weights."""
    older = {"reward/part/task": lambda step: 0.5 * step, "reward/part/overlong": lambda step: -0.1 * step}
    older |= {"reward/part/task/exact": lambda step: 1.0 * step, "reward/shaped_mean": lambda step: 0.4 * step}
    newer = {"reward/weighted/exact": lambda step: 0.5 * step, "reward/weighted/algorithm/kl": lambda step: -0.2 * step}
    for metrics in (older, older | newer | {"reward/shaped_mean": lambda step: 0.3 * step}):
        total, *parts = drawn(made("a", 4, metrics))["rewards"]["lines"]
        assert len(parts) == 2 and np.sum([part["values"] for part in parts], axis=0) == pytest.approx(total["values"])


def test_numbers_are_rounded_as_python_writes_them() -> None:
    random = np.random.default_rng(0)
    wide = random.standard_normal(20_000) * 10.0 ** random.integers(-40, 40, 20_000)
    ties = (random.integers(10_000, 100_000, 5_000) * 10 + 5) / 10.0 ** random.integers(0, 12, 5_000)
    values = np.concatenate(
        [wide, random.random(20_000), ties, -ties, [0.0, -0.0, 1e300, -1e-300, 5e-324, 99999.5, 0.1, 1e22, 1e23, 123456.5]]
    )
    assert rounded(values).tolist() == [float(f"{value:.5g}") for value in values]
    assert numbers([math.nan, 1.234567, -math.inf, math.inf]) == [None, 1.2346, None, None] and numbers([]) == []
    assert numbers([sys.float_info.max]) == [None]  # of five digits it would be infinite


def test_numbers_of_any_size_can_be_drawn() -> None:
    bins: Metric = lambda step: [1e299 if step % 2 else -1e299] * 16  # noqa: E731
    wild: Metric = lambda step: 9e299 if step % 3 else -9e299  # noqa: E731
    names = ("entropy", "seconds/learner", "rollouts/completions", "groups/mixed", "reward/shaped_mean")
    metrics = {**dict.fromkeys(names, wild), **{f"by_length/{name}": bins for name in ("rows", "mean_square", "sum_square")}}
    runs = [made(f"r{k}", 50, metrics, seed=k, scores={0: 9e299, 2**52: -9e299}) for k in range(3)]
    assert len(drawn(*runs)["entropy"]["lines"]) == 1 and len(drawn(runs[0])["accuracy"]["lines"]) == 1
    json.dumps(clock(runs), allow_nan=False)


def test_binned_metrics_become_shares_and_root_mean_squares() -> None:
    metrics: dict[str, Metric] = {
        "by_probability/tokens": lambda _: [10.0] * 10 + [0.0], "by_probability/clipped_high": lambda _: [1.0] * 11,
        "by_probability/clipped_low": lambda _: [5.0] * 11, "by_length/rows": lambda _: [10.0, 10.0, *[1.0] * 14],
        "by_length/mean_square": lambda _: [40.0, 90.0, *[1.0] * 14], "by_length/sum_square": lambda _: [0.0] * 16,
    }  # fmt: skip
    found = drawn(made("a", 3, metrics))
    low, high = found["clip-by-probability"]["series"]
    assert high["y"] == [0.1] * 10 + [None] and low["y"][0] == 0.5 and len(found["clip-by-probability"]["bins"]) == 11
    (mean,) = found["spread-length"]["series"]
    assert mean["y"] == [2.0, 3.0]  # the square roots of 40 / 10 and 90 / 10


def test_the_clock_is_the_mean_of_what_each_step_took() -> None:
    """The first run takes 2 s and 10 completions a step and ends after 2 steps; the second takes 4 s and 20, for 3 steps."""
    kinds = ("seconds/rollouts", "seconds/learner")
    runs = [
        made("first", 2, {**dict.fromkeys(kinds, lambda _: 1.0), "rollouts/completions": lambda _: 10.0}),
        made("second", 3, {**dict.fromkeys(kinds, lambda _: 2.0), "rollouts/completions": lambda _: 20.0}, seed=1),
    ]
    found = clock(runs)
    assert found == {"steps": [0, 1, 2, 3], "completions": [0.0, 15.0, 30.0, 50.0], "seconds": [0.0, 3.0, 6.0, 10.0]}
    long = clock([made("long", 5000, {"seconds/learner": lambda _: 1.0})])
    assert len(long["steps"]) <= lines.CLOCK_POINTS + 1 and long["steps"][-1] == 5000 and long["seconds"][-1] == 5000.0


def test_a_run_that_is_drawn_by_itself_is_drawn_on_its_own_clock() -> None:
    times = {"seconds/rollouts": lambda _: 1.0}, {"seconds/rollouts": lambda _: 9.0}
    runs = [made(f"r{k}", 10, of, seed=k, scores={0: 0.2, 10: 0.5 + k / 10}) for k, of in enumerate(times)]
    drawn_at = re.findall(r'"x": ([0-9.]+)', json.dumps(charts(runs)["accuracy-time"].to_dict()))
    assert {float(seconds) for seconds in drawn_at} == {0.0, 10.0, 90.0}
    assert [run["clock"]["seconds"][-1] for run in document(runs)["runs"]] == [10.0, 90.0]
    assert "clock" not in document(runs[:1])["runs"][0]


def test_records_may_come_again() -> None:
    records, bins = Records(), [1.0, 2.0]
    for step in range(1, 1201):
        records.append(step, {"a": float(step), "bins": bins} if step % 2 else {"a": float(step)})
    assert len(records) == 1200 and records[-1] == {"step": 1200, "a": 1200.0}
    kept = records.column("a")[1]
    records.append(1100, {"a": -1.0})
    assert len(records) == 1200 and records[1099] == {"step": 1100, "a": -1.0} and kept[1099] == 1100.0
    kept = records.column("a")[1]
    records.append(1201, {"a": -7.0})
    assert records.column("a")[1][1200] == -7.0 and len(kept) == 1200  # whoever holds a column is not disturbed
    with pytest.raises(ValueError, match="read-only"):
        kept[0] = 0.0
    records.append(1202, {"late": 3.0})
    assert records[-1] == {"step": 1202, "late": 3.0} and records.names() == ["a", "bins", "late"]
    steps, values = records.column("bins")
    assert values.shape == (600, 2) and steps[1] == 3 and records.column("unknown")[1].size == 0
    assert records == Records(list(records)) and records != Records()


def test_one_by_one_metrics_are_as_all_at_once() -> None:
    lines_of_file = [
        {"step": 1, "reward/mean": 1, "groups/dead": 0.5, "by_length/rows": [1.0] * 16, "no": None, "inf": math.inf, "b": [1.0]},
        {"step": 1, "eval/reward": 0.5},
        {"step": 2, "reward/mean": 0.5, "by_length/rows": [math.nan] * 16, "flag": True},
        {"step": 2, "reward/mean": 0.25, "huge": 10**400},
    ]  # fmt: skip
    metrics, left_out = Metrics(), LeftOut()
    for number, found in enumerate(lines_of_file, start=1):
        metrics.add(found, left_out, line=number)
        assert len(metrics.steps) == (1 if number < 3 else 2)
    assert metrics.steps[0] == {"step": 1, "reward/mean": 1.0, "groups/zero_variance": 0.5, "by_length/rows": [1.0] * 16}
    assert metrics.steps[1] == {"step": 2, "reward/mean": 0.25} and list(metrics.evaluations) == [{"step": 1, "eval/reward": 0.5}]
    assert [re.sub(r" is not.*", "", line) for line in left_out] == [
        "metrics.jsonl, line 3: 'by_length/rows'",
        "metrics.jsonl, line 3: 'flag'",
    ]


def test_every_kind_of_figure_has_a_picture() -> None:
    metrics: dict[str, Metric] = {
        "entropy": lambda step: 1 / step,
        "grad_norm": lambda step: step - 2.0,
        "groups/equal": lambda _: 0.0,
    }
    for name in ("tokens", "clipped_high", "clipped_low"):
        metrics[f"by_probability/{name}"] = lambda _: [10.0] * 11
    for name in ("rows", "mean_square", "sum_square"):
        metrics[f"by_length/{name}"] = lambda _: [10.0] * 16
    runs = [made(f"r{k}", 5, metrics, seed=k % 3, rate=10.0 ** -(k // 3), scores={0: 0.1, 5: 0.2 + k / 10}) for k in range(4)]
    found = charts(runs)
    assert {"accuracy", "accuracy-rollouts", "accuracy-time", "entropy", "clip-by-probability", "spread-length"} <= found.keys()
    assert "groups" not in found  # constant
    said = found["entropy"].to_dict()["title"]["subtitle"]
    assert said == ["Bands: 95% interval of the mean over 3 seeds."]


def test_figures_of_a_heading_are_together() -> None:
    metrics: dict[str, Metric] = {"entropy": float, "tokens_per_second": float, "groups/mixed": float, "clip_fraction_low": float}
    groups = [figure["group"] for figure in drawn(made("a", 3, metrics)).values()]
    assert groups == sorted(groups, key=GROUPS.index) and len(set(groups)) == 4
