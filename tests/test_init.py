"""groupwise init: from flags and by asking, and what it refuses."""

import csv
import json
import os
import pty
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from groupwise.workers import worker
from tests.test_cli import run
from tests.test_data import hub


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
    assert commands == [["data", "recipe.toml"], ["check", "recipe.toml"], ["train", "recipe.toml"]]
    assert run("data", "recipe.toml").exit_code == 0
    checked = run("check", "recipe.toml")
    assert checked.exit_code == 0, checked.output


def test_a_recipe_elsewhere_finds_its_files(tmp_path: Path) -> None:
    made = run("init", "deep/er.toml", "--model", "arithmetic-base", "--data", "problems.jsonl", "--reward", "mine.py:brevity")
    assert made.exit_code == 0, made.output
    task = tomllib.loads((tmp_path / "deep" / "er.toml").read_text())["task"]
    assert task["path"] == str(tmp_path / "problems.jsonl") and task["reward"] == f"{tmp_path / 'mine.py'}:brevity"
    assert "answer_key" not in task


def test_names_of_files_are_printed_as_they_are(tmp_path: Path) -> None:
    made = run("init", "a[red]x.toml", *FLAGS)
    assert "written: a[red]x.toml;" in made.stdout and (tmp_path / "a[red]x.toml").exists()


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
        ((), "missing: --model, --data;"),
        (("--model", "arithmetic-base"), "missing: --data;"),
        (FLAGS[:4], "missing: --reward;"),
        ((*FLAGS[:4], "--preset", "gsm9k"), "--preset gsm9k: there is no such preset; did you mean 'gsm8k'?"),
        ((*FLAGS[:4], "--preset", "gsm8k"), "no 'answer'"),
        ((*FLAGS, "--held-out", "problem.jsonl"), "did you mean 'problems.jsonl'?"),
        ((*FLAGS[:2], "--data", "arithmetic", "--reward", "math"), "--reward: arithmetic makes its own problems"),
        ((*FLAGS[:2], "--data", "gsm8k", "--config", "main"), "--config: --data gsm8k is a preset, which brings its own"),
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


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import time\ntime.sleep(600)\n", "mine.py: no result within 2 s"),
        ("import os\nos._exit(0)\n", "mine.py: "),
        ("raise SystemExit(0)\n", "mine.py: "),
        ("import sys\nsys.stdout.close()\nraise ValueError('x')\n", "mine.py: "),
    ],
)
def test_code_of_a_reward_runs_in_a_worker_with_a_limit(
    code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LOAD_LIMIT", 2.0)
    (tmp_path / "mine.py").write_text(code)
    refused = run("init", *FLAGS[:4], "--reward", "mine.py:brevity")
    assert refused.exit_code == 2 and message in refused.stderr
    assert not (tmp_path / "recipe.toml").exists()


def test_keys_that_cannot_be_guessed_are_missing(tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text('{"a": "1+1=", "b": "2"}\n{"a": "1+2=", "b": "3"}\n')
    refused = run("init", *FLAGS[:2], "--data", "odd.jsonl", *FLAGS[4:])
    assert refused.exit_code == 2 and "missing: --prompt-key" in refused.stderr
    made = run("init", *FLAGS[:2], "--data", "odd.jsonl", *FLAGS[4:], "--prompt-key", "a", "--answer-key", "b")
    assert made.exit_code == 0, made.output


GSM8K = [{"question": f"What is {i} + 2?", "answer": f"{i} and 2 make {i + 2}.\n#### {i + 2}"} for i in range(1, 19)]
SUMS = [{"q": f"{i}+2=", "info": {"sum": str(i + 2)}} for i in range(1, 19)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows in the form that the file's name says; without a suffix a directory of Parquet."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        if not path.suffix:
            path.mkdir()
            path /= "train.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("name", ["train.parquet", "train.csv", "train.json", "folder"])
def test_data_in_every_form_whose_rows_fit_a_preset_need_no_more(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, GSM8K)
    made = run("init", "--model", "arithmetic-base", "--data", name)
    assert made.exit_code == 0, made.output
    assert "these rows fit gsm8k" in made.stdout
    tree = tomllib.loads((tmp_path / "recipe.toml").read_text())
    assert tree["task"] == {"name": "dataset", "path": name, "preset": "gsm8k"}
    checked = run("check", "recipe.toml")
    assert checked.exit_code == 0, checked.output


def test_a_preset_that_fits_can_be_declined_and_changed(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", GSM8K)
    start = ("init", "--model", "arithmetic-base", "--data", "train.parquet", "--force")
    columns = {"name": "dataset", "path": "train.parquet", "prompt_key": "question", "answer_key": "answer", "reward": "exact"}
    for flags in (("--reward", "exact"), ("--preset", "none", "--reward", "exact")):
        made = run(*start, *flags)
        assert made.exit_code == 0, made.output
        assert tomllib.loads((tmp_path / "recipe.toml").read_text())["task"] == columns
    made = run(*start, "--preset", "gsm8k", "--reward", "mine.py:brevity")
    assert made.exit_code == 0, made.output
    task = tomllib.loads((tmp_path / "recipe.toml").read_text())["task"]
    assert task == {"name": "dataset", "path": "train.parquet", "preset": "gsm8k", "reward": "mine.py:brevity"}


def test_a_value_within_a_column_and_held_out_problems(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", SUMS)
    write(tmp_path / "test.parquet", [{"q": "30+2=", "info": {"sum": "32"}}])
    keys = ("--prompt-key", "q", "--answer-key", "info.sum", "--reward", "exact", "--held-out", "test.parquet")
    made = run("init", "deep/er.toml", "--model", "arithmetic-base", "--data", "train.parquet", *keys)
    assert made.exit_code == 0, made.output
    task = tomllib.loads((tmp_path / "deep" / "er.toml").read_text())["task"]
    assert task["answer_key"] == "info.sum" and task["held_out_path"] == str(tmp_path / "test.parquet")
    assert run("check", "deep/er.toml").exit_code == 0


def test_a_preset_by_its_name_reads_nothing_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, {"train": GSM8K})
    made = run("init", "--model", "arithmetic-base", "--data", "gsm8k")
    assert made.exit_code == 0, made.output
    assert tomllib.loads((tmp_path / "recipe.toml").read_text())["task"] == {"name": "dataset", "preset": "gsm8k"}
    assert not asked


def test_of_a_dataset_on_the_hub_one_row_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, {"train": GSM8K})
    made = run("init", "--model", "arithmetic-base", "--data", "me/sums", "--config", "main")
    assert made.exit_code == 0, made.output
    task = tomllib.loads((tmp_path / "recipe.toml").read_text())["task"]
    assert task == {"name": "dataset", "path": "me/sums", "config": "main", "preset": "gsm8k"}
    assert asked and all(call[-1] is True for call in asked), asked


def test_rows_that_lack_a_key_are_found_before_anything_is_written(tmp_path: Path) -> None:
    with (tmp_path / "problems.jsonl").open("a") as file:
        file.write('{"question": "1+1="}\n')
    refused = run("init", *FLAGS)
    assert refused.exit_code == 2 and "line 19: no 'solution'" in refused.stderr
    assert not (tmp_path / "recipe.toml").exists()


def in_a_terminal(home: Path, answers: list[str]) -> str:
    """What `groupwise init` prints in a real one, given these lines."""
    ours, theirs = pty.openpty()
    os.write(ours, "".join(f"{answer}\n" for answer in answers).encode())
    command = [sys.executable, "-m", "groupwise", "init"]
    done = subprocess.run(command, stdin=theirs, capture_output=True, text=True, timeout=120, cwd=home, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_asks_in_a_terminal_until_an_answer_is_right(tmp_path: Path) -> None:
    """Wrong answers are refused as they are given, and a line left empty takes what is proposed."""
    said = in_a_terminal(tmp_path, ["arithmetic-bas", "", "problem.jsonl", "problems.jsonl", "maths", "last_line", "", ""])
    for text in (
        "no model 'arithmetic-bas'",
        "did you mean 'problems.jsonl'?",
        "did you mean 'math'?",
        "[question]",
        "[solution]",
    ):
        assert text in said, said
    assert tomllib.loads((tmp_path / "recipe.toml").read_text())["task"]["answer_key"] == "solution"


@pytest.mark.parametrize("answers", [["gsm9k", ""], ["none", "exact", "", ""]])
def test_it_proposes_the_preset_that_the_rows_fit(answers: list[str], tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", GSM8K)
    said = in_a_terminal(tmp_path, ["", "train.parquet", *answers])
    assert "these rows fit gsm8k" in said and ("did you mean 'gsm8k'?" in said) == (answers[0] == "gsm9k")
    task = tomllib.loads((tmp_path / "recipe.toml").read_text())["task"]
    assert task.get("preset") == ("gsm8k" if answers[0] == "gsm9k" else None)
    assert task.get("reward") == (None if answers[0] == "gsm9k" else "exact")
