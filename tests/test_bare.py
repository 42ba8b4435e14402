"""A machine with PyTorch and transformers only, such as a GPU lent for minutes: the pieces of a loop run there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import plain
import pytest
import torch
import workloads
from gpu import WORKS, training_flops
from worker_groupwise import Step

from groupwise.config import LearnerSection

ROOT = Path(__file__).parent.parent
ABSENT = ("pydantic", "pydantic_core", "rich", "typer", "tomli_w", "pebble", "math_verify", "altair", "vl_convert", "pyarrow")
BLOCK = f"""
import importlib.metadata, sys

for name in {ABSENT!r}:
    assert name not in sys.modules
    sys.modules[name] = None  # importing it raises ModuleNotFoundError, and importlib.util.find_spec finds nothing

def version(name, found=importlib.metadata.version):
    if name == "groupwise":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)

importlib.metadata.version = version
"""
"""Code that makes these packages, and groupwise's own metadata, missing in a new process."""


def run_bare(code: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), str(ROOT / "benchmarks")])}
    command = [sys.executable, "-c", BLOCK + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_step_of_sampling_and_learning_needs_pytorch_and_transformers_only() -> None:
    code = """
import groupwise, groupwise.algorithms, groupwise.errors, groupwise.learner.local, groupwise.models, groupwise.rollouts.base
import groupwise.rollouts.driver, groupwise.rollouts.native, groupwise.training.batching, groupwise.training.credit
import groupwise.types, tests.conftest, tests.test_gpu
from worker_groupwise import Step
from workloads import WORKS, new_model, prompts, tokenizer
from dataclasses import replace
work = replace(WORKS["short"], prompts=2, group_size=4, max_tokens=6)
step = Step(work, new_model(work), tokenizer(work), prompts(work))
print(step.run()["tokens"], step.learner.version)
assert groupwise.LocalLearner is groupwise.learner.local.LocalLearner and "train" in dir(groupwise)
"""
    assert run_bare(code).split() == ["48", "1"]


def test_the_gpu_benchmark_runs_in_small(tmp_path: Path) -> None:
    code = "import runpy; sys.argv = ['gpu.py', *sys.argv[1:]]; runpy.run_path('benchmarks/gpu.py', run_name='__main__')"
    if not torch.cuda.is_available():
        with pytest.raises(AssertionError, match="no CUDA device here"):
            run_bare(code, "--out", str(tmp_path / "none"))
    run_bare(code, "--tiny", "--out", str(tmp_path), "--seconds", "60", "--profile")
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line.get("side") for line in lines[1:]] == ["groupwise", "transformers"] * 2
    assert not any("error" in line for line in lines) and all(line["tokens"] == 128 for line in lines[1:])
    results = (tmp_path / "RESULTS-gpu.md").read_text()
    assert "## tiny" in results and "| groupwise | 2 |" in results and "Times faster than transformers" in results


def test_both_sides_of_the_gpu_benchmark_have_one_loss_and_gradient() -> None:
    work = WORKS["tiny"]
    step = Step(work, workloads.new_model(work), workloads.tokenizer(work), workloads.prompts(work))
    batch = step.batch(step.sample())
    weights = [parameter.detach().clone() for parameter in step.module.parameters()]
    ours = step.learner.update(batch).step
    with torch.no_grad():
        for parameter, before in zip(step.module.parameters(), weights, strict=True):
            parameter.copy_(before)
    adam = torch.optim.AdamW(step.module.parameters(), lr=1e-6)
    theirs = plain.update(step.module, adam, step, batch, rows=3)
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_the_benchmarks_settings_are_a_learners() -> None:
    step = Step(WORKS["tiny"], workloads.new_model(WORKS["tiny"]), workloads.tokenizer(WORKS["tiny"]), ["aB3"])
    assert set(vars(step.learner.settings)) == set(LearnerSection.model_fields)


def test_floating_point_operations_by_hand() -> None:
    """One layer of hidden size 2 with one head of size 2 and an MLP of 3: 4 x 4 + 3 x 6 = 34 weights; a vocabulary of 5: 10 more.

    One prompt of 2 tokens with 2 completions of 4: prompts once, 10 tokens, each pair of tokens 4 x 2 operations forward.
    """
    work = workloads.Work(
        prompts=1, prompt_tokens=2, group_size=2, max_tokens=4, vocabulary=5, hidden=2, layers=1, heads=1, head_dim=2, mlp=3
    )
    pairs = 2 * 2 / 2 + 2 * (4 * 2 + 4 * 4 / 2)
    assert training_flops(work, shared=True) == 6 * 34 * 10 + 6 * 10 * 8 + 3 * 8 * pairs
    assert training_flops(work, shared=False) == 6 * 34 * 12 + 6 * 10 * 8 + 3 * 8 * 2 * 6 * 6 / 2
