"""Graded rewards from the first step to the report: nothing speaks of right and wrong where the task does not."""

import json
from pathlib import Path

import pytest

from groupwise.evidence.findings import findings
from groupwise.evidence.records import Records
from groupwise.evidence.runs import MEAN_REWARD, PASS_RATE, Run, measure, open_run
from tests.pages import data_of
from tests.test_cli import run

REWARD = """
def close(problem, completions):
    return [-abs(len(text) - 9.0) for text in completions]
"""


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("graded")
    (home / "rewards.py").write_text(REWARD)
    (home / "data.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{a}+{b}=", "answer": a + b}) + "\n" for a in range(1, 9) for b in range(9))
    )
    (home / "recipe.toml").write_text(
        """
[task]
name = "dataset"
path = "data.jsonl"
reward = "rewards.py:close"
[algorithm]
name = "dapo"
[rollouts]
group_size = 6
prompts_per_step = 6
max_tokens = 16
[learner]
minibatches = 2
learning_rate = 1e-4
[training]
steps = 8
eval_every = 4
eval_problems = 7
tokens_every = 8
"""
    )
    result = run("train", home / "recipe.toml", "--out", home / "run")
    assert result.exit_code == 0, result.output
    assert "mean reward" in result.stdout and "reward" in result.stdout
    assert "pass" not in result.stdout, "a graded reward has no pass rate"
    return home / "run"


def test_dapo_learns_from_a_reward_that_nothing_calls_right(graded: Path) -> None:
    opened = open_run(graded)
    assert [record["groups/kept"] for record in opened.steps] == [6.0] * 8
    assert not opened.values("train/pass_rate") and not opened.values("eval/pass@1")
    rewards = opened.values("eval/reward")
    assert len(rewards) == 3 and rewards[-1] > rewards[0]
    last = opened.steps[-1]
    assert last["groups/equal"] + last["groups/mixed"] == pytest.approx(1)
    assert last["groups/zero_variance"] == pytest.approx(last["groups/equal"])


def test_the_report_speaks_of_the_mean_reward(graded: Path) -> None:
    result = run("report", graded)
    assert result.exit_code == 0, result.output
    shown = data_of(graded / "report.html")
    assert shown["measure"]["en"] == "mean reward" and shown["tiles"][0]["label"]["en"] == "Held-out mean reward"
    assert "pass@1" not in str({**shown, "runs": []})
    told = {item.title.en: item.text.en for item in findings(open_run(graded))}
    assert not any("correct" in text or "pass@1" in text or "solved" in text for text in told.values()), told
    readable = (graded / "rollouts" / "step-000001.txt").read_text()
    assert " right" not in readable and "--- best: reward" in readable


def test_eval_gives_the_mean_reward(graded: Path) -> None:
    result = run("eval", graded, "--samples", "2")
    assert result.exit_code == 0, result.output
    assert "reward" in result.stdout and "pass@1" not in result.stdout


def made_up(scores: list[float], deviation: float, **last: float) -> Run:
    evaluations = [
        {"step": 10 * i, "eval/reward": score, "eval/reward_std": deviation, "eval_problems": 100}
        for i, score in enumerate(scores)
    ]
    steps = [{"step": i + 1, "reward/mean": 0.5, "reward/shaped_spread": 0.3, "groups/equal": 0.1, **last} for i in range(10)]
    return Run(path=Path("x"), recipe={"algorithm": {"name": "grpo"}}, steps=Records(steps), evaluations=Records(evaluations))


@pytest.mark.parametrize(
    ("scores", "deviation", "title"),
    [
        ([10.0, 14.0, 20.0], 5.0, "It learned"),  # 95 % interval of the change: 1.96 * 5 / 10 * sqrt(2) = 1.39
        ([10.0, 10.5, 11.0], 5.0, "It did not learn"),
        ([10.0, 9.0, 8.0], 5.0, "It got worse"),
        ([10.0, 30.0, 20.0], 5.0, "The mean reward fell after its peak"),
        ([-2.0, -1.0, -0.5], 0.2, "It learned"),
    ],
)
def test_findings_weigh_a_change_of_the_mean_reward_against_its_spread(scores: list[float], deviation: float, title: str) -> None:
    assert title in [item.title.en for item in findings(made_up(scores, deviation))]


def test_equal_rewards_are_not_called_solved_problems() -> None:
    told = findings(made_up([1.0, 1.0], 0.1, **{"groups/equal": 0.9, "groups/zero_variance": 0.9, "utilisation": 0.1}))
    (groups,) = [item for item in told if item.figure == "groups"]
    assert (
        groups.title.en == "Most groups have zero variance"
        and "In 90% of the groups all completions have the same reward" in groups.text.en
    )


def test_runs_with_and_without_a_verdict_are_compared_by_reward() -> None:
    graded = made_up([1.0, 2.0], 0.1)
    passed = Run(
        path=Path("y"), recipe={}, steps=Records(), evaluations=Records([{"step": 0, "eval/pass@1": 0.5, "eval/reward": 0.5}])
    )
    assert measure([passed]) is PASS_RATE and measure([graded]) is MEAN_REWARD and measure([passed, graded]) is MEAN_REWARD
