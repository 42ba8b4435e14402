"""Recipe files as editors write them: which kind they are, and which line a message names."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from groupwise.cli import app
from groupwise.config import Recipe, SftRecipe, is_sft, load
from groupwise.config.trees import changes, flat
from groupwise.errors import UserError

SFT = "model.path = 'arithmetic-base'\n[sft]\nsteps = 1\n"


@pytest.mark.parametrize(
    "text",
    [
        SFT,
        "\ufeff" + SFT,
        "\ufeff[sft]\nsteps = 1\n[model]\npath = 'arithmetic-base'\n",
        SFT.replace("[sft]", "[ sft ]"),
        "sft.steps = 1\nmodel.path = 'arithmetic-base'\n",
        "sft = { steps = 1 }\nmodel.path = 'arithmetic-base'\n",
        "extends = 'base.toml'\nseed = 2\n",
    ],
)
def test_a_recipe_is_known_by_its_tables_however_they_are_written(text: str, tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(SFT)
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    assert is_sft(path)
    assert load(path, SftRecipe)[0].sft.steps == 1


def test_a_text_that_holds_a_header_is_none(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("extends = 'quick'\n[task]\nsystem_prompt = '''\n[sft]\n'''\n")
    assert not is_sft(path)


@pytest.mark.parametrize("text", ["\ufeffsed = 1\n", "\ufeff[lerner]\nx = 1\n"])
def test_a_message_names_the_first_line_of_a_file_with_a_byte_order_mark(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"recipe\.toml, line 1, .*unknown key; did you mean"):
        load(path, Recipe)
    result = CliRunner().invoke(app, ["check", str(path)])
    assert result.exit_code == 2 and "line 1" in " ".join(result.output.split())


def test_trees_are_compared_by_dotted_keys() -> None:
    old, new = {"a": {"b": 1, "c": {"d": None}}, "e": True, "f": {}}, {"a": {"b": 2, "g": [1]}, "e": 1}
    assert flat(old) == {"a.b": 1, "a.c.d": None, "e": True}
    assert changes(old, new) == {"a.b": [1, 2], "e": [True, 1], "a.g": [None, [1]]}
