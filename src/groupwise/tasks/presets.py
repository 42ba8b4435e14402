"""Common datasets: where each is found, how a row becomes a prompt and an answer, and which reward judges it.

A preset is only defaults: `path` and every key that it fills in can be given in a recipe instead.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from groupwise.errors import nearest
from groupwise.rewards.answers import last_boxed, last_number
from groupwise.rewards.code import parse_tests
from groupwise.rewards.countdown import reference
from groupwise.tasks.rows import Row

BOXED = "{prompt}\n\nReason step by step, and put the final answer within \\boxed{}."
HASHES = '{prompt}\n\nReason step by step, and end with the final answer as a number after "####".'


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Defaults for the rows of one dataset."""

    summary: str
    path: str
    """A hub id."""
    config: str = ""
    split: str = "train"
    held_out_split: str = ""
    """Empty: a share of `split` is held out."""
    prompt_key: str
    answer_key: str
    prompt_template: str = "{prompt}"
    reward: str
    extract: Callable[[Any], str | None] | None = None
    """The answer within the answer column; None where there is none in it. Left out: the column is the answer."""
    wanted: str = ""
    """What `extract` looks for, for a message."""
    keeps_solution: bool = True
    """Whether the column that an answer was found in stays, as "solution"."""
    compose: Callable[[Row], str] | None = None
    """The answer of a row where no one column holds it."""
    write: Callable[[Row], Any] | None = None
    """The prompt of a row; left out: its prompt column."""
    same: Callable[[Row], str] | None = None
    """A name of the problem that a row repeats, where the file has rows more than once."""


def _checked_tests(value: Any) -> str:
    parse_tests(value)
    return value if isinstance(value, str) else json.dumps(value)


def _countdown_reference(row: Row) -> str:
    numbers, target = needed(row, "nums"), needed(row, "target")
    if not (isinstance(numbers, list) and numbers and all(type(n) is int and 0 <= n < 10**9 for n in numbers)):
        raise ValueError(f"'nums' must be a list of integers from 0, not {numbers!r}")
    if type(target) is not int:
        raise ValueError(f"'target' must be an integer, not {target!r}")
    return reference(numbers, target)


def _countdown_prompt(row: Row) -> str:
    numbers = ", ".join(map(str, needed(row, "nums")))
    return (
        f"Write an expression with the value {needed(row, 'target')}, using each of the numbers {numbers} exactly once, with "
        "+ - * / and parentheses. Think first, then give only the expression in <answer> </answer>, as in "
        "<answer>(1 + 2) / 3</answer>."
    )


def _code_prompt(row: Row) -> str:
    problem, starter = needed(row, "problem"), row.get("starter_code") or ""
    if not isinstance(problem, str):
        raise ValueError(f"'problem' must be a text, not {problem!r}")
    if starter:
        return f"{problem}\n\nComplete this code, and answer with one block of Python:\n\n```python\n{starter}\n```"
    return (
        f"{problem}\n\nAnswer with one block of Python: a program that reads standard input and writes standard output, or the "
        "function that is asked for."
    )


def _verl_index(row: Row) -> str:
    """DAPO's file has each problem about a hundred times, under the same index."""
    return str(needed(row, "extra_info.index"))


def needed(row: Row, key: str) -> Any:
    """A column, or a value in an object that is one ("reward_model.ground_truth").

    Raises:
        ValueError: there is none.
    """
    if key in row:
        return row[key]
    value: Any = row
    for name in key.split("."):
        if not isinstance(value, dict) or name not in value:
            raise ValueError(f"no {key!r}{nearest(key, [name[:40] for name in row][:20])}")
        value = value[name]
    return value


def _competition(summary: str, path: str, *, split: str = "train") -> Preset:
    return Preset(
        summary=summary, path=path, split=split, prompt_key="problem", answer_key="answer", prompt_template=BOXED, reward="boxed"
    )


def _verl(summary: str, path: str, reward: str, same: Callable[[Row], str] | None = None) -> Preset:
    return Preset(
        summary=summary, path=path, prompt_key="prompt", answer_key="reward_model.ground_truth", reward=reward, same=same
    )


PRESETS = {
    "gsm8k": Preset(
        summary="grade-school word problems; the answer is the number after ####",
        path="openai/gsm8k",
        config="main",
        held_out_split="test",
        prompt_key="question",
        answer_key="answer",
        prompt_template=HASHES,
        extract=last_number,
        wanted="number after '####'",
        reward="gsm8k",
    ),
    "math": Preset(
        summary="competition problems; the answer is the last box of the solution",
        path="DigitalLearningGmbH/MATH-lighteval",
        held_out_split="test",
        prompt_key="problem",
        answer_key="solution",
        prompt_template=BOXED,
        extract=last_boxed,
        wanted=r"\boxed{…}",
        reward="boxed",
    ),
    "math500": _competition("500 problems of MATH's test split", "HuggingFaceH4/MATH-500", split="test"),
    "aime24": _competition("AIME 2024, 30 problems", "HuggingFaceH4/aime_2024"),
    "aime25": _competition("AIME 2025, 30 problems", "math-ai/aime25", split="test"),
    "deepscaler": _competition("40,000 competition problems", "agentica-org/DeepScaleR-Preview-Dataset"),
    "polaris": _competition("53,000 harder problems", "POLARIS-Project/Polaris-Dataset-53K"),
    "dapo": _verl("DAPO-Math-17k, each problem once", "BytedTsinghua-SIA/DAPO-Math-17k", "dapo", _verl_index),
    "verl": _verl("rows as verl reads them, from a file of yours", "", "final"),
    "countdown": Preset(
        summary="reach a target with each number once",
        path="Jiayi-Pan/Countdown-Tasks-3to4",
        prompt_key="nums",
        answer_key="target",
        write=_countdown_prompt,
        compose=_countdown_reference,
        reward="countdown",
    ),
    "code": Preset(
        summary="programs judged by tests, in a sandbox",
        path="agentica-org/DeepCoder-Preview-Dataset",
        config="primeintellect",
        prompt_key="problem",
        answer_key="tests",
        write=_code_prompt,
        extract=_checked_tests,
        keeps_solution=False,
        reward="code",
    ),
}
