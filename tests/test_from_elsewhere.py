"""The pages for those who come from TRL and verl: examples stand as they are, defaults are quoted right, rewards run."""

import ast
import asyncio
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import groupwise as gw
from groupwise.algorithms import PARTS
from groupwise.config import Recipe, load
from groupwise.tasks.base import build_task
from groupwise.tasks.dataset import DatasetTask
from groupwise.training.algorithm import build_algorithm
from groupwise.types import Completion
from tests.test_docs import BLOCK, FROM_ELSEWHERE, ROOT, check_task


@pytest.mark.parametrize("name", FROM_ELSEWHERE)
def test_examples_stand_in_a_page_as_they_are(name: str) -> None:
    shown = {text for _, text in BLOCK.findall((ROOT / "docs" / name).read_text())}
    for example in FROM_ELSEWHERE[name]:
        assert (ROOT / "examples" / example).read_text() in shown, example


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*/*.toml")), ids=lambda path: path.stem)
def test_recipes_of_the_examples_have_keys_that_exist(path: Path) -> None:
    recipe, source = load(path, Recipe)
    build_algorithm(recipe.algorithm, source)
    check_task(recipe.task, source)
    assert path.name in "".join((ROOT / "docs" / page).read_text() for page in FROM_ELSEWHERE)


def rows(page: str, columns: int) -> list[list[str]]:
    """The cells of tables with so many columns, without their headers."""
    lines = (ROOT / "docs" / page).read_text().splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("| `")]
    return [row for row in cells if len(row) == columns]


def defaults() -> dict[str, Any]:
    """Key -> the default that the pages quote; those of [algorithm] are of `name = "grpo"` and of the parts that have them."""
    found: dict[str, Any] = {"seed": 0}
    for choices in PARTS.values():
        for choice in choices.values():
            if isinstance(choice.make, type):
                found |= {f"algorithm.{item.name}": item.default for item in fields(choice.make)}
    found |= {f"algorithm.{key}": value for key, value in gw.named("grpo").settings().items()}
    found |= {f"task.{key}": item.get_default(call_default_factory=True) for key, item in DatasetTask.model_fields.items()}
    for table, section in Recipe().model_dump(by_alias=True).items():
        if table not in ("seed", "task", "algorithm"):
            found |= {f"{table}.{key}": value for key, value in section.items()}
    return found


def test_our_defaults_in_the_page_on_trl_are_those_of_the_code() -> None:
    ours, checked = defaults(), 0
    for _, _, key, default, _ in rows("from-trl.md", 5):
        if key == "none":
            continue
        value = tomllib.loads(f"x = {default.strip('`')}")["x"]
        assert value == ("none" if ours[key.strip("`")] is None else ours[key.strip("`")]), key
        checked += 1
    assert checked > 50


CONFIGS = [*(ROOT / ".bench" / "trl").glob("lib/python3*/site-packages/trl/trainer/*_config.py")]


@pytest.mark.skipif(not CONFIGS, reason="needs TRL in an environment of its own: make .bench/trl/.ready")
def test_the_page_on_trl_names_every_argument_with_its_default() -> None:
    theirs: dict[str, Any] = {}
    for path in sorted(path for path in CONFIGS if path.name in ("base_config.py", "grpo_config.py")):
        for item in ast.walk(ast.parse(path.read_text())):
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and isinstance(item.value, ast.Call):
                given = {word.arg: word.value for word in item.value.keywords}
                if isinstance(given.get("default"), ast.Constant):
                    theirs[item.target.id] = given["default"].value
    text = (ROOT / "docs" / "from-trl.md").read_text()
    vllm = {name for name in theirs if name.startswith("vllm_") and "importance" not in name}
    forgotten = {name for name in theirs if f"`{name}`" not in text} - vllm
    assert not forgotten - {"vllm_importance_sampling_cap", "log_multimodal"}, forgotten
    assert len(theirs) > 60
    resolved = {"bf16": True}  # None in the field: True unless fp16 is asked for
    checked = 0
    for name, default, *_ in rows("from-trl.md", 5):
        name = name.strip("`")
        if name in theirs:
            assert ast.literal_eval(default.strip("`")) == resolved.get(name, theirs[name]), name
            checked += 1
    assert checked > 35


def test_a_reward_of_verls_is_called_with_its_columns(tmp_path: Path) -> None:
    """Rows in verl's form, through the recipe beside it."""
    rows = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"{i}+1="}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
            "extra_info": {"split": "train", "index": i},
        }
        for i in range(8)
    ]
    for name, part in (("train", rows[:6]), ("test", rows[6:])):
        pq.write_table(pa.Table.from_pylist(part), tmp_path / f"{name}.parquet")
    for name in ("dapo.toml", "reward.py", "compute_score.py"):
        (tmp_path / name).write_text((ROOT / "examples" / "from_verl" / name).read_text())
    recipe, source = load(tmp_path / "dapo.toml", Recipe)
    task = build_task(recipe.task, source)
    problem = task.problem(0, seed=0)
    texts = [f"it is {problem.answer}", "it is 100", "what?"]
    completions = [
        Completion(
            text=text,
            tokens=torch.zeros(1, dtype=torch.long),
            logprobs=torch.zeros(1),
            mask=torch.ones(1, dtype=torch.bool),
            stop="stop",
            versions=(),
        )
        for text in texts
    ]
    scores = asyncio.run(task.score(problem, completions))
    assert [score.reward for score in scores] == [1.0, 0.0, 0.0] and [score.correct for score in scores] == [True, False, False]
