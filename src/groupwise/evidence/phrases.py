"""What the pages say, in English and Chinese: templates in TOML, filled with a run's numbers."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from groupwise.evidence.page import asset

LANGUAGES = ("en", "zh")


@dataclass(frozen=True, slots=True)
class Phrase:
    """One text in each language of the pages."""

    en: str
    zh: str

    def as_json(self) -> dict[str, str]:
        return {"en": self.en, "zh": self.zh}


def same(text: str) -> Phrase:
    """A text that is not translated: a name, a path, what a user wrote."""
    return Phrase(text, text)


def phrase(table: str, key: str, **values: Any) -> Phrase:
    """A text of `templates/<table>_text.toml` with its {fields} filled in.

    Args:
        table: "findings", "figures", "page" or another file's name.
        key: dotted, as "entropy.title".
        values: for the fields, with Python's format specifications; a Phrase fills each language with its own text.
    """
    entry: Any = texts(table)
    for part in key.split("."):
        entry = entry[part]
    return Phrase(*(entry[language].format(**_in(language, values)) for language in LANGUAGES))


def _in(language: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, language) if isinstance(value, Phrase) else value for name, value in values.items()}


@cache
def texts(table: str) -> dict[str, Any]:
    """All texts of a table: nested by key, with "en" and "zh" at the leaves."""
    return tomllib.loads(asset(f"{table}_text.toml"))
