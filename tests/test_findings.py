"""What findings say, in both languages, and that recorded runs of known health are judged rightly."""

import re
from collections.abc import Iterator
from string import Formatter
from typing import Any

from groupwise.evidence.phrases import texts


def leaves(table: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, str]]]:
    for key, value in table.items():
        if set(value) == {"en", "zh"}:
            yield f"{path}{key}", value
        elif not all(isinstance(item, str) for item in value.values()):
            yield from leaves(value, f"{path}{key}.")


def test_every_text_of_the_findings_is_in_both_languages_with_the_same_numbers() -> None:
    found = dict(leaves(texts("findings")))
    assert len(found) > 40
    for key, text in found.items():
        fields = {language: {field for _, field, _, _ in Formatter().parse(text[language]) if field} for language in text}
        assert fields["en"] <= fields["zh"], key
        words = re.sub(r"{[^}]*}", "", text["zh"])
        assert key == "words.pass_rate" or not words or re.search("[\u3000-\u9fff\uff00-\uffef]", words), key
        assert not re.search("[\u4e00-\u9fff] ?[,;:?!]|[,;:?!] ?[\u4e00-\u9fff]", words), f"{key}: punctuation of half width"
