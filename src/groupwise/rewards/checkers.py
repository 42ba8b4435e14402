"""Judges of one answer against the reference answer."""

from collections.abc import Callable

from math_verify import parse, verify

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


def math(answer: str, text: str) -> Verdict:
    """Right when the mathematical expression at the end of the completion equals the answer's (the library math-verify)."""
    # Its time limits use SIGALRM, which works in the main thread alone; both texts are short.
    said = parse(text, parsing_timeout=None)
    if not said:
        return "unparsed"
    return "correct" if verify(parse(answer, parsing_timeout=None), said, timeout_seconds=None) else "wrong"


CHECKERS: dict[str, Callable[[str, str], Verdict]] = {"exact": exact, "last_line": last_line, "math": math}
