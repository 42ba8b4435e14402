"""Token ids as text in which a control token differs from ordinary text that only spells its name."""

from collections.abc import Iterable
from typing import Any

FIRST, LAST = 0xD800, 0xDFFF
"""A control token is written as a lone surrogate, which no decoded text can contain."""


def is_control(character: str) -> bool:
    """Whether a character of a marked text is a control token."""
    return FIRST <= ord(character) <= LAST


class ControlTokens:
    """The control tokens of a tokenizer: its special tokens, and the added ones that are not whitespace."""

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder.items()
        self._tokenizer = tokenizer
        self._names = {i: str(token.content) for i, token in added if token.special or not token.content.isspace()}
        self._characters: dict[int, str] = {}
        """Given at first sight, so that those of the chat template, which is rendered first, always have one."""
        self._ids: dict[str, int] = {}

    def __contains__(self, token: int) -> bool:
        return token in self._names

    def _character(self, token: int) -> str:
        """The surrogate of a control token; its name, once all are given away to others."""
        if token not in self._characters:
            if len(self._characters) > LAST - FIRST:
                return self._names[token]
            self._characters[token] = chr(FIRST + len(self._characters))
            self._ids[self._characters[token]] = token
        return self._characters[token]

    def mark(self, ids: Iterable[int]) -> str:
        """The decoded ids, each control token as its surrogate."""
        parts: list[str] = []
        run: list[int] = []
        for token in ids:
            if token in self._names:
                parts += [self._decode(run), self._character(token)]
                run = []
            else:
                run.append(token)
        return "".join([*parts, self._decode(run)])

    def _decode(self, run: list[int]) -> str:
        if not run:
            return ""
        return str(self._tokenizer.decode(run, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def mark_text(self, text: str) -> str:
        """A template's own text, each name of a control token as its surrogate."""
        for token, name in sorted(self._names.items(), key=lambda item: -len(item[1])):
            if name in text:
                text = text.replace(name, self._character(token))
        return text

    def unmark(self, text: str) -> str:
        """The text with the names of its control tokens; a lone surrogate that is none, as JSON can spell, becomes U+FFFD."""
        return "".join(self._unmarked(character) if is_control(character) else character for character in text)

    def _unmarked(self, character: str) -> str:
        return self._names[self._ids[character]] if character in self._ids else "\ufffd"

    def drop(self, text: str) -> str:
        """The text without its control tokens."""
        return "".join(character for character in text if character not in self._ids)

    def find(self, marked: str) -> list[int]:
        """The ids of the control tokens in a marked text, in order."""
        return [self._ids[character] for character in marked if character in self._ids]
