"""Real runs through the command line: resumed after damage, with other settings, files and models, begun again, and exported."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from groupwise import files
from groupwise.state import read_state, write_state
from groupwise.training import checkpoints
from tests.test_cli import run

SETTINGS = [
    "rollouts.prompts_per_step=2", "rollouts.group_size=4", "rollouts.max_tokens=8", "algorithm.name=grpo", "training.steps=3",
    "training.checkpoint_every=1", "training.eval_every=1", "training.eval_problems=6", "learner.minibatches=1",
    "training.tokens_every=0",
]  # fmt: skip


def sets(*settings: str) -> list[str]:
    return [part for item in settings for part in ("--set", item)]


def train(*arguments: object) -> Any:
    return run("train", *arguments)


def done(*arguments: object) -> str:
    result = train(*arguments)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model" / "model.safetensors")


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps on data and a reward of the user's own, from a model in a directory."""
    home = tmp_path_factory.mktemp("project")
    assert run("export", "--help").exit_code == 0
    shutil.copytree(Path(checkpoints.__file__).parents[1] / "assets" / "arithmetic-base", home / "base")
    (home / "data.jsonl").write_text("".join(f'{{"prompt": "{i}+1=", "answer": "{i + 1}"}}\n' for i in range(30)))
    (home / "mine.py").write_text("def reward(completions, **_):\n    return [len(set(text)) / 9 for text in completions]\n")
    (home / "r.toml").write_text(
        f"[model]\npath = '{home}/base'\n[task]\nname = 'dataset'\npath = 'data.jsonl'\nreward = ['mine.py:reward']\n"
    )
    done(home / "r.toml", "--out", home / "run", *sets(*SETTINGS))
    return home


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Path:
    """The run as it was before its last step; its project has not moved."""
    path = tmp_path / "run"
    shutil.copytree(project / "run", path)
    shutil.rmtree(path / "checkpoints" / "step-000003")
    shutil.rmtree(path / "model")
    return path


def reseal(checkpoint: Path) -> None:
    """Write a manifest for the files as they are now."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in manifest["files"]:
        digest = files.sha256(checkpoint / name)
        manifest["files"][name] = {"bytes": digest.bytes, "sha256": digest.sha256}
    del manifest["sha256"]
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "sha256": checkpoints.seal(manifest)}))


def test_a_damaged_checkpoint_is_passed_over_to_the_same_bits(project: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(project / "run", path)
    shutil.rmtree(path / "model")
    damaged = path / "checkpoints" / "step-000003" / "learner.safetensors"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    said = done("--resume", path)
    assert "step-000003 is passed over: learner.safetensors is not the file that was written" in said
    assert same_weights(path, project / "run")
    drop = ("seconds/", "tokens_per_second", "memory/", "time")
    rows = [
        [{k: v for k, v in json.loads(line).items() if not k.startswith(drop)} for line in (p / "metrics.jsonl").open()]
        for p in (path, project / "run")
    ]
    assert rows[0] == rows[1]
    events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    assert [event["name"] for event in events] == ["checkpoint_damaged", "resumed"]


def test_a_finished_run_is_exported_again(project: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(project / "run", path)
    before = (path / "metrics.jsonl").read_bytes()
    shutil.rmtree(path / "model")
    done("--resume", path)
    assert same_weights(path, project / "run") and (path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("key", ["failed_groups", "history"])
def test_a_checkpoint_of_another_version_is_named(copy: Path, key: str) -> None:
    checkpoint = copy / "checkpoints" / "step-000002"
    state = read_state(checkpoint / "state")
    del state["collector"][key]
    write_state(checkpoint / "state", state)
    reseal(checkpoint)
    before = (copy / "metrics.jsonl").read_bytes()
    result = train("--resume", copy)
    assert result.exit_code == 2
    assert f"step-000002: written by another version of groupwise: KeyError: '{key}'" in result.stderr
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_what_fails_has_written_nothing(copy: Path) -> None:
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file() and p.name != ".lock"}
    for setting, message in (
        ("model.path=/nowhere/at/all", "a run goes on with the base model it began with"),
        ("model.path=arithmetic-base", "a run goes on with the base model it began with"),
        ("model.dtype=bfloat16", "and here [17, 128] bfloat16"),
        ("algorithm.name=ppo", "a run goes on with the algorithm it began with"),
        ("model.lora.rank=4", "[model.lora] cannot change in a run"),
        ("task.path=other.jsonl", "other.jsonl"),
        ("rollouts.sampler=none.py:f", "none.py"),
        ("trackers.names=['none.py:f']", "none.py"),
    ):
        result = train("--resume", copy, "--set", setting)
        assert result.exit_code == 2 and message in " ".join(result.stderr.split()), (setting, result.stderr)
        assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file() and p.name != ".lock"} == before, setting


def test_a_base_that_moved_and_files_that_changed_are_said(project: Path, tmp_path: Path) -> None:
    home, path = tmp_path / "home", tmp_path / "run"
    shutil.copytree(project, home)
    done(home / "r.toml", "--out", path, *sets(*SETTINGS, f"model.path={home}/base", "training.steps=1"))
    (home / "base").rename(home / "moved")
    gone = train("--resume", path, *sets("training.steps=2"))
    assert gone.exit_code == 2 and "the base model's directory is gone" in gone.stderr and "--set model.path=DIR" in gone.stderr
    (home / "mine.py").write_text("def reward(completions, **_):\n    return [float(len(text)) for text in completions]\n")
    said = done("--resume", path, *sets("training.steps=2", f"model.path={home}/moved"))
    assert f"{home}/mine.py has changed since the run read it (may change results)" in said
    assert "model.path: " in said and "training.steps: 1 -> 2" in said
    segments = [json.loads(line) for line in (path / "segments.jsonl").read_text().splitlines()]
    assert segments[0]["files"][f"{home}/mine.py"] != segments[1]["files"][f"{home}/mine.py"]
    weight = home / "moved" / "model.safetensors"
    data = bytearray(weight.read_bytes())
    data[-1] ^= 1
    shutil.copytree(home / "moved", home / "third")
    (home / "third" / "model.safetensors").write_bytes(data)
    other = train("--resume", path, *sets("training.steps=3", f"model.path={home}/third"))
    assert other.exit_code == 2 and "its files are not those of" in other.stderr


def test_a_killed_run_is_begun_again_by_its_command_and_refused_to_a_second(project: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    command = [
        "train",
        str(project / "r.toml"),
        "--out",
        str(path),
        *sets(*SETTINGS, "training.checkpoint_every=9", "training.eval_every=9"),
    ]
    slow = [*command, *sets("training.steps=9")]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([sys.executable, "-m", "groupwise", *slow], stdout=subprocess.DEVNULL, env=environment) as process:
        deadline = time.monotonic() + 120
        while not (path / "rollouts" / "step-000001.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGSTOP)
        second = run("train", "--resume", path)
        process.kill()
    assert second.exit_code == 2 and f"another process (pid {process.pid} on " in second.stderr
    assert not checkpoints.listed(path / "checkpoints")
    other = run(*command, *sets("training.steps=3"))
    assert other.exit_code == 2 and "a run with other settings was begun there:\n  training.steps: 9 -> 3" in other.stderr
    done("--resume", path, *sets("training.steps=3"))
    assert same_weights(path, project / "run")
    again = run(*command)
    assert again.exit_code == 2 and f"groupwise train --resume {path}" in again.stderr


def test_a_checkpoint_of_any_run_is_exported(project: Path, copy: Path, tmp_path: Path) -> None:
    result = run("eval", copy)
    assert result.exit_code == 2 and f"groupwise export {copy} --out DIR" in result.stderr
    for which in ("best", "newest", "2"):
        exported = run("export", copy, "--checkpoint", which, "--out", tmp_path / which)
        assert exported.exit_code == 0, exported.output
        AutoModelForCausalLM.from_pretrained(tmp_path / which)
    assert (tmp_path / "newest" / "model.safetensors").read_bytes() == (tmp_path / "2" / "model.safetensors").read_bytes()
    last = run("export", project / "run", "--out", tmp_path / "last")
    assert last.exit_code == 0 and "step 3, is in" in last.stdout
    ours, theirs = load_file(tmp_path / "last" / "model.safetensors"), weights(project / "run")
    assert all(torch.equal(value, ours[key]) for key, value in theirs.items())
    assert (tmp_path / "last" / "tokenizer.json").read_bytes() == (project / "run" / "model" / "tokenizer.json").read_bytes()
    taken = run("export", copy, "--out", tmp_path / "last")
    assert taken.exit_code == 2 and "not empty" in taken.stderr
    none = run("export", project, "--out", tmp_path / "none")
    assert none.exit_code == 2 and "no checkpoints of a run" in none.stderr
