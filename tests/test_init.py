"""groupwise init: from flags and by asking, and what it refuses."""

import os
import pty
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.test_cli import run


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = "".join(f'{{"question": "{i}+2=", "solution": "{i + 2}", "level": 1}}\n' for i in range(1, 19))
    (tmp_path / "problems.jsonl").write_text(lines)
    (tmp_path / "mine.py").write_text("def brevity(problem, completions):\n    return [1.0 for _ in completions]\n")


FLAGS = ("--model", "arithmetic-base", "--data", "problems.jsonl", "--reward", "last_line")


def test_a_recipe_from_flags_is_found_right_by_check(tmp_path: Path) -> None:
    made = run("init", *FLAGS)
    assert made.exit_code == 0, made.output
    tree = tomllib.loads((tmp_path / "recipe.toml").read_text())
    assert tree["task"] == {
        "name": "dataset",
        "path": "problems.jsonl",
        "prompt_key": "question",
        "answer_key": "solution",
        "reward": "last_line",
    }
    assert tree["model"]["path"] == "arithmetic-base" and tree["algorithm"]["name"] == "dapo"
    commands = [line.split()[1:] for line in made.stdout.splitlines() if line.startswith("  groupwise")]
    assert ["train", "recipe.toml"] in commands
    checked = run("check", "recipe.toml")
    assert checked.exit_code == 0, checked.output


def test_a_recipe_elsewhere_finds_its_files(tmp_path: Path) -> None:
    made = run("init", "deep/er.toml", "--model", "arithmetic-base", "--data", "problems.jsonl", "--reward", "mine.py:brevity")
    assert made.exit_code == 0, made.output
    task = tomllib.loads((tmp_path / "deep" / "er.toml").read_text())["task"]
    assert task["path"] == str(tmp_path / "problems.jsonl") and task["reward"] == f"{tmp_path / 'mine.py'}:brevity"
    assert "answer_key" not in task


def test_a_task_without_data_needs_no_reward(tmp_path: Path) -> None:
    made = run("init", "--model", "arithmetic-base", "--data", "arithmetic", "--algorithm", "gspo")
    assert made.exit_code == 0, made.output
    tree = tomllib.loads((tmp_path / "recipe.toml").read_text())
    assert tree["task"] == {"name": "arithmetic"} and tree["algorithm"] == {"name": "gspo"}


def test_no_file_is_overwritten_unless_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("mine")
    refused = run("init", *FLAGS)
    assert refused.exit_code == 2 and "overwrite it with --force" in refused.stderr
    assert (tmp_path / "recipe.toml").read_text() == "mine"
    assert run("init", *FLAGS, "--force").exit_code == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "missing: --model, --data, --reward"),
        (("--model", "arithmetic-base"), "missing: --data, --reward"),
        (("--model", "arithmetic-bas", *FLAGS[2:]), "--model arithmetic-bas: no model 'arithmetic-bas'"),
        ((*FLAGS[:2], "--data", "problem.jsonl", *FLAGS[4:]), "did you mean 'problems.jsonl'?"),
        ((*FLAGS[:4], "--reward", "maths"), "--reward maths: there is no reward 'maths'; did you mean 'math'?"),
        ((*FLAGS[:4], "--reward", "mine.py:brevty"), "there is no function 'brevty'; did you mean 'brevity'?"),
        ((*FLAGS, "--prompt-key", "questions"), "--prompt-key questions: there is no 'questions' in the first row; did you mean"),
        ((*FLAGS, "--algorithm", "dap0"), "--algorithm dap0: there is no such algorithm; did you mean 'dapo'?"),
    ],
)
def test_what_is_missing_or_wrong_is_said_and_nothing_written(flags: tuple[str, ...], message: str, tmp_path: Path) -> None:
    refused = run("init", *flags)
    assert refused.exit_code == 2 and message in refused.stderr
    assert not (tmp_path / "recipe.toml").exists()


def test_keys_that_cannot_be_guessed_are_missing(tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text('{"a": "1+1=", "b": "2"}\n{"a": "1+2=", "b": "3"}\n')
    refused = run("init", *FLAGS[:2], "--data", "odd.jsonl", *FLAGS[4:])
    assert refused.exit_code == 2 and "missing: --prompt-key" in refused.stderr
    made = run("init", *FLAGS[:2], "--data", "odd.jsonl", *FLAGS[4:], "--prompt-key", "a", "--answer-key", "b")
    assert made.exit_code == 0, made.output


def test_rows_that_lack_a_key_are_found_before_anything_is_written(tmp_path: Path) -> None:
    with (tmp_path / "problems.jsonl").open("a") as file:
        file.write('{"question": "1+1="}\n')
    refused = run("init", *FLAGS)
    assert refused.exit_code == 2 and "line 19: no 'solution'" in refused.stderr
    assert not (tmp_path / "recipe.toml").exists()


def test_it_asks_in_a_terminal_until_an_answer_is_right(tmp_path: Path) -> None:
    """A real one: wrong answers are refused as they are given, and a line left empty takes what is proposed."""
    ours, theirs = pty.openpty()
    answers = ["arithmetic-bas", "", "problem.jsonl", "problems.jsonl", "maths", "last_line", "", ""]
    os.write(ours, "".join(f"{answer}\n" for answer in answers).encode())
    command = [sys.executable, "-m", "groupwise", "init"]
    done = subprocess.run(command, stdin=theirs, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for text in (
        "no model 'arithmetic-bas'",
        "did you mean 'problems.jsonl'?",
        "did you mean 'math'?",
        "[question]",
        "[solution]",
    ):
        assert text in done.stdout, done.stdout
    assert tomllib.loads((tmp_path / "recipe.toml").read_text())["task"]["answer_key"] == "solution"
