"""Countdown: reach a target with each of some numbers once, by + - * / and parentheses.

The expression that a model wrote is parsed and evaluated here, in exact fractions; nothing of it is run as code.
"""

import json
import re
from collections import Counter
from fractions import Fraction

from groupwise.rewards.answers import last_tagged
from groupwise.types import Verdict

TOKEN = re.compile(r"\s*(?:(\d{1,9})|([-+*/()]))")
MAX_LENGTH = 400
"""Characters of an expression; it bounds the recursion of the parser too."""
SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-"})


def reference(numbers: list[int], target: int) -> str:
    """The reference answer of a problem, as `countdown` reads it."""
    return json.dumps({"nums": numbers, "target": target})


def countdown(answer: str, text: str) -> Verdict:
    """Right when the last <answer> is an expression that uses each number exactly once and has the target's value.

    Unparsed: there is no <answer>, or it is no expression (an equation is none).

    Raises:
        ValueError: the answer is not as `reference` writes it.
    """
    target, numbers = _wanted(answer)
    said = last_tagged(text)
    if said is None:
        return "unparsed"
    try:
        value, used = evaluate(said)
    except ValueError:
        return "unparsed"
    return "correct" if value == target and Counter(used) == Counter(numbers) else "wrong"


def _wanted(answer: str) -> tuple[int, list[int]]:
    """The target and the numbers of a reference answer."""
    try:
        found = json.loads(answer)
        return int(found["target"]), [int(number) for number in found["nums"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f'the answer {answer[:80]!r} is not JSON of the form {{"nums": [1, 2], "target": 3}}') from error


def evaluate(text: str) -> tuple[Fraction | None, list[int]]:
    """An expression's value (None where it divides by zero) and the numbers in it.

    Raises:
        ValueError: it is no expression of integers, + - * / and parentheses, or too long.
    """
    parser = _Parser(text.translate(SIGNS))
    value = parser.sum()
    if parser.tokens:
        raise ValueError(f"unexpected {parser.tokens[-1]!r}")
    return value, parser.numbers


class _Parser:
    """sum = term (+|- term)*; term = factor (*|/ factor)*; factor = number | -factor | ( sum )"""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise ValueError("too long")
        self.tokens: list[str] = []
        """What is left to read, the next one last."""
        self.numbers: list[int] = []
        end = 0
        while text[end:].strip():
            match = TOKEN.match(text, end)
            if match is None or (match[1] and text[match.end() : match.end() + 1].isdigit()):
                raise ValueError(f"unexpected {text[end:].strip()[0]!r}")
            self.tokens.append(match[1] or match[2])
            end = match.end()
        self.tokens.reverse()

    def _take(self, *wanted: str) -> str | None:
        return self.tokens.pop() if self.tokens and self.tokens[-1] in wanted else None

    def sum(self) -> Fraction | None:
        value = self.term()
        while sign := self._take("+", "-"):
            other = self.term()
            if value is not None and other is not None:
                value = value + other if sign == "+" else value - other
            else:
                value = None
        return value

    def term(self) -> Fraction | None:
        value = self.factor()
        while sign := self._take("*", "/"):
            other = self.factor()
            if value is None or other is None or (sign == "/" and other == 0):
                value = None
            else:
                value = value * other if sign == "*" else value / other
        return value

    def factor(self) -> Fraction | None:
        if self._take("-"):
            value = self.factor()
            return None if value is None else -value
        if self._take("("):
            value = self.sum()
            if not self._take(")"):
                raise ValueError("an open parenthesis")
            return value
        if not self.tokens or not self.tokens[-1].isdigit():
            raise ValueError("a number is missing")
        self.numbers.append(int(self.tokens.pop()))
        return Fraction(self.numbers[-1])
