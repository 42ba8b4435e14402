"""docs/recipe.md: its keys are those of the code, and each example of a user's own function works in a recipe."""

import re
import sys
from pathlib import Path

import pytest

from tests.test_cli import run
from tests.test_docs import BLOCK, ROOT, project

sys.path.insert(0, str(ROOT / "docs"))
import make_recipe

__all__ = ["project"]
PAGE = (ROOT / "docs" / "recipe.md").read_text()


def test_the_page_has_the_keys_of_the_code() -> None:
    """With their types, defaults and meanings. After a change: `python docs/make_recipe.py`, which `make docs` runs too."""
    assert make_recipe.page(PAGE) == PAGE


def test_a_key_without_a_meaning_is_refused() -> None:
    with pytest.raises(SystemExit, match="no docstring under its field"):
        make_recipe._row("key", int, 1, "")


@pytest.mark.parametrize("text", [text for language, text in BLOCK.findall(PAGE) if language == "toml"])
def test_recipes_of_the_page_are_found_right(text: str, project: Path) -> None:
    (project / "own.toml").write_text(text)
    checked = run("check", "own.toml")
    assert checked.exit_code == 0, checked.output


def test_each_own_piece_has_a_whole_example() -> None:
    files = re.findall(r"^```python\n# (\w+\.py)$", PAGE, re.MULTILINE)
    assert files == [
        "tilted.py",
        "centred.py",
        "brief.py",
        "counter.py",
        "doubles.py",
        "counting.py",
        "rewards_log.py",
    ]
    named = {name for name in re.findall(r'"(\w+\.py):\w+"', PAGE) if name != "file.py"}
    assert named == set(files)
