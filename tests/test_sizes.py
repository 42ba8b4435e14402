"""Settings that mean more memory than there is are refused at once, with what they would take."""

import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from groupwise import memory
from groupwise.algorithms import named
from groupwise.cli import app
from groupwise.config import Recipe, Source
from groupwise.errors import UserError
from groupwise.models import LanguageModel, load_config
from groupwise.tasks.arithmetic import ArithmeticTask
from groupwise.training.sizes import check_cache, check_training

SIZES = {
    "rollouts.group_size=10000000": "160,000,000 completions a step (16 prompts, 10,000,000 of each) would take at least 320 GB",
    "rollouts.prompts_per_step=1000000000": "rollouts.prompts_per_step=1000000000: 8,000,000,000 completions",
    "rollouts.max_tokens=1000000000": "rollouts.max_tokens=1000000000: a prompt of",
    "model.lora.rank=1000000000": "model.lora.rank=1000000000: adapters of rank 1,000,000,000 on 21 layers would take",
    "algorithm.allocation=thompson algorithm.candidates=1e12": "problems a step would take",
}  # fmt: skip
ALLOWED = ["rollouts.max_rows=1000000000000", "learner.micro_batch_tokens=1000000000000", 
           "training.steps=1000000000000", "learner.warmup_steps=1000000000000"]  # fmt: skip


def groupwise(*arguments: str, code: int) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize("overrides", SIZES)
def test_a_size_that_cannot_be_held_is_refused_at_once(overrides: str) -> None:
    began = time.monotonic()
    assert SIZES[overrides] in groupwise("check", "quick", *(f"--set={pair}" for pair in overrides.split()), code=2)
    assert time.monotonic() - began < 20


def test_a_limit_that_is_only_a_limit_is_not_refused() -> None:
    groupwise("check", "quick", *(f"--set={pair}" for pair in ALLOWED), code=0)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.new.hidden_size=1000000000", "model"),
        ("model.new.num_hidden_layers=1000000000", "num_hidden_layers = 1,000,000,000: at most 4,096"),
        ("model.new.intermediate_size=1000000000", "training a model of 1,152,"),
        ("sft.batch_size=1000000000", "1,000,000,000 demonstrations in an update would take at least 4 TB"),
    ],
)
def test_a_warm_up_that_cannot_be_held_is_refused_at_once(override: str, said: str, tmp_path: Path) -> None:
    assert said in groupwise("sft", "arithmetic-base", "--set", override, "--out", str(tmp_path / "model"), code=2)


def test_training_that_does_not_fit_is_refused_where_the_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient and two moments beside the weights: four times the model. With PPO the critic takes as much again."""
    weights = 4 * LanguageModel.load("arithmetic-base").num_parameters()
    for name, times in (("grpo", 4), ("ppo", 8)):
        for there, code in ((times * weights, 0), (times * weights - 1, 2)):
            monkeypatch.setattr("groupwise.memory.total_memory", lambda *_, there=there: there)
            sets = [f"--set=algorithm.name={name}", "--set=rollouts.group_size=2", "--set=rollouts.prompts_per_step=4"]
            output = groupwise("check", "quick", *sets, code=code)
            assert code == 0 or "gradients and optimiser state" in output


def test_processes_share_what_training_takes_but_load_the_weights_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel.load("arithmetic-base")
    weights, source = 4 * model.num_parameters(), Source(Path("r.toml"), "")
    for processes, needed in ((2, 2 * weights), (8, weights)):
        monkeypatch.setattr("groupwise.memory.total_memory", lambda *_, there=needed: there)
        check_training(Recipe(), named("grpo"), model, source, processes)
        monkeypatch.setattr("groupwise.memory.total_memory", lambda *_, there=needed - 1: there)
        with pytest.raises(UserError, match=f"in each of {processes} processes, its share of the model's weights"):
            check_training(Recipe(), named("grpo"), model, source, processes)


def test_a_cache_is_compared_with_the_memory_that_it_lies_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU may have less memory than the machine, or more; a sampler of the user's may hold its cache on another machine."""
    config = load_config("arithmetic-base")
    sizes = {"cuda": 10**9, "cpu": 10**12}

    def total(device: torch.device | None = None) -> int:
        return sizes["cpu" if device is None else device.type]

    def refused(device: str, **rollouts: str) -> bool:
        recipe = Recipe.model_validate({"rollouts": rollouts})
        try:
            check_cache(recipe, config, 10**7, torch.device(device), Source(Path("r.toml"), ""))
        except UserError:
            return True
        return False

    monkeypatch.setattr(memory, "total_memory", total)
    assert [refused("cuda"), refused("cpu"), refused("cuda", sampler="own.py:mine")] == [True, False, False]
    sizes |= {"cuda": 10**12, "cpu": 10**9}
    assert [refused("cuda"), refused("cpu"), refused("cpu", sampler="own.py:mine")] == [False, True, False]


def test_memory_is_counted_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = memory.total_memory()
    assert found > 2**28
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_host", lambda: (5000, 3000))
    (tmp_path / "memory").mkdir()
    limits = {
        "memory.max": "memory.max",
        "swap.max": "memory.swap.max",
        "v1": "memory/memory.limit_in_bytes",
        "both": "memory/memory.memsw.limit_in_bytes",
    }
    for given, expected in (
        ({}, 8000),
        ({"memory.max": "max", "swap.max": "max"}, 8000),
        ({"memory.max": "1000"}, 4000),  # with all of the machine's swap
        ({"memory.max": "1000", "swap.max": "max"}, 4000),
        ({"memory.max": "1000", "swap.max": "500"}, 1500),
        ({"memory.max": "1000", "swap.max": "0"}, 1000),
        ({"memory.max": "1000", "swap.max": "9000"}, 4000),
        ({"v1": "9223372036854771712"}, 8000),
        ({"v1": "1000"}, 4000),
        ({"v1": "1000", "both": "1200"}, 1200),
    ):
        for name, path in limits.items():
            (tmp_path / path).unlink(missing_ok=True)
            if name in given:
                (tmp_path / path).write_text(given[name] + "\n")
        assert memory.total_memory() == expected, given
    (tmp_path / limits["memory.max"]).write_text("1000\n")
    (tmp_path / limits["swap.max"]).write_text("0\n")
    with pytest.raises(UserError, match=r"^x would take at least 5\.12 TB, and 1 kB are here$"):
        memory.need(5.12e12, "x")


def test_a_task_holds_out_what_it_has() -> None:
    """Grade 1 has 20 x 20 numbers and two operators, a tenth of which is held out: 80 or so, however many are asked for."""
    task = ArithmeticTask(grades=[1])
    few, many = task.held_out(500), task.held_out(10**15)
    assert [problem.id for problem in few] == [problem.id for problem in many] and 60 < len(many) < 100
