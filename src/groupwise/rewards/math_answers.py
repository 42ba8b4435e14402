"""What worker processes run for the reward `math`."""

import logging

from math_verify import parse, verify

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of having no time limit of its own, once an answer


def verdict(answer: str, text: str) -> str:
    """Whether the mathematical expression at the end of a text equals the answer's."""
    said = parse(text, parsing_timeout=None)
    if not said:
        return "unparsed"
    return "correct" if verify(parse(answer, parsing_timeout=None), said, timeout_seconds=None) else "wrong"
