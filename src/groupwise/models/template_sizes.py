"""How large what a chat template asks for would be, found before it is made."""

import re
from collections.abc import Callable, Iterator, Mapping
from string import Formatter
from typing import Any

from jinja2.exceptions import TemplateRuntimeError

LARGEST = 8_000_000
"""Characters of one text, and of all texts in one list; a prompt of a million tokens has some four million."""
WIDEST = 1000
"""Of a width, indent or precision, and the exponent of a power."""
REMOVED = ("pprint", "striptags", "urlize", "wordwrap")
"""Filters for web pages, which no chat template uses, and which take time that grows faster than the text."""
SPECIFICATION = re.compile(r"[-#0 +]*(\*|[0-9]*)(?:\.(\*|[0-9]*))?[hlL]?.?", re.DOTALL)
"""What follows a % and a name in parentheses: flags, width, precision, conversion."""

Arguments = tuple[Any, ...]
Check = Callable[[Arguments, Mapping[str, Any]], Arguments]
"""From the arguments of a filter or method, the value or text itself first, those that it is called with."""


class TooLarge(TemplateRuntimeError):
    """A template asks for too much."""


def weight(value: Any) -> int:
    """Characters that a value would have as text, about: those of its texts, and 8 for each entry of a list.

    Raises:
        TooLarge: more than `LARGEST`.
    """
    total, left = 0, [value]
    while left:
        item = left.pop()
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, dict):
            total += 32 + 8 * len(item)
            if total <= LARGEST:
                left += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            total += 32 + 8 * len(item)
            if total <= LARGEST:
                left += item
        elif isinstance(item, int):
            total += item.bit_length()
            if item.bit_length() > 16384:
                raise TooLarge("it makes a number of thousands of digits")
        if total > LARGEST:
            raise TooLarge(f"it makes a list of more than {LARGEST:,} characters")
    return total


def _need(size: int) -> None:
    if size > LARGEST:
        raise TooLarge(f"it asks for a text or list of {size:,} characters, more than {LARGEST:,}")


def times(left: Any, right: Any) -> None:
    """Check `left * right`."""
    for sequence, number in ((left, right), (right, left)):
        if isinstance(number, int) and isinstance(sequence, str | bytes | list | tuple):
            _need(weight(sequence) * max(number, 0))


def power(left: Any, right: Any) -> None:
    """Check `left ** right`."""
    if isinstance(left, int) and isinstance(right, int) and abs(right) > WIDEST:
        raise TooLarge(f"it asks for a power of {right}, more than {WIDEST}")


def _all(arguments: Arguments, keywords: Mapping[str, Any]) -> Iterator[Any]:
    yield from arguments[1:]
    yield from keywords.values()


def _narrow(arguments: Arguments, keywords: Mapping[str, Any]) -> Arguments:
    """A width, an indent, a number of columns."""
    for number in _all(arguments, keywords):
        if (isinstance(number, int) and abs(number) > WIDEST) or (isinstance(number, str) and len(number) > WIDEST):
            raise TooLarge(f"it asks for a width, precision or number of more than {WIDEST}")
    return arguments


def _replace(arguments: Arguments, keywords: Mapping[str, Any]) -> Arguments:
    text, *rest = arguments
    if isinstance(text, str) and len(rest) >= 2 and all(isinstance(part, str) for part in rest[:2]):
        _need(len(text) + text.count(rest[0]) * len(rest[1]))
    elif any(isinstance(part, str) and len(part) > WIDEST for part in (*rest, *keywords.values())):
        raise TooLarge("it replaces by a long text")  # in a value that is a text only afterwards
    return arguments


def _join(arguments: Arguments, keywords: Mapping[str, Any], *, text: int, items: int) -> Arguments:
    if len(arguments) <= items:
        return arguments
    values = arguments[items]
    entries = values if isinstance(values, str) else list(values)
    between = arguments[text] if len(arguments) > text else keywords.get("d", "")
    _need(weight(entries) + len(entries) * len(str(between)))
    return (*arguments[:items], entries, *arguments[items + 1 :])


def _join_method(arguments: Arguments, keywords: Mapping[str, Any]) -> Arguments:
    return _join(arguments, keywords, text=0, items=1)


def _join_filter(arguments: Arguments, keywords: Mapping[str, Any]) -> Arguments:
    return _join(arguments, keywords, text=1, items=0)


def _percent(arguments: Arguments, keywords: Mapping[str, Any]) -> Arguments:
    """`text % values` and `text|format(...)`."""
    text, place = arguments[0], 0
    if not isinstance(text, str):
        return arguments
    while (place := text.find("%", place) + 1) > 0:
        if text.startswith("(", place):  # the name of a value, in which parentheses may be nested
            place, depth = place + 1, 1
            while depth and place < len(text):
                depth += (text[place] == "(") - (text[place] == ")")
                place += 1
        found = SPECIFICATION.match(text, place)
        assert found is not None  # it matches nothing at all too
        if any(part == "*" or len(part or "") > 3 for part in found.groups()):
            raise TooLarge("it asks for a width or precision of thousands, or takes it from a value")
        place = found.end()
    return _filled(text.count("%"), arguments, keywords)


def _braces(arguments: Arguments, keywords: Mapping[str, Any]) -> Arguments:
    """`text.format(...)` and `text.format_map(...)`."""
    text = arguments[0]
    if not isinstance(text, str):
        return arguments
    try:
        specifications = [specification for _, _, specification, _ in Formatter().parse(text) if specification]
    except ValueError:  # which formatting raises too, with what is wrong
        return arguments
    if any("{" in part for part in specifications):
        raise TooLarge("it takes a width or precision from a value")
    if any(re.search(r"\d{4}", part) for part in specifications):
        raise TooLarge("it asks for a width or precision of thousands")
    return _filled(text.count("{"), arguments, keywords)


def _filled(fields: int, arguments: Arguments, keywords: Mapping[str, Any]) -> Arguments:
    _need(len(arguments[0]) + fields * weight(list(_all(arguments, keywords))))
    return arguments


def _searched(arguments: Arguments, keywords: Mapping[str, Any]) -> Arguments:
    """Methods that compare every place with every character of what they look for."""
    text, *rest = arguments
    longest = max((len(part) for part in rest if isinstance(part, str | bytes)), default=0)
    if isinstance(text, str | bytes) and len(text) * longest > 500_000_000:
        raise TooLarge("it looks for a long text in a long text")
    return arguments


def _refused(arguments: Arguments, keywords: Mapping[str, Any]) -> Arguments:
    raise TooLarge("it calls a method that chat templates have no use for: encode, to_bytes or translate")


CHECKED_METHODS: Mapping[str, Check] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "expandtabs"), _narrow),
    **dict.fromkeys(("rfind", "rindex", "rsplit", "rpartition", "strip", "lstrip", "rstrip"), _searched),
    **dict.fromkeys(("encode", "to_bytes", "translate"), _refused),
    "replace": _replace,
    "join": _join_method,
    "format": _braces,
    "format_map": _braces,
}
CHECKED_FILTERS: Mapping[str, Check] = {
    **dict.fromkeys(("center", "indent", "tojson", "slice", "batch", "round"), _narrow),
    "trim": _searched,
    "replace": _replace,
    "join": _join_filter,
    "format": _percent,
}
