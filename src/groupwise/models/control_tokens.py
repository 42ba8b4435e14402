"""Token ids as text in which a control token differs from ordinary text that only spells its name."""

from collections.abc import Iterable
from typing import Any

FIRST = 0xF0000
"""The k-th control token is written as the character FIRST + k, of Unicode's supplementary private-use area."""
LAST = 0xFFFFD


class ControlTokens:
    """The control tokens of a tokenizer: its special tokens, and the added ones that are not whitespace."""

    def __init__(self, tokenizer: Any) -> None:
        added = sorted(tokenizer.added_tokens_decoder.items())
        kept = [(i, str(token.content)) for i, token in added if token.special or not token.content.isspace()][: LAST - FIRST]
        self._tokenizer = tokenizer
        self._characters = {i: chr(FIRST + k) for k, (i, _) in enumerate(kept)}
        self._names = {chr(FIRST + k): content for k, (_, content) in enumerate(kept)}
        self._ids = {chr(FIRST + k): i for k, (i, _) in enumerate(kept)}

    def __contains__(self, token: int) -> bool:
        return token in self._characters

    def mark(self, ids: Iterable[int]) -> str:
        """The decoded ids, each control token as its private character. Ordinary text cannot contain one."""
        parts: list[str] = []
        run: list[int] = []
        for token in ids:
            if token in self._characters:
                parts += [self._decode(run), self._characters[token]]
                run = []
            else:
                run.append(token)
        return "".join([*parts, self._decode(run)])

    def _decode(self, run: list[int]) -> str:
        if not run:
            return ""
        text = str(self._tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        return "".join("\ufffd" if FIRST <= ord(character) <= LAST else character for character in text)

    def mark_text(self, text: str) -> str:
        """A template's own text, each name of a control token as its private character."""
        for character, name in sorted(self._names.items(), key=lambda item: -len(item[1])):
            text = text.replace(name, character)
        return text

    def unmark(self, text: str) -> str:
        """The text with the names of its control tokens."""
        return "".join(self._names.get(character, character) for character in text)

    def find(self, marked: str) -> list[int]:
        """The ids of the control tokens in a marked text, in order."""
        return [self._ids[character] for character in marked if character in self._ids]
