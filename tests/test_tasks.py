"""The arithmetic task is right about arithmetic, and the dataset task about files."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupwise.config import Source
from groupwise.errors import UserError
from groupwise.tasks.arithmetic import ArithmeticTask, parse, score_answer, working
from groupwise.tasks.base import build_task
from groupwise.types import Problem, Score
from tests.conftest import said


def problem(expression: str) -> Problem:
    return Problem(id=expression, prompt=f"{expression}=", answer=str(eval(expression)))


def test_working_by_hand() -> None:
    expression = parse("7+3*4-5")
    assert expression is not None
    assert working(expression) == "\n7+12-5\n19-5\n14"


@given(st.integers(0, 10_000))
def test_values_and_workings_agree_with_python(position: int) -> None:
    drawn = ArithmeticTask().problem(position, seed=0)
    assert drawn.answer == str(eval(drawn.id))
    expression = parse(drawn.id)
    assert expression is not None
    text = working(expression)
    assert [eval(line) for line in text.split("\n")[1:]] == [eval(drawn.id)] * len(expression.operators)
    score = score_answer(drawn, text)
    assert score.correct and score.verdict == "correct"
    assert [reward for _, reward in score.steps] == [1.0] * len(expression.operators)
    assert score.steps[-1][0] == len(text)


@pytest.mark.parametrize(
    ("text", "verdict", "steps"),
    [
        ("14", "correct", [(2, 1)]),
        ("13", "wrong", [(2, 0)]),
        ("\n7+12-5\n19-5\n14", "correct", [(7, 1), (12, 1), (15, 1)]),
        ("\n7+12-5\n18-5\n13", "wrong", [(7, 1), (12, 0), (15, 0)]),
        ("\n7+12-5\n18-5\n14", "correct", [(7, 1), (12, 0), (15, 1)]),
        ("\n14", "correct", [(3, 0)]),  # skipped lines: the answer is right, the step is not one operation
        ("", "unparsed", [(0, 0)]),
        ("\n7+12-", "unparsed", [(6, 0)]),
        ("--4", "unparsed", [(3, 0)]),
        ("19-5", "unparsed", [(4, 0)]),
        ("\n\n14", "correct", [(1, 0), (4, 0)]),
    ],
)
def test_scores_by_hand(text: str, verdict: str, steps: list[tuple[int, float]]) -> None:
    score = score_answer(problem("7+3*4-5"), text)
    assert score.verdict == verdict
    assert score.correct == (verdict == "correct") == bool(score.reward)
    assert list(score.steps) == steps


def test_held_out_shares_no_expression_with_training_of_any_kind() -> None:
    task = ArithmeticTask()
    held_out = {item.id for item in task.held_out(500)}
    assert len(held_out) == 500
    assert held_out == {item.id for item in ArithmeticTask().held_out(500)}
    assert not held_out & {task.problem(i, seed).id for i in range(5000) for seed in (0, 1)}
    assert not held_out & {task.demonstration(i, 0).prompt.removesuffix("=") for i in range(5000)}


def test_a_pool_is_revisited_and_seeds_differ() -> None:
    task = ArithmeticTask(problems=5)
    assert [task.problem(i, 0).id for i in range(5)] == [task.problem(i + 5, 0).id for i in range(5)]
    assert [task.problem(i, 0).id for i in range(5)] != [task.problem(i, 1).id for i in range(5)]


def test_grades_have_their_operands_and_products() -> None:
    for grade, operands, products in [(1, 2, 0), (2, 3, 0), (3, 4, 0), (4, 4, 1), (5, 5, 1)]:
        for i in range(200):
            expression = parse(ArithmeticTask(grades=[grade]).problem(i, 0).id)
            assert expression is not None
            assert (len(expression.numbers), expression.operators.count("*")) == (operands, products)


def scores_of(task: Any, problem: Problem, texts: list[str]) -> list[Score]:
    return asyncio.run(task.score(problem, [said(text) for text in texts]))


def write_dataset(tmp_path: Path, lines: list[str], **settings: Any) -> Any:
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return build_task({"name": "dataset", "path": "data.jsonl", **settings}, Source(tmp_path / "recipe.toml", ""))


def rows(count: int) -> list[str]:
    return [json.dumps({"prompt": f"{i}+1=", "answer": i + 1, "note": "x"}) for i in range(count)]


def test_dataset_visits_each_problem_once_an_epoch(tmp_path: Path) -> None:
    task = write_dataset(tmp_path, rows(20))
    held_out = {item.id for item in task.held_out(100)}
    epochs = [[task.problem(18 * epoch + i, 0).id for i in range(18)] for epoch in range(2)]
    assert len(held_out) == 2
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted({f"{i}+1=" for i in range(20)} - held_out)
    assert epochs[0] != epochs[1]
    assert task.problem(0, 0).metadata == {"note": "x"}


@pytest.mark.parametrize(
    ("reward", "text", "correct"),
    [("exact", " 8 ", True), ("last_line", "so\n8\n", True), ("exact", "so\n8", False), ("math", "it is $\\frac{16}{2}$", True)],
)
def test_checkers(tmp_path: Path, reward: str, text: str, correct: bool) -> None:
    task = write_dataset(tmp_path, rows(5), reward=reward)
    seven = Problem(id="7+1=", prompt="7+1=", answer="8")
    assert [score.correct for score in scores_of(task, seven, [text, "9"])] == [correct, False]


def test_a_users_reward(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def close(problem, completions):\n    return [-len(text) for text in completions]\n")
    task = write_dataset(tmp_path, rows(4), reward="mine.py:close", correct_above=-2.5)
    scores = scores_of(task, task.problem(0, 0), ["a", "abc"])
    assert [(score.reward, score.correct) for score in scores] == [(-1.0, True), (-3.0, False)]


def test_an_answer_that_takes_forever_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("groupwise.rewards.settings.TIME_LIMIT", 1.0)
    task = write_dataset(tmp_path, rows(5), reward="math")
    problem = Problem(id="x", prompt="x", answer="8")
    found = scores_of(task, problem, ["$9^{9^{9^{9}}}$", "$8$"])
    assert [(score.failure, score.verdict) for score in found] == [("timeout", None), (None, "correct")]
    assert "9^{9^" in found[0].detail


@pytest.mark.parametrize(
    ("lines", "settings", "message"),
    [
        (['{"prompt": "a", "answer": 1}', "{oops"], {}, r"data.jsonl, line 2: not JSON: .* column 2"),
        (['{"prompt": "a", "anwser": 1}'], {}, r"data.jsonl, line 1: no 'answer'; did you mean 'anwser'\?"),
        (["[1]"], {}, r"data.jsonl, line 1: expected an object"),
        (['{"prompt": 3, "answer": 1}'], {}, r"line 1: 'prompt' must be a text"),
        (["", ""], {}, r"data.jsonl: no problems"),
        (['{"prompt": "a", "answer": 1}'], {}, r"too few problems"),
        (rows(4), {"reward": "mth"}, r"there is no reward 'mth'; did you mean 'math'\?"),
        (rows(4), {"path": "dta.jsonl"}, r"no file 'dta.jsonl' .*did you mean 'data.jsonl'\?"),
        (rows(4), {"reward": "no.py:f"}, r"there is no file 'no.py'"),
        (rows(4), {"pth": "x"}, r"task.pth: unknown key; did you mean 'path'\?"),
    ],
)
def test_bad_data_is_named(tmp_path: Path, lines: list[str], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_dataset(tmp_path, lines, **settings)
