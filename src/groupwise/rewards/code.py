"""Programs that a model wrote, judged by tests in the sandbox.

A test gives a program standard input, or calls one function with arguments. What is expected never enters the sandbox: the
program's output is compared here.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from groupwise.rewards.boxes import Limits
from groupwise.rewards.sandbox import Box
from groupwise.rewards.warm import WAITING
from groupwise.types import Verdict

BLOCK = re.compile(r"```[ \t]*+(?:python3?|py)?+[ \t]*+\n(.*?)```", re.DOTALL | re.IGNORECASE)
LIMITS = Limits()
"""Of each test."""
CALL = """
import json, os, sys
out = os.dup(1)
os.dup2(2, 1)  # what the program prints is not its result
scope = {{"__name__": "solution"}}
exec(compile({source!r}, "solution.py", "exec"), scope)
name = {name!r}
function = scope[name] if name in scope else getattr(scope["Solution"](), name)
os.write(out, json.dumps(function(*json.loads(sys.stdin.read()))).encode())
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Test:
    """One test: the input (text, or a list of arguments where a function is called) and what must come out."""

    given: Any
    expected: tuple[Any, ...]
    """Any of these is right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tests:
    function: str | None
    """The function that is called, at the top level or a method of a class Solution; None: a program with standard input."""
    tests: tuple[Test, ...]


def parse_tests(value: Any) -> Tests:
    """Tests in one of the forms that datasets have, or as JSON text of it.

    - a list of {"input", "output"}, with "type" or "testtype": "stdin", "stdin_stdout" (or none), or "functional" with "fn_name"
      (or "metadata": {"func_name"}); a functional input is one JSON value a line, or a list of arguments
    - {"inputs": [...], "outputs": [...]}, with "fn_name" where a function is called; an output may be wrapped in a list

    Raises:
        ValueError: it is none of these.
    """
    try:
        return _read(value)
    except RecursionError as error:
        raise ValueError("the tests are nested too deeply") from error


def _read(value: Any) -> Tests:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError("the tests are not JSON") from error
    if isinstance(value, Mapping) and isinstance(value.get("inputs"), list) and isinstance(value.get("outputs"), list):
        name = value.get("fn_name") or None
        pairs = list(zip(value["inputs"], value["outputs"], strict=False))
        if len(value["inputs"]) != len(value["outputs"]) or not pairs:
            raise ValueError(f"the tests have {len(value['inputs'])} inputs and {len(value['outputs'])} outputs")
        return Tests(function=name, tests=tuple(_test(name, given, expected, wrapped=True) for given, expected in pairs))
    if isinstance(value, Mapping) and isinstance(value.get("tests"), list):
        value = value["tests"]
    if not isinstance(value, list) or not value or not all(isinstance(item, Mapping) for item in value):
        raise ValueError('the tests must be a list of {"input", "output"}, or {"inputs": [...], "outputs": [...]}')
    names = {_function_of(item) for item in value}
    if len(names) > 1:
        raise ValueError(f"the tests call different functions: {', '.join(sorted(map(str, names)))}")
    (name,) = names
    if not all("input" in item and "output" in item for item in value):
        raise ValueError('every test needs "input" and "output"')
    return Tests(function=name, tests=tuple(_test(name, item["input"], item["output"]) for item in value))


def _function_of(item: Mapping[str, Any]) -> str | None:
    kind = item.get("type") or item.get("testtype") or "stdin"
    if kind in ("stdin", "stdin_stdout"):
        return None
    inner = item.get("metadata")
    name = item.get("fn_name") or (inner.get("func_name") if isinstance(inner, Mapping) else None)
    if kind != "functional":
        raise ValueError(f"there is no type of test {kind!r}")
    if not isinstance(name, str):
        raise ValueError("a test of type 'functional' has no fn_name")
    return name


def _test(name: str | None, given: Any, expected: Any, wrapped: bool = False) -> Test:
    if name is None:
        given, expected = ("\n".join(map(str, item)) if isinstance(item, list) else str(item) for item in (given, expected))
        return Test(given=given, expected=(expected,))
    if isinstance(given, str):
        try:
            given = [json.loads(line) for line in given.splitlines() if line.strip()]
            expected = json.loads(expected) if isinstance(expected, str) else expected
        except ValueError as error:
            raise ValueError(f"a functional test must have one JSON value a line, not {error.args[0]}") from error
    if not isinstance(given, list):
        raise ValueError("the input of a functional test must be a list of arguments")
    one = wrapped and isinstance(expected, list) and len(expected) == 1
    return Test(given=given, expected=(expected, expected[0]) if one else (expected,))


def program_of(text: str) -> str | None:
    """The last fenced block of Python in a completion."""
    blocks = BLOCK.findall(text)
    return blocks[-1] if blocks else None


def judge(answer: str, text: str, box: Box) -> Verdict:
    """Whether the last block of Python passes the tests, which run one after another until one fails.

    Raises:
        SandboxError: the box could not be built for this program.
    """
    program = program_of(text)
    if program is None:
        return "unparsed"
    wanted = parse_tests(answer)
    return "correct" if all(_passes(program, wanted.function, test, box) for test in wanted.tests) else "wrong"


def _passes(program: str, function: str | None, test: Test, box: Box) -> bool:
    if function is None:
        outcome = WAITING.run(box, program, test.given, LIMITS)
        return outcome.ending == "done" and _lines(outcome.stdout) == _lines(test.expected[0])
    outcome = WAITING.run(box, CALL.format(source=program, name=function), json.dumps(test.given), LIMITS)
    if outcome.ending != "done":
        return False
    try:
        return json.loads(outcome.stdout) in test.expected
    except (ValueError, RecursionError):  # the program wrote to the descriptor itself
        return False


def _lines(text: str) -> list[str]:
    """Lines as they are compared: white space at their ends, and empty lines around all, do not count."""
    return [line.rstrip() for line in text.strip().splitlines()]
