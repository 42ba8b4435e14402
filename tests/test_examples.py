"""The examples run as they are, each in a process of its own, and show what they say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SHOWS = {
    "compare_two_algorithms": r"grpo: pass@1 [\d.]+ -> [\d.]+ after 768 completions.*\ndapo: pass@1",
    "loop_by_hand": r"step 4: mean reward [\d.]+, entropy [\d.]+",
    "own_loss": r"pass@1 before and after: \[[\d.]+, [\d.]+\]",
    "own_reward": r"reward of the first and the last step: -?[\d.]+ -?[\d.]+",
    "own_task": r"pass@1 of the base on doubles: 0\.\d+",
}


def test_every_example_is_known() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == SHOWS.keys()


@pytest.mark.parametrize("name", SHOWS)
def test_examples_run(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    assert re.search(SHOWS[name], done.stdout), done.stdout
