"""Judges of one answer against the reference answer."""

import functools
import logging
import multiprocessing
from collections.abc import Callable

from pebble import ProcessPool

from groupwise.types import Verdict


def exact(answer: str, text: str) -> Verdict:
    """Right when the completion, without white space around it, is the answer."""
    return "correct" if text.strip() == answer.strip() else "wrong"


def last_line(answer: str, text: str) -> Verdict:
    """Right when the completion's last line that is not empty is the answer; unparsed when there is none."""
    lines = text.strip().splitlines()
    if not lines:
        return "unparsed"
    return "correct" if lines[-1].strip() == answer.strip() else "wrong"


TIME_LIMIT = 5.0
"""Seconds for one answer; simplifying what a model wrote can take forever."""


def math(answer: str, text: str) -> Verdict:
    """Right when the mathematical expression at the end of the completion equals the answer's (the library math-verify).

    An answer that takes longer than `TIME_LIMIT` counts as unparsed. It is judged in a process of its own, which is killed
    then, since some expressions hold the interpreter in one call that nothing else can stop.
    """
    try:
        verdict: Verdict = _pool().schedule(_math, args=[answer, text], timeout=TIME_LIMIT).result()
    except TimeoutError:
        return "unparsed"
    return verdict


@functools.cache
def _pool() -> ProcessPool:
    return ProcessPool(max_workers=1, context=multiprocessing.get_context("spawn"))


def _math(answer: str, text: str) -> Verdict:
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of having no time limit of its own, once an answer
    said = parse(text, parsing_timeout=None)
    if not said:
        return "unparsed"
    return "correct" if verify(parse(answer, parsing_timeout=None), said, timeout_seconds=None) else "wrong"


CHECKERS: dict[str, Callable[[str, str], Verdict]] = {"exact": exact, "last_line": last_line, "math": math}
