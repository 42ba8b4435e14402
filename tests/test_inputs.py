"""What a run remembers of the files that it reads from elsewhere."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from groupwise.config.effects import effect
from groupwise.models.loading import shipped_path
from groupwise.training import inputs
from groupwise.training.inputs import PARTS, hash_of, input_hashes
from tests.test_cli import run


def hashes(model: Path, run: Path, before: dict[str, str] | None = None) -> dict[str, str]:
    return input_hashes({"model": {"path": str(model)}}, object(), run, before)  # type: ignore[arg-type]


def test_no_more_than_a_limit_is_read_and_again_in_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("small", 10), ("large", 1000), ("middle", 300)):
        (tmp_path / name).write_bytes(os.urandom(size))
    monkeypatch.setattr(inputs, "WHOLE", 400)
    monkeypatch.setattr(inputs, "PART", 30)
    first = hashes(tmp_path, tmp_path / "run")
    names = {Path(name).name: digest for name, digest in first.items()}
    assert names["small"] == hashlib.sha256((tmp_path / "small").read_bytes()).hexdigest()
    assert [name for name, digest in names.items() if digest.startswith(PARTS)] == ["large"]
    (tmp_path / "added").write_bytes(b"x" * 200)  # which alone would leave nothing for middle
    assert hashes(tmp_path, tmp_path / "run", first).items() > first.items()
    for place in (0, 510, 999):
        data = bytearray((tmp_path / "large").read_bytes())
        data[place] ^= 1
        (tmp_path / "large").write_bytes(data)
        again = hash_of(tmp_path / "large", whole=False)
        assert again != names["large"]
        names["large"] = again


def test_what_runs_write_beside_a_model_is_no_input(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for place in ("run/model", "runs/other", ".cache", "onnx"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").write_text("{}")
    (tmp_path / "runs" / "other" / "segments.jsonl").touch()
    assert set(hashes(tmp_path, tmp_path / "run")) == {str(tmp_path / name) for name in ("config.json", "onnx/config.json")}


def test_more_steps_change_what_a_reward_of_ones_own_may_read() -> None:
    tree = {"learner": {"schedule": "constant"}, "task": {"name": "dataset", "reward": ["exact"]}}
    assert effect("training.steps", tree) == ""
    tree["task"]["reward"] = ["/home/mine.py:reward"]  # type: ignore[index]
    assert "trainer_state.max_steps" in effect("training.steps", tree)
    assert effect("training.steps", {**tree, "learner": {"schedule": "linear"}}) == "changes results"


def test_a_base_from_the_hub_may_become_a_directory(tmp_path: Path) -> None:
    """The cache is laid out as huggingface_hub does it."""
    home, path, copy = tmp_path / "hub" / "models--team--base", tmp_path / "run", tmp_path / "copy"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    shutil.copytree(shipped_path("arithmetic-base"), home / "snapshots" / ("0" * 40))
    shutil.copytree(shipped_path("arithmetic-base"), copy)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    small = ("training.eval_every=9", "training.eval_problems=2", "rollouts.prompts_per_step=2", "rollouts.max_tokens=4")
    sets = [f"--set={item}" for item in (*small, "learner.minibatches=1", "model.backend=torch", "training.steps=1")]
    command = [sys.executable, "-m", "groupwise", "train", "quick", "--out", str(path), "--set=model.path=team/base", *sets]
    begun = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert '"hub:team/base/model.safetensors": ' in (path / "segments.jsonl").read_text(), begun.stderr
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    other = tmp_path / "other"
    shutil.copytree(copy, other)
    (other / "model.safetensors").write_bytes(weights)
    resume = ("train", "--resume", path, "--set=training.steps=2")
    refused = run(*resume, f"--set=model.path={other}")
    assert refused.exit_code == 2 and "its files are not those of team/base" in " ".join(refused.stderr.split())
    resumed = run(*resume, f"--set=model.path={copy}")
    assert resumed.exit_code == 0 and "goes on from checkpoints/step-000001" in resumed.stdout, resumed.output
    assert "is gone" not in resumed.stdout
