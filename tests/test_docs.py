"""What the documentation says is so: its code blocks run, every public name is on the site, and `help` shows it."""

import pydoc
import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import BaseModel

import groupwise as gw
from groupwise.algorithms import PARTS
from groupwise.algorithms.named import general_settings, part_settings
from groupwise.cli.ablate import _check_rungs
from groupwise.config import LoraSection, Recipe, Source, load
from groupwise.experiments.ladder import find_ladder, load_ladder, shipped_ladders
from groupwise.models import new_module
from groupwise.plugins import is_reference
from groupwise.tasks.base import TASKS
from groupwise.tasks.user import UserTask
from groupwise.training.algorithm import build_algorithm
from tests.chat_templates import tokenizer
from tests.test_cli import run

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
MODEL = "Qwen/Qwen3-0.6B"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(*languages: str) -> list[Any]:
    """(page, number, text) of each code block in these languages."""
    return [
        pytest.param(text, id=f"{page.name}-{number}")
        for page in PAGES
        for number, (language, text) in enumerate(BLOCK.findall(page.read_text()))
        if language in languages
    ]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages speak of: the README's recipe, on the shipped model, and data."""
    readme = (ROOT / "README.md").read_text()
    recipe = next(text for language, text in BLOCK.findall(readme) if language == "toml")
    recipe = recipe.replace('"Qwen/Qwen3-0.6B"', '"arithmetic-base"').replace("max_tokens = 512", "max_tokens = 16")
    recipe = recipe.replace('reward = "math" ', 'reward = "last_line" ').replace("steps = 100", "steps = 1\neval_problems = 4")
    (tmp_path / "my.toml").write_text(recipe)
    lines = "".join(f'{{"prompt": "{i}+2=", "answer": "{i + 2}"}}\n' for i in range(1, 19))
    (tmp_path / "problems.jsonl").write_text(lines)
    rows = [{"question": f"What is {i}+2?", "answer": f"It is <<{i}+2={i + 2}>>{i + 2}.\n#### {i + 2}"} for i in range(1, 19)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    for page in PAGES:  # a block that begins with a file's name is that file
        for name, text in re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


FROM_ELSEWHERE = {
    "from-trl.md": ["from_trl/single_turn_trl.py", "from_trl/single_turn.toml"],
    "from-verl.md": ["from_verl/run_dapo.sh", "from_verl/dapo.toml", "from_verl/compute_score.py", "from_verl/reward.py"],
}
"""The examples that a page shows whole; they have tests of their own."""
SHOWN = {(ROOT / "examples" / name).read_text() for names in FROM_ELSEWHERE.values() for name in names}


@pytest.mark.parametrize("text", [block for block in blocks("python") if block.values[0] not in SHOWN])
def test_python_blocks_run(text: str, project: Path) -> None:
    exec(compile(text, "block", "exec", dont_inherit=True), {"__name__": "block"})


@pytest.mark.parametrize("text", blocks("toml"))
def test_toml_blocks_are_recipes_or_ladders(text: str, project: Path) -> None:
    path = project / "block.toml"
    path.write_text(text)
    if "[[rungs]]" in text:
        load_ladder(path)
    else:
        recipe, source = load(path, Recipe)
        build_algorithm(recipe.algorithm, source)
        check_task(recipe.task, source)


def check_task(settings: dict[str, Any], source: Source) -> None:
    """That a task's keys exist and have values of their types. No data is read."""
    kind = settings.get("name", "arithmetic")
    if is_reference(kind):
        UserTask.build(settings, source)
        return
    common = {key: value for key, value in settings.items() if key != "sources"}
    for item in settings.get("sources", [{}]):
        TASKS[kind].model_validate({**common, **{key: value for key, value in item.items() if key != "weight"}})


def known_keys() -> set[str]:
    """Every key of a recipe, dotted."""
    found = {"seed", "task.sources"}
    for table, field in Recipe.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= {f"{table}.{item.alias or key}" for key, item in kind.model_fields.items()}
    found |= {f"model.lora.{key}" for key in LoraSection.model_fields}
    found |= {f"task.{key}" for task in TASKS.values() for key in task.model_fields}
    parts = [part_settings(choice.make) for choices in PARTS.values() for choice in choices.values()]
    return found | {f"algorithm.{key}" for key in ("name", *PARTS, *general_settings(), *(key for part in parts for key in part))}


def named_keys(text: str) -> set[str]:
    """What stands between backticks and has the form of a key, with or without its value."""
    tables = "|".join(Recipe.model_fields)
    return set(re.findall(rf"`((?:{tables})\.[\w.]+)(?: = [^`]*)?`", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    if page.name == "from-verl.md":  # verl's own keys, in the first column, begin as ours do
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)
    assert named_keys(text) <= known_keys()


@pytest.mark.parametrize("text", blocks("bash"))
def test_commands_run(text: str, project: Path) -> None:
    """On tiny runs of the names that the pages use."""
    if "runs/a" in text:
        for name in "abc":
            gw.train("quick", out=f"runs/{name}", training={"steps": 2, "eval_problems": 10}, quiet=True)
    for line in text.splitlines():
        command, *arguments = shlex.split(line, comments=True) or [""]
        if (command, *arguments[:1]) == ("groupwise", "ablate"):  # hours of runs: what it would run is checked
            ladder, recipe = load_ladder(find_ladder(arguments[1]))
            _check_rungs(ladder, recipe)
        elif command == "groupwise":
            result = run(*_made_small(arguments, project))
            assert result.exit_code == 0, result.output
        else:  # what sets the project up is run by whoever runs these tests
            assert line in ("", "pip install ."), f"no test runs {line!r}"


def _made_small(arguments: list[str], project: Path) -> list[str]:
    """The README's five minutes in seconds: a tiny model of the family in place of the one that is named, and one step.

    Its weights are random and it is never right, so that dynamic sampling, rightly, would find nothing to learn from.
    """
    if MODEL in arguments:
        chat = tokenizer("qwen3")
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
        new_module({"model_type": "qwen3", "num_key_value_heads": 2, **sizes}, chat, seed=0).save_pretrained(project / MODEL)
        chat.save_pretrained(project / MODEL)
    if arguments[:2] != ["train", "recipe.toml"]:
        return arguments
    small = ("training.steps=1", "rollouts.max_tokens=8", "algorithm.dynamic_sampling=false", "training.eval_problems=2")
    return [*arguments, *(word for setting in small for word in ("--set", setting))]


@pytest.mark.parametrize("text", blocks("console"))
def test_ladders_that_a_page_names_are_shipped(text: str) -> None:
    """Commands that take hours are not run; what they name is there."""
    named = re.findall(r"for ladder in ([\w -]+);", text)
    assert named and set(named[0].split()) <= set(shipped_ladders())


def test_every_block_has_a_language() -> None:
    """So that none escapes these tests; text is what is not to be run. The README opens with the two commands."""
    known = {"python", "toml", "bash", "text", "console"}
    for page in PAGES:
        for number, (language, text) in enumerate(BLOCK.findall(page.read_text())):
            directive = text.startswith(("{", ".. ")) or page.name in ("api.md", "index.md")
            opening = page.name == "README.md" and number == 0
            assert language in known or directive or opening, f"{page.name}, block {number}: {text[:60]!r}"
    targets = {line.split(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if ":" in line}
    opening_lines = BLOCK.findall((ROOT / "README.md").read_text())[0][1].splitlines()
    assert [line.split()[:2] for line in opening_lines] == [["make", "train"], ["make", "test"]]
    assert {"train", "test", "docs"} <= targets


def test_every_public_name_is_on_the_site() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    assert set(re.findall(r"groupwise\.(\w+)$", page, re.MULTILINE)) == set(gw.__all__)


def test_help_shows_every_public_name_with_its_docstring() -> None:
    text = pydoc.plain(pydoc.render_doc(gw))
    for name in gw.__all__:
        assert re.search(rf"\b{name}\b", text), name
        if callable(getattr(gw, name)):
            assert (getattr(gw, name).__doc__ or "").strip(), name
