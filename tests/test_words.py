"""What the pages say: every text in both languages, with the same numbers in it, and Chinese set as Chinese is."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Formatter
from typing import Any

import pytest

from groupwise import evidence
from groupwise.evidence.phrases import LANGUAGES, texts

TEMPLATES = Path(evidence.__file__).parent / "templates"
TABLES = sorted(path.name.removesuffix("_text.toml") for path in TEMPLATES.glob("*_text.toml"))
HAN = "[\u4e00-\u9fff]"
OTHER_FIELDS = {
    "findings.events.named": {"name"},  # what a run notes is in English
}
OWN_SPACES = (
    "measure",
    "change",
    "effect",
    "found",
    "which",
    "advice",
    "remedies",
    "moved",
    "lost",
    "clip",
    "why",
    "head",
    "keys",
)
"""Fields that are filled with Chinese, or with Latin letters and the space that these need."""
FILLED = {**dict.fromkeys(OWN_SPACES, ""), "time": "3 秒"}


def leaves(table: Mapping[str, Any], above: str) -> Iterator[tuple[str, Mapping[str, str]]]:
    for key, value in table.items():
        if key == "names" and above == "findings.events.":
            continue  # Chinese alone: by the name of an event, whose English the run writes
        if all(isinstance(inner, str) for inner in value.values()):
            yield f"{above}{key}", value
        else:
            yield from leaves(value, f"{above}{key}.")


WORDS = {key: text for table in TABLES for key, text in leaves(texts(table), f"{table}.")}
PROSE = {key: re.sub(r"\$[^$]+\$", "0", text["zh"]) for key, text in WORDS.items()}
"""The Chinese texts, with a number for each formula."""


def fields(text: str) -> set[tuple[str, str]]:
    return {(field, form or "") for _, field, form, _ in Formatter().parse(re.sub(r"\$[^$]*\$", "", text)) if field}


def test_every_text_is_in_both_languages_with_the_same_numbers() -> None:
    assert len(TABLES) == 9 and len(WORDS) > 700
    for key, text in WORDS.items():
        assert tuple(text) == LANGUAGES, key
        assert text["en"] and (text["zh"] or key.endswith(".sentence")), key
        en, zh = (fields(text[language]) for language in LANGUAGES)
        assert {name for name, _ in en ^ zh} <= OTHER_FIELDS.get(key, set()), key


@pytest.mark.parametrize(
    ("what", "wrong"),
    [
        ("half-width punctuation", f"{HAN} ?[,;:?!]|[,;:?!] ?{HAN}|{HAN}[().]|[().]{HAN}|\\.\\."),
        ("quotation marks", f"{HAN}[\"']|[\"']{HAN}"),
        ("a space at full-width punctuation", "[，。；：？！、（）“”] | [，。；：？！、）”]"),
        ("no space between Chinese and Latin letters or digits", f"{HAN}[A-Za-z0-9|±√π]|[A-Za-z0-9%|√π]{HAN}"),
        ("a space between Chinese", f"{HAN} {HAN}"),
        ("a space before %", "[0-9}] %"),
    ],
)
def test_chinese_is_set_as_chinese(what: str, wrong: str) -> None:
    """As full-width punctuation, and with a space between Chinese and anything Latin."""
    found = []
    for key, text in PROSE.items():
        spaced = re.sub(r"{(\w+)[^}]*}", lambda field: FILLED.get(field[1], "0"), text)
        found += [f"{key}: {text}" for _ in [0] if re.search(wrong, spaced)]
    assert not found, what


def test_one_word_for_one_thing() -> None:
    """None of the words that stand for a term elsewhere, where the pages have another."""
    others = "置信区间|补全|令牌(?!（token）)|提示词|剪裁|学习器|熵崩|双方|此报告|留出题目"
    assert not [f"{key}: {text['zh']}" for key, text in WORDS.items() if re.search(others, text["zh"])]


def test_every_word_that_a_script_uses_is_there() -> None:
    scripts = "".join(path.read_text("utf-8") for path in (TEMPLATES / "page").glob("*.js"))
    used = re.findall(r'\btext\("([\w.]+)"', scripts)
    assert len(used) > 20 and not [key for key in used if key not in WORDS]
