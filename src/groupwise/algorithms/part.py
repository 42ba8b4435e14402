"""What every part of an algorithm has in common: a small frozen value with its own settings, called like a function."""

import difflib
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Base of the parts that have settings. Each field is a setting, and so a key of [algorithm] in a recipe.

    A subclass adds its fields, `__call__` and, where its settings can contradict each other, `contradictions`.
    """

    def __post_init__(self) -> None:
        refuse(itertools.chain(negative_numbers(self), self.contradictions()))

    def contradictions(self) -> Iterable[tuple[str, bool, str]]:
        """(setting, whether it is wrong, what is wrong with it), checked when the part is made."""
        return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnPart:
    """A part from outside the library: a function, or a frozen dataclass whose fields are further settings."""

    target: Callable[..., Any]
    reference: str
    """ "file.py:name", as a recipe names it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A part that a recipe can choose by name."""

    make: Callable[..., Any]
    """A function without settings, or a `Part` class."""
    formula: str
    """How `groupwise algorithms` prints it."""


def settings_of(part: object) -> dict[str, Any]:
    """The settings of a part by name; none for a plain function."""
    if not is_dataclass(part) or isinstance(part, type):
        return {}
    return {field.name: getattr(part, field.name) for field in fields(part)}


def refuse(contradictions: Iterable[tuple[str, bool, str]]) -> None:
    """Refuse what contradicts itself.

    Raises:
        ValueError: "setting: reason" of the first contradiction that holds.
    """
    for key, wrong, reason in contradictions:
        if wrong:
            raise ValueError(f"{key}: {reason}")


def negative_numbers(value: Any) -> Iterable[tuple[str, bool, str]]:
    """Contradictions for the numeric fields of a dataclass: none may be negative, infinite or NaN."""
    for field in fields(value):
        number = getattr(value, field.name)
        if field.type in (float, int, float | None) and number is not None and not isinstance(number, float | int):
            yield field.name, True, f"{number!r} is not a number"
        elif field.type is float and number is None:
            yield field.name, True, "needs a number"
        elif isinstance(number, float | int) and not isinstance(number, bool):
            yield field.name, not 0 <= number < math.inf, f"{number} is not a number of at least 0"


def one_of(value: Any, key: str, known: tuple[Any, ...]) -> tuple[str, bool, str]:
    """The contradiction that field `key` of `value` is none of the known choices."""
    found = getattr(value, key)
    return key, found not in known, f"{found!r} is not one of {known}"


def nearest(word: object, known: Iterable[str]) -> str:
    """A hint to end a message with: "; did you mean 'x'?", or the list of known words when none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(str(word)[:80], known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""
