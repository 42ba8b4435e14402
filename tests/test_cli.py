"""The command line as a user meets it: what works, and what each mistake is told."""

import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from groupwise.cli import app
from groupwise.config import shipped_recipes


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def test_algorithms_lists_shows_and_compares() -> None:
    listed = run("algorithms")
    assert listed.exit_code == 0
    assert all(name in listed.stdout for name in ("dapo", "gspo_token", "dcpo", "arXiv 2503.14476"))
    assert "1 + clip_high" in run("algorithms", "dapo").stdout
    diff = run("algorithms", "dapo", "--diff", "grpo").stdout
    assert "clip_high" in diff and "0.28" in diff and "token_mean" in diff
    assert "gae_lambda" not in diff


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name != "arithmetic-base"])
def test_check_finds_nothing_wrong_with_a_shipped_recipe(name: str) -> None:
    result = run("check", name)
    assert result.exit_code == 0, result.output
    assert "nothing wrong found" in result.stdout


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("[learner]\nminibatch = 4", "recipe.toml, line 2, learner.minibatch: unknown key; did you mean 'minibatches'?"),
        ("[lerner]\nminibatches = 4", "recipe.toml, line 1, [lerner]: unknown key; did you mean 'learner'?"),
        ("[learner]\n\nminibatches = 'four'", "recipe.toml, line 3, learner.minibatches: input should be a valid integer"),
        ("[learner]\nminibatches = 0", "learner.minibatches: input should be greater than or equal to 1, not 0"),
        ("[learner\n", "recipe.toml: "),
        ("[algorithm]\nname = 'dapoo'", "line 2, algorithm.name: there is no algorithm 'dapoo'; did you mean 'dapo'?"),
        (
            "[algorithm]\nname = 'dapo'\nclip_hihg = 0.3",
            "line 3, algorithm.clip_hihg: no algorithm has this setting; did you mean 'clip_high'?",
        ),
        ("[algorithm]\nname = 'dapo'\nclip_high = 'big'", "line 3, algorithm.clip_high: input should be a valid number"),
        ("[algorithm]\nname = 'dapo'\nratio = 'tokens'", "line 3, algorithm.ratio: there is no 'tokens'; did you mean 'token'?"),
        ("[algorithm]\nname = 'gspo'\nadvantage = 'process'", "algorithm.ratio: one ratio for the sequence cannot carry"),
        ("[task]\nname = 'arithmetics'", "line 2, task.name: there is no task 'arithmetics'; did you mean 'arithmetic'?"),
        ("[task]\nname = 'arithmetic'\ngrades = [9]", "line 3, task.grades: input should be less than or equal to 5"),
        ("[model]\npath = 'arithmetic-bas'", "line 2, model.path: no model 'arithmetic-bas'"),
        ("[model]\npath = 'arithmetic-bas'", "did you mean 'arithmetic-base'?"),
        ("[model]\ndevice = 'cuda:9'", "model.device: 'cuda:9' is not here"),
        ("[rollouts]\nmax_tokens = 5000", "rollouts.max_tokens: a prompt of"),
        ("[algorithm]\nname = 3", "line 2, algorithm.name: there is no algorithm 3"),
        ("[algorithm]\nclip_high = nan", "line 2, algorithm.clip_high: nan is not a number of at least 0"),
        ("[algorithm]\nname = 'grpo'\nratio = 5", "line 3, algorithm.ratio: input should be a valid string"),
        ("[algorithm]\nsurrogate = 'no.py:f'", "line 2, algorithm.surrogate: no.py:f: there is no file 'no.py'"),
        ("algorithm = 'grpo'", "line 1, algorithm: expected a table, not 'grpo'; an algorithm is chosen by algorithm.name"),
        (
            "[task]\nname = 'dataset'\npath = 'x.jsonl'\nreward_timeout = inf",
            "line 4, task.reward_timeout: input should be a fin",
        ),
        ("[task]\nname = 'dataset'\npath = 'x.jsonl'\nreward_weights = [nan]", "task.reward_weights: input should be a finite"),
        ("[environment]\nmax_turns = 3", "line 2, environment.max_turns: there is no environment that it could change"),
        ("[environment]\ntask_reward = true", "line 2, environment.task_reward: there is no environment that it could change"),
        ("[task]\nname = [1]", "line 2, task.name: there is no task [1]"),
        ("[task]\ngrades = ['1']", "line 2, task.grades: input should be a valid integer"),
        ("[model]\nchat = true", "line 2, model.chat: the tokenizer has no chat template: 'arithmetic-base'"),
        ("[rollouts]\nstop_tokens = [999]", "line 2, rollouts.stop_tokens: 999 is no token: the vocabulary has 17"),
        ("[rollouts]\ntemperature = inf", "line 2, rollouts.temperature: input should be a finite number"),
        ("[rollouts]\nprompts_per_step = 2", "learner.minibatches: a minibatch holds whole groups"),
        (
            "[algorithm]\ncorrection = 'tis'\n[learner]\nold_logprobs = 'sampler'",
            "line 4, learner.old_logprobs: algorithm.correction compares",
        ),
        ("[algorithm]\nname = 'gdpo'\n[rollouts]\ngroup_size = 1", "rollouts.group_size: gdpo compares the completions"),
        (
            "[algorithm]\nname = 'grpo'\nallocation = 'hit_utility'\nsmallest_group = 9\n[rollouts]\ngroup_size = 8",
            "line 4, algorithm.smallest_group: is above rollouts.group_size (8)",
        ),
        ("[algorithm]\nname = 'grpo'\nband_low = 0.1", "line 3, algorithm.band_low: selection = 'mixed' does not use it"),
        (
            "[algorithm]\nname = 'gspo_token'\nadvantage = 'turns'\n[rollouts]\ngroup_size = 1",
            "rollouts.group_size: gspo_token compares the completions",
        ),
        ("[rollouts]\ngroup_size = 1", "rollouts.group_size: dapo compares the completions of a prompt"),
    ],
)
@pytest.mark.parametrize("command", ["check", "train"])
def test_a_wrong_recipe_gets_one_message_before_anything_is_trained(
    tmp_path: Path, command: str, recipe: str, message: str
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe)
    result = run(command, path, *(["--out", tmp_path / "out"] if command == "train" else []))
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "returned 1 values for 16 completions"),
        ("return [float('nan')] * len(completions)", "returned nan for a completion"),
        ("return None", "returned None; expected a list of 16 numbers"),
        ("raise KeyError('x')", "KeyError: 'x'"),
    ],
)
def test_a_wrong_reward_is_found_before_anything_is_trained(tmp_path: Path, body: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(f"def reward(problem, completions):\n    {body}\n")
    (tmp_path / "data.jsonl").write_text("".join(f'{{"prompt": "{i}+1="}}\n' for i in range(4)))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[task]\nname = 'dataset'\npath = 'data.jsonl'\nreward = 'mine.py:reward'\n")
    result = run("train", recipe, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr and "mine.py:reward" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def loss(terms):\n    raise KeyError('x')", "KeyError: 'x'"),
        ("def loss():\n    pass", "TypeError"),
        ("def loss(terms):\n    return terms.log_ratio_BT", "trying surrogate"),
    ],
)
def test_a_wrong_part_is_found_before_anything_is_trained(tmp_path: Path, body: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(body)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[algorithm]\nsurrogate = 'mine.py:loss'\n")
    result = run("train", recipe, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr and "mine.py:loss" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            "[model]\ncharacters = '0123'\n[model.new]\nmodel_type = 'qwen3'\n[sft]",
            "line 2, model.characters: the task also",
        ),
        (
            "[model]\ncharacters = \"0123456789+-*=\\n\"\n[model.new]\nmodel_type = 'qwen'\n[sft]",
            "[model.new]: unknown model_type 'qwen'",
        ),
        (
            "[model]\ncharacters = \"0123456789+-*=\\n\"\n[model.new]\nmodel_type = 'qwen3'\nhidden = 8\n[sft]",
            "qwen3 has no setting 'hidden'",
        ),
        (
            "[model]\ncharacters = \"0123456789+-*=\\n\"\n[model.new]\nmodel_type = 'qwen3'\nhidden_size = 'x'\n[sft]",
            "cannot load the model",
        ),
        ("[model]\npath = 'nothere'\n[sft]", "line 2, model.path: no model 'nothere'"),
        ("[sft]\nstep = 3", "line 2, sft.step: unknown key; did you mean 'steps'?"),
        ("[model]\n[sft]", "line 1, [model]: set path for a model to start from, or new"),
    ],
)
@pytest.mark.parametrize("command", ["check", "sft"])
def test_a_wrong_sft_recipe_gets_one_message(tmp_path: Path, command: str, recipe: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe)
    result = run(command, path, *(["--out", tmp_path / "out"] if command == "sft" else []))
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_sft_makes_a_model_that_trains(tmp_path: Path) -> None:
    small = ["sft.steps=3", "sft.batch_size=8", "sft.eval_problems=5", "model.new.hidden_size=32", "model.new.head_dim=8"]
    made = run("sft", "arithmetic-base", "--out", tmp_path / "base", *(part for item in small for part in ("--set", item)))
    assert made.exit_code == 0, made.output
    assert (tmp_path / "base" / "sft.json").exists()
    assert run("eval", tmp_path / "base", "quick", "--set", "training.eval_problems=5").exit_code == 0


def test_arguments_that_cannot_be_meant(tmp_path: Path) -> None:
    assert "--set algorithm=grpo: expected a table, not 'grpo'" in run("check", "quick", "--set", "algorithm=grpo").stderr
    assert "no recipe 'qick'" in run("train", "qick").stderr
    assert "did you mean 'quick'?" in run("train", "qick").stderr
    assert "--set learner.minibatch=2: unknown key" in run("check", "quick", "--set", "learner.minibatch=2").stderr
    assert "expected key=value" in run("check", "quick", "--set", "steps").stderr
    assert "not a run" in run("train", "--resume", tmp_path).stderr
    (tmp_path / "something").touch()
    taken = run("train", "quick", "--out", tmp_path)
    assert taken.exit_code == 2 and "not empty" in taken.stderr


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "groupwise", "train", "quick", "--out", str(out), "--set", "training.steps=1000"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        deadline = time.monotonic() + 120
        while not (out / "rollouts" / "step-000002.txt").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert f"groupwise train --resume {out}" in output
    assert "Traceback" not in output
    assert list((out / "checkpoints").glob("step-*/manifest.json"))


def test_a_runs_own_recipe_takes_another_algorithm_or_part(tmp_path: Path) -> None:
    """It holds every setting; those of what is replaced go with it, and do not change the new algorithm in silence."""
    small = ["--set", "training.steps=1", "--set", "training.eval_problems=4", "--set", "rollouts.prompts_per_step=4"]
    assert run("train", "quick", "--out", tmp_path / "dapo", *small).exit_code == 0
    recipe = tmp_path / "dapo" / "recipe.toml"
    again = run("train", recipe, "--out", tmp_path / "grpo", "--set", "algorithm.name=grpo")
    assert again.exit_code == 0, again.output
    written = tomllib.loads((tmp_path / "grpo" / "recipe.toml").read_text())["algorithm"]
    assert (written["clip_high"], written["aggregation"], written["beta"]) == (0.2, "sequence_mean", 0.04)
    assert written["dynamic_sampling"] is False
    more = ["--set", "training.steps=2", "--set", "algorithm.advantage=leave_one_out"]
    resumed = run("train", "--resume", tmp_path / "grpo", *more)
    assert resumed.exit_code == 0, resumed.output
    assert tomllib.loads((tmp_path / "grpo" / "recipe.toml").read_text())["algorithm"]["advantage"] == "leave_one_out"


@pytest.mark.parametrize(
    ("code", "key", "message"),
    [
        ("def make(a):\n    return 1\n", "rollouts.sampler", "TypeError: make"),
        ("def make(a, b, c):\n    return 1\n", "rollouts.sampler", "gives int, which has no generate() and load()"),
        ("def make(a, b):\n    raise KeyError('x')\n", "trackers.names", "make: KeyError: 'x'"),
        ("def make(a, b):\n    return 1\n", "trackers.names", "gives int, which has no record()"),
        ("x = 1\n", "trackers.names", "there is no function 'make'"),
        ("import torch\nfrom groupwise.algorithms import Credit\ndef make(o):\n    return Credit(advantages=o.rewards_B / 0)\n",
         "algorithm.advantage", "not finite"),
    ],
)  # fmt: skip
def test_a_users_own_piece_that_does_not_fit_gives_one_message(code: str, key: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(code)
    reference = f"{tmp_path}/mine.py:make"
    value = f'["{reference}"]' if key == "trackers.names" else reference
    small = ["--set", "training.steps=1", "--set", "training.eval_problems=4", "--set", "rollouts.prompts_per_step=4"]
    result = run("train", "grpo", "--out", tmp_path / "run", *small, "--set", f"{key}={value}")
    assert result.exit_code in (1, 2) and not isinstance(result.exception, ValueError | TypeError)
    assert message in result.stderr, result.stderr


def test_what_python_gave_is_not_blamed_on_a_file() -> None:
    import groupwise as gw

    with pytest.raises(gw.UserError, match=r"^training\.steps, given from Python: input should be a valid integer"):
        gw.train(training={"steps": "x"})
