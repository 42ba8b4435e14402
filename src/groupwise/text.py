"""Text of models, datasets and users as it may be shown: nothing in it can steer a terminal, hide, or pass for something else.

`visible` is for people and not reversible (a backslash stays a backslash). `json_line` and `toml_text` escape the same characters
in ways that those formats decode to the very same text, so that files can be shown with `cat` and lose nothing.
"""

import json
import re
import unicodedata
from typing import Any

HIDING = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
"""Unicode categories of what has no shape of its own: control and format characters (bidirectional marks, zero-width spaces,
tags), surrogates, private use, unassigned and non-characters, line and paragraph separators."""
BLANK = {0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0, *range(0x180B, 0x1810), *range(0xE0100, 0xE01F0)}
"""Characters of other categories that are drawn as nothing: fillers, the empty braille pattern, rare variation selectors."""
JOINERS = "\u200c\u200d"
"""Format characters that Persian, the scripts of India and emoji need between two characters beyond ASCII."""
_LONE_JOINERS = re.compile(f"(?<![^\x00-\x7f{JOINERS}])[{JOINERS}]|[{JOINERS}](?![^\x00-\x7f{JOINERS}])")
_STACKED = re.compile(
    "(?<=[\u0300-\u036f\u0483-\u0489\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]{4})"
    "[\u0300-\u036f\u0483-\u0489\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]+"
)
"""Marks beyond four on one letter, which would be drawn over the lines above and below."""


def is_hidden(code: int) -> bool:
    """Whether a character would not be seen where it stands, or changes how others are seen; spaces are no such characters."""
    return code in BLANK or unicodedata.category(chr(code)) in HIDING


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class _Table(dict[int, str | int]):
    """For `str.translate`: hidden characters to their escapes, found out at first sight."""

    def __init__(self, kept: str, named: dict[str, str] | None = None) -> None:
        super().__init__({ord(character): ord(character) for character in kept})
        self.update({ord(character): name for character, name in (named or {}).items()})

    def __missing__(self, code: int) -> str | int:
        self[code] = self.escape(code) if is_hidden(code) else code
        return self[code]

    def escape(self, code: int) -> str:
        return _escape(code)


class _JsonTable(_Table):
    def escape(self, code: int) -> str:
        units = chr(code).encode("utf-16-be", "surrogatepass")
        return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


class _TomlTable(_Table):
    def escape(self, code: int) -> str:
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


_LINE = _Table(JOINERS, {"\n": "\\n", "\t": "\\t", "\r": "\\r"})
_LINES = _Table(JOINERS + "\n\t", {"\r": "\\r"})
_JSON = _JsonTable("")
_TOML = _TomlTable("\n\t")


def visible(text: str, *, lines: bool = False) -> str:
    """The text with hidden characters as escapes such as \\x1b and \\u202e.

    Args:
        lines: line feeds and tabs stay as they are.
    """
    if text.isascii() and text.isprintable():
        return text
    text = text.translate(_LINES if lines else _LINE)
    for pattern in (_LONE_JOINERS, _STACKED):
        text = pattern.sub(lambda found: "".join(_escape(ord(character)) for character in found[0]), text)
    return text


def shortened(text: str, most: int) -> str:
    """At most this many characters of a text, from its start and its end, and how many lie between."""
    if len(text) <= most:
        return text
    start, end = most - most // 4, most // 4
    return f"{text[:start]} [… {len(text) - start - end:,} characters left out …] {text[len(text) - end :]}"


def json_line(value: Any, separators: tuple[str, str] | None = None) -> str:
    """JSON on one line that decodes to the same value: letters of all scripts as they are, hidden characters as \\u escapes."""
    return json.dumps(value, ensure_ascii=False, separators=separators).translate(_JSON)


def toml_text(document: str) -> str:
    """A TOML document, all of whose strings are basic ones, with hidden characters as \\u escapes."""
    return document.translate(_TOML)
