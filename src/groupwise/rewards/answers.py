"""The final answer within a text, by the conventions of the common datasets."""

import re

NUMBER = re.compile(r"####\s*+\$?+\s*+(-?[0-9.,]+)")
"""Possessive, as every pattern here must take a time in proportion to the text: it is searched in the process that trains."""
ANSWER_LINE = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
OPENING, CLOSING = "<answer>", "</answer>"
MARK = re.compile(r"\\f?box(?:ed)?\s*\{|\\.|[{}]", re.DOTALL)
"""The opening of a box, an escaped character, or a brace."""
TAIL = 300
"""Characters from the end in which DAPO looks for the answer."""


def last_number(text: str) -> str | None:
    """GSM8K's convention: the number after the last "####", without commas and a full stop at its end."""
    found = NUMBER.findall(text)
    number = found[-1].replace(",", "").rstrip(".") if found else ""
    return number if re.fullmatch(r"-?(\d+\.?\d*|\.\d+)", number) else None


def last_boxed(text: str) -> str | None:
    """What the last balanced \\boxed{…} or \\fbox{…} holds, one inside another counting as part of it."""
    open_braces: list[tuple[bool, int]] = []  # whether it is a box's, and where its content begins
    closed: list[tuple[int, int]] = []
    for mark in MARK.finditer(text):
        if mark[0] == "}":
            is_box, start = open_braces.pop() if open_braces else (False, 0)
            if is_box:
                while closed and closed[-1][0] > start:
                    closed.pop()
                closed.append((start, mark.start()))
        elif mark[0].endswith("{") and mark[0] != "\\{":
            open_braces.append((mark[0] != "{", mark.end()))
    return text[slice(*closed[-1])].strip() if closed else None


def answer_line(text: str) -> str | None:
    """DAPO's convention, in the last 300 characters: what follows the last "Answer:" on its line, or else the last box.

    A box or dollar signs around what follows are taken off.
    """
    tail = text[-TAIL:]
    found = ANSWER_LINE.findall(tail)
    if not found:
        return last_boxed(tail)
    line = found[-1].strip()
    return last_boxed(line) or line.strip("*$ ").rstrip(".").strip("$ ") or None


def last_tagged(text: str) -> str | None:
    """What stands in the last <answer>…</answer>."""
    found, end = None, 0
    while (start := text.find(OPENING, end)) >= 0 and (close := text.find(CLOSING, start)) >= 0:
        found, end = text[start + len(OPENING) : close].strip(), close + len(CLOSING)
    return found


def any_final(text: str) -> str | None:
    """The answer by whichever convention the text follows: "####", "Answer:" on a line, a box."""
    return last_number(text) or answer_line(text) or last_boxed(text)
