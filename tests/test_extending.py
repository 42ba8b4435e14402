"""The worked examples of CONTRIBUTING.md, whose code blocks run here: to add something takes one file and one line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import groupwise as gw
from groupwise.algorithms import PARTS
from groupwise.algorithms.part import Choice
from groupwise.rollouts.samplers import SAMPLERS
from groupwise.tasks.base import TASKS
from groupwise.training.trackers import TRACKERS

CONTRIBUTING = Path(__file__).parent.parent / "CONTRIBUTING.md"
SHORT: dict[str, Any] = {"training": {"steps": 2, "eval_problems": 10}, "rollouts": {"prompts_per_step": 4}, "quiet": True}


def code_of(name: str) -> dict[str, Any]:
    """The names that the file `name` of CONTRIBUTING.md defines."""
    found = re.search(rf"```python\n# {name}\n(.*?)```", CONTRIBUTING.read_text(), re.DOTALL)
    assert found, f"no block that begins with # {name}"
    namespace: dict[str, Any] = {"__name__": name.removesuffix(".py")}
    exec(compile(found[1], name, "exec", dont_inherit=True), namespace)
    return namespace


def train(tmp_path: Path, **settings: Any) -> gw.Run:
    return gw.train("quick", out=tmp_path / "run", **SHORT, **settings)


def test_a_loss_with_a_hyper_parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tilted = code_of("tilted.py")["Tilted"]
    monkeypatch.setitem(PARTS["surrogate"], "tilted", Choice(tilted, "-rho A, A < 0 times tilt"))  # the one line
    run = train(tmp_path, algorithm={"name": "grpo", "surrogate": "tilted", "tilt": 0.25})
    assert run.recipe["algorithm"]["tilt"] == 0.25
    assert gw.named("grpo", surrogate="tilted", tilt=0.25).surrogate == tilted(tilt=0.25)
    with pytest.raises(
        gw.UserError, match=r"tilt, given from Python: surrogate = 'clip' does not use it; it belongs to surrogate tilted"
    ):
        gw.train("quick", algorithm={"name": "grpo", "tilt": 0.25})
    with pytest.raises(gw.UserError, match=r"tilt, given from Python: -1\.0 is not a number of at least 0"):
        gw.train("quick", algorithm={"name": "grpo", "surrogate": "tilted", "tilt": -1.0})


def test_an_advantage_from_the_users_file(tmp_path: Path) -> None:
    found = re.search(r"```python\n# ranked.py\n(.*?)```", CONTRIBUTING.read_text(), re.DOTALL)
    assert found
    (tmp_path / "ranked.py").write_text(found[1])
    run = train(tmp_path, algorithm={"name": "grpo", "advantage": f"{tmp_path}/ranked.py:Ranked", "temper": 0.5})
    assert run.recipe["algorithm"]["temper"] == 0.5
    resumed = gw.train(resume=run.path, training={"steps": 3}, quiet=True)
    assert len(resumed.steps) == 3


def test_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, "doubles", code_of("doubles.py")["DoublesTask"])
    run = gw.train(
        {"task": {"name": "doubles", "largest": 9}, **{k: v for k, v in SHORT.items() if k != "quiet"}},
        out=tmp_path / "run",
        quiet=True,
    )
    assert len(run.steps) == 2 and run.recipe["task"]["largest"] == 9


def test_a_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SAMPLERS, "counting", code_of("counting.py")["counting"])
    run = train(tmp_path, **{"rollouts.sampler": "counting"})
    assert len(run.steps) == 2


def test_a_recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRACKERS, "rewards", code_of("rewards_log.py")["RewardsLog"])
    run = train(tmp_path, trackers={"names": ["rewards"]})
    lines = [json.loads(line) for line in (run.path / "rewards.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
