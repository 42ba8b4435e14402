"""`groupwise ablate` that is stopped or killed, and what is begun in a directory by one version and goes on with another."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from groupwise import files
from groupwise.errors import UserError
from groupwise.experiments.ladder import claim, load_ladder
from groupwise.files import Lock
from groupwise.training.records import RunDirectory
from groupwise.training.session import _how_to_go_on

LADDER = """
title = "Two rungs"
recipe = "quick"
[set]
"training.steps" = 5000
"training.eval_every" = 5000
"training.eval_problems" = 4
"training.tokens_every" = 0
"rollouts.prompts_per_step" = 2
"rollouts.max_tokens" = 8
"model.backend" = "torch"
"learner.minibatches" = 1
[[rungs]]
name = "one"
[[rungs]]
name = "two"
set = { "algorithm.clip_high" = 0.3 }
"""


def free(run: Path) -> bool:
    """Whether no process trains there."""
    try:
        Lock(run).close()
    except UserError:
        return False
    return True


def wait_for(process: subprocess.Popen[str], path: Path) -> None:
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_no_run_outlives_its_ladder(number: signal.Signals, code: int, tmp_path: Path) -> None:
    ladder, out = tmp_path / "two.toml", tmp_path / "out"
    ladder.write_text(LADDER)
    command = [sys.executable, "-m", "groupwise", "ablate", str(ladder), "--seeds", "1", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            wait_for(process, out / "1-one" / "seed-0" / "rollouts" / "step-000001.jsonl")
            process.send_signal(number)
            said = process.communicate(timeout=120)[0]
        finally:
            process.kill()
    assert process.returncode == code
    deadline = time.monotonic() + (60 if number == signal.SIGKILL else 0)  # killed, it waited for nothing
    while not free(out / "1-one" / "seed-0"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (out / "2-two").exists()
    if number == signal.SIGTERM:
        assert "stopped by SIGTERM, and so are its runs" in said
        assert list((out / "1-one" / "seed-0" / "checkpoints").glob("step-*"))


def test_a_ladder_goes_on_after_a_version_that_adds_a_setting(tmp_path: Path) -> None:
    path, out = tmp_path / "two.toml", tmp_path / "out"
    path.write_text(LADDER)
    ladder, recipe = load_ladder(path)
    claim(ladder, path, recipe, out)
    plan = json.loads((out / "plan.json").read_text())
    plan["recipes"][0]["environment"]["kind"] = plan["recipes"][0]["environment"].pop("class", None)  # as it was written once
    del plan["recipes"][0]["training"]["keep_checkpoints"]
    (out / "plan.json").write_text(json.dumps(plan))
    claim(ladder, path, recipe, out)
    for damage in (lambda: plan["recipes"][1]["algorithm"].pop("clip_high"), lambda: plan["recipes"][0].update(nonsense=1)):
        damage()
        (out / "plan.json").write_text(json.dumps(plan))
        with pytest.raises(UserError, match="the runs of another ladder"):
            claim(ladder, path, recipe, out)


def test_a_run_begins_again_after_a_version_that_adds_a_setting(tmp_path: Path) -> None:
    tree = {"seed": 1, "training": {"steps": 3}}
    directory = RunDirectory(tmp_path / "a run", None)
    directory.create(tree)
    directory.create({**tree, "training": {"steps": 3, "keep_checkpoints": 2}})  # the default
    with pytest.raises(UserError, match=r"training\.keep_checkpoints: 2 -> 7"):
        directory.create({**tree, "training": {"steps": 3, "keep_checkpoints": 7}})
    (tmp_path / "a run" / "checkpoints" / "step-000002").mkdir(parents=True)
    (tmp_path / "a run" / "checkpoints" / "step-000002" / "manifest.json").touch()
    assert f"--resume '{tmp_path}/a run'" in _how_to_go_on(tmp_path / "a run", 2)


def test_the_name_of_a_new_directory_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(files, "sync", flushed.append)
    RunDirectory(tmp_path / "runs" / "first", None).claim().close()
    assert {tmp_path, tmp_path / "runs"} <= set(flushed)
