"""A task of the user's own, as `file.py:Class` in a recipe; and what `groupwise data` shows."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import groupwise as gw
from groupwise.cli import app
from groupwise.config import Source
from groupwise.errors import UserError
from groupwise.tasks.base import build_task
from groupwise.types import Problem, Score
from tests.conftest import said
from tests.test_cli import run

PLAIN = '''
from groupwise.types import Demonstration, Problem, Score


class Doubles:
    """Twice a number."""

    def __init__(self, largest: int = 9, offset: int = 0) -> None:
        self.largest, self.offset = largest, offset

    def problem(self, position: int, seed: int) -> Problem:
        number = (position * 7 + seed) % self.largest
        return Problem(id=str(number), prompt=f"{number}+{number}=", answer=str(2 * number + self.offset))

    def held_out(self, count: int) -> list[Problem]:
        return [Problem(id=f"h{n}", prompt=f"{n}+{n}=", answer=str(2 * n)) for n in range(10, 10 + min(count, 5))]

    def score(self, problem, completions):
        return [Score(reward=float(c.text == problem.answer), correct=c.text == problem.answer) for c in completions]

    def demonstration(self, position: int, seed: int) -> Demonstration:
        problem = self.problem(position, seed)
        return Demonstration(prompt=problem.prompt, completion=problem.answer)
'''
INIT = """    def __init__(self, largest: int = 9, offset: int = 0) -> None:
        self.largest, self.offset = largest, offset
"""
FIELDS = """    name: str = ""
    largest: int = 9
    offset: int = 0
"""
MODEL = "from pydantic import BaseModel\n\n\nclass Doubles(BaseModel, extra='forbid'):"
PYDANTIC = PLAIN.replace("class Doubles:", MODEL).replace(INIT, FIELDS)
ASYNC = PLAIN.replace("    def score", "    async def score")
FORMS = {"plain": PLAIN, "pydantic": PYDANTIC, "async": ASYNC}


def build(tmp_path: Path, code: str, **settings: Any) -> Any:
    (tmp_path / "tasks.py").write_text(code)
    return build_task({"name": "tasks.py:Doubles", **settings}, Source(tmp_path / "recipe.toml", ""))


@pytest.mark.parametrize("form", FORMS)
def test_a_task_of_ones_own_trains_and_resumes(form: str, tmp_path: Path) -> None:
    (tmp_path / "tasks.py").write_text(FORMS[form])
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'extends = "quick"\n[task]\nname = "tasks.py:Doubles"\nlargest = 5\n'
        "[rollouts]\nprompts_per_step = 4\n[training]\nsteps = 2\neval_problems = 4\n"
    )
    done = gw.train(recipe, out=tmp_path / "run", quiet=True)
    assert done.recipe["task"]["largest"] == 5 and done.recipe["task"]["name"] == str(tmp_path / "tasks.py:Doubles")
    (tmp_path / "r.toml").unlink()
    resumed = gw.train(resume=done.path, training={"steps": 3}, quiet=True)
    straight = gw.train(done.path / "recipe.toml", out=tmp_path / "straight", quiet=True)
    assert [step["reward/mean"] for step in straight.steps] == [step["reward/mean"] for step in resumed.steps]


@pytest.mark.parametrize("form", FORMS)
def test_settings_are_checked(form: str, tmp_path: Path) -> None:
    assert build(tmp_path, FORMS[form], offset=1).problem(1, 0).answer == "15"
    with pytest.raises(UserError, match=r"task.largst: unknown key; did you mean 'largest'\?"):
        build(tmp_path, FORMS[form], largst=3)
    task = build(tmp_path, FORMS[form], largest=4)
    assert build_task(task.model_dump(), Source(tmp_path / "elsewhere" / "r.toml", "")).problem(3, 1) == task.problem(3, 1)


@pytest.mark.parametrize(
    ("code", "settings", "message"),
    [
        (
            PLAIN.replace("def score", "def scores"),
            {},
            r"Doubles has no score\(problem, completions\), which a task needs",
        ),
        (PLAIN.replace("Doubles", "Double"), {}, r"no function 'Doubles'; did you mean 'Double'\?"),
        (PLAIN.replace("largest: int = 9", "largest: int"), {}, r"tasks.py:Doubles needs largest"),
        (PYDANTIC, {"largest": "x"}, r"task.largest: .*valid integer"),
        (PLAIN + "\n1/0\n", {}, r"tasks.py: ZeroDivisionError"),
        (PLAIN + "\nraise SystemExit(0)\n", {}, r"tasks.py: SystemExit: 0"),
        (PLAIN.replace("self.largest, self.offset =", "raise SystemExit(0);"), {}, r"tasks.py:Doubles: SystemExit: 0"),
        ("Doubles = print", {}, r"tasks.py:Doubles is no class"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, code: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(tmp_path, code, **settings)


def test_what_it_returns_is_checked(tmp_path: Path) -> None:
    task = build(
        tmp_path, PLAIN.replace("return [Problem", "return [1 or Problem").replace("return [Score", "return [1 or Score")
    )
    with pytest.raises(UserError, match=r"tasks.py:Doubles: held_out\(\) returned int; expected groupwise.types.Problem"):
        task.held_out(3)
    wrong = asyncio.run(task.score(Problem(id="p", prompt="p"), [said("a"), said("b")]))
    assert [score.failure for score in wrong] == ["wrong type"] * 2
    assert "tasks.py:Doubles: score() returned [1, 1]; expected 2 groupwise.types.Score" in wrong[0].detail
    task = build(tmp_path, PLAIN.replace("c.text ==", "c.txt =="))
    scores = asyncio.run(task.score(task.problem(0, 0), [said("a")]))
    assert isinstance(scores[0], Score) and scores[0].failure == "raised" and "no attribute 'txt'" in scores[0].detail
    task = build(tmp_path, PLAIN.replace("return", "raise SystemExit(0);"))
    with pytest.raises(UserError, match=r"tasks.py:Doubles: problem\(2, 0\): SystemExit: 0"):
        task.problem(2, 0)
    ended = asyncio.run(task.score(Problem(id="p", prompt="p"), [said("a")]))
    assert ended[0].failure == "raised" and "SystemExit" in ended[0].detail
    task = build(tmp_path, PLAIN.replace("% self.largest", "% 0"))
    with pytest.raises(UserError, match=r"tasks.py:Doubles: problem\(2, 0\): ZeroDivisionError"):
        task.problem(2, 0)


@pytest.mark.parametrize(
    ("score", "failure", "detail"),
    [
        (Score(reward=float("nan")), "not finite", "reward is nan"),
        (Score(reward=1.0, components={"a": float("inf")}), "not finite", "a is inf"),
        (Score(reward=1.0, weights={"a": float("nan")}), "not finite", "the weight of a is nan"),
        (Score(reward=1.0, steps=((1, 0.5), (2, float("-inf")))), "not finite", "step 2 is -inf"),
        (Score(reward=None), "wrong type", "reward is None, and not a number"),  # type: ignore[arg-type]
    ],
)
def test_a_score_that_is_not_finite_is_a_failure(score: Score, failure: str, detail: str) -> None:
    assert (score.checked().failure, score.checked().detail) == (failure, detail)
    assert (score.checked().reward != score.checked().reward) and not score.checked().components


def test_a_score_that_is_finite_stays_what_it_is() -> None:
    score = Score(
        reward=1.5, correct=True, components={"a": 1.0, "b": 0.5}, weights={"b": 1.0}, steps=((3, 1.0),), extra={"x": []}
    )
    assert score.checked() == score and Score.failed("raised", "why").checked().failure == "raised"
    plain = Score(reward=np.float32(0.5), components={"a": np.int64(1)}).checked()
    assert (type(plain.reward), type(plain.components["a"])) == (float, float)


def test_a_reward_that_is_not_finite_sets_its_completion_aside(tmp_path: Path) -> None:
    """Some answers get NaN: the run goes on without them; all: it is refused before training."""
    where = 'len(c.text) > 1 and problem.id[0] != "h"'
    code = PLAIN.replace("reward=float(c.text == problem.answer)", f"reward=float('nan') if {where} else 1.0")
    (tmp_path / "tasks.py").write_text(code)
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'extends = "quick"\n[task]\nname = "tasks.py:Doubles"\n[algorithm]\nname = "grpo"\n'
        "[rollouts]\nprompts_per_step = 4\n[training]\nsteps = 1\neval_problems = 4\n"
    )
    done = gw.train(recipe, out=tmp_path / "run", quiet=True)
    assert done.steps[0]["failed/not finite"] > 0 and done.steps[0]["reward/mean"] == 1
    (tmp_path / "tasks.py").write_text(code.replace(where, "True"))
    with pytest.raises(UserError, match=r"scoring fails: \d+ not finite; the first: reward is nan"):
        gw.train(recipe, out=tmp_path / "all", quiet=True)


def shown(tmp_path: Path, text: str, *options: str, width: int = 100) -> str:
    (tmp_path / "r.toml").write_text(text)
    result = CliRunner().invoke(app, ["data", str(tmp_path / "r.toml"), *options], env={"COLUMNS": str(width)})
    assert result.exit_code == 0, result.output
    return str(result.output)


RECIPE = '[task]\nname = "dataset"\npath = "d.jsonl"\nmax_prompt_tokens = 5\n[training]\neval_problems = 3\n'


@pytest.mark.parametrize("width", [80, 120])
def test_data_shows_prompts_ids_answers_lengths_and_what_is_left_out(tmp_path: Path, width: int) -> None:
    rows = [{"prompt": f"{i}+{i % 9}=", "answer": i + i % 9, "note": "\x1b[31mred"} for i in range(5, 125)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = shown(tmp_path, RECIPE, "--count", "2", width=width)
    assert max(map(len, text.splitlines())) <= width
    tokens = re.findall(r"prompt (\d): (\d) tokens, as text, without a chat template", text)
    assert [number for number, _ in tokens] == ["1", "2"]
    assert re.search(r"ids +\d+( \d+){3,4}\n", text) and re.search(r"answer +\d+", text)
    assert "\x1b" not in text and r"\x1b[31mred" in text
    assert re.search(r"\d+ have a prompt of more than 5 tokens", " ".join(re.sub("[│┃]", " ", text).split()))
    histogram = {int(size): int(count) for size, count in re.findall(r"│ +(\d+) +(\d+) █", text)}
    assert set(histogram) == {4, 5} and sum(histogram.values()) == int(re.findall(r"tokens: (\d+) problems", text)[0])


def test_data_shows_a_chat_template_and_a_task_of_any_kind(tmp_path: Path) -> None:
    text = shown(tmp_path, '[task]\nname = "arithmetic"\n', "--count", "1")
    assert "arithmetic: " in text and "Prompt lengths in tokens: 256 problems" in text
    listed = run("data", "--presets")
    assert listed.exit_code == 0 and "openai/gsm8k" in listed.output
