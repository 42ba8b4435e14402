"""groupwise eval: what it measures with which intervals, as a table and as JSON; and the version."""

import json
import math
import random
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from groupwise.cli.evaluate import measures
from groupwise.evidence.statistics import clustered_share, interval
from groupwise.training.evaluate import Evaluation
from tests.test_cli import run

SMALL = ("--set", "training.eval_problems=20")


def test_with_one_try_a_problem_it_is_wilsons_interval() -> None:
    """Wilson's by hand for 8 of 10: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)."""
    low, high = clustered_share([1.0] * 8 + [0.0] * 2)
    z, n, p = 1.96, 10, 0.8
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert (low, high) == pytest.approx(((centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)), rel=1e-12)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # as published tables have it


def test_tries_count_fully_only_where_problems_do_not_differ() -> None:
    alike, unlike = [0.5] * 20, [0.0, 1.0] * 10
    assert clustered_share(alike, 8) == pytest.approx(clustered_share([0.0, 1.0] * 80))
    assert clustered_share(unlike, 8) == pytest.approx(clustered_share([0.0, 1.0] * 10))


def test_ends_stay_inside_and_apart() -> None:
    low, high = clustered_share([1.0] * 5, 4)
    assert 0.5 < low < high == 1.0
    assert all(math.isnan(end) for end in clustered_share([]))


@pytest.mark.parametrize(("n", "k", "spread"), [(40, 1, 0.0), (40, 8, 0.4), (100, 4, 0.2)])
def test_the_interval_holds_the_truth_as_often_as_it_says(n: int, k: int, spread: float) -> None:
    """1,000 evaluations of problems whose own rates differ: the mean rate, 0.6, lies inside in about 95 % of them."""
    rng, inside = random.Random(0), 0
    for _ in range(1000):
        own = [0.6 + rng.choice((-spread, spread)) for _ in range(n)]
        rates = [sum(rng.random() < rate for _ in range(k)) / k for rate in own]
        low, high = clustered_share(rates, k)
        inside += low <= 0.6 <= high
    assert 0.925 <= inside / 1000 <= 0.98


def test_students_interval_beyond_the_table() -> None:
    """t for 100 degrees of freedom is 1.984; the values have mean 0 and standard deviation 1."""
    values = [1.0, -1.0] * 50 + [0.0]
    assert interval(values).half == pytest.approx(1.984 * 1.0 / math.sqrt(101), rel=1e-3)


def test_json_holds_the_numbers_of_the_table() -> None:
    result = run("eval", "arithmetic-base", "quick", "--samples", "4", "--json", *SMALL)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["model"], found["task"], found["problems"], found["samples"]) == ("arithmetic-base", "arithmetic", 20, 4)
    assert {"pass@1", "pass@2", "pass@4", "avg@4", "reward", "length", "truncated", "grade_1"} <= found["metrics"].keys()
    assert found["metrics"]["avg@4"] == found["metrics"]["pass@1"]
    for name, row in found["metrics"].items():
        assert row["low"] is None if name == "reward_std" else row["low"] <= row["value"] <= row["high"]
    table = run("eval", "arithmetic-base", "quick", "--samples", "4", *SMALL).stdout
    row = found["metrics"]["pass@1"]
    assert re.search(rf"pass@1 .*{row['value']:.3f}.*{row['low']:.3f} to {row['high']:.3f}", table)


def test_graded_rewards_have_a_mean_and_no_pass_rate(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def reward(problem, completions):\n    return [len(text) / 10 for text in completions]\n")
    (tmp_path / "data.jsonl").write_text("".join(f'{{"prompt": "{i}+1="}}\n' for i in range(40)))
    (tmp_path / "mine.toml").write_text(
        'extends = "quick"\n[task]\nname = "dataset"\npath = "data.jsonl"\nreward = "mine.py:reward"\n'
    )
    (tmp_path / "mine.toml").write_text(
        '[model]\npath = "arithmetic-base"\n[task]\nname = "dataset"\npath = "data.jsonl"\nreward = "mine.py:reward"\n'
        "held_out_share = 0.5\n"
    )
    result = run("eval", "arithmetic-base", tmp_path / "mine.toml", "--json", "--samples", "2", *SMALL)
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout)["metrics"]
    assert not any(name.startswith(("pass@", "avg@")) for name in metrics)
    assert metrics["reward"]["low"] < metrics["reward"]["value"] < metrics["reward"]["high"]


def test_one_problem_has_a_value_and_no_students_interval() -> None:
    evaluation = Evaluation(metrics={"eval/reward": 2.0, "eval/failed": 0.5}, values={"eval/reward": [2.0]}, groups=[])
    expected: dict[str, Any] = {"value": 2.0, "low": None, "high": None}
    assert measures(evaluation, 1) == {"reward": expected, "failed": {**expected, "value": 0.5}}


def test_errors_are_json_too() -> None:
    result = run("eval", "arithmetic-bas", "--json")
    assert result.exit_code == 2
    assert "did you mean 'arithmetic-base'?" in json.loads(result.stdout)["error"]
    assert "did you mean 'arithmetic-base'?" in result.stderr


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"groupwise {version('groupwise')}\n")
