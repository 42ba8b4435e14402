"""Reasoning apart from what a turn says: calls inside of it are thoughts, not calls."""

import re
from collections.abc import Callable
from dataclasses import dataclass

from groupwise.models.control_tokens import ControlTokens, is_control

MARKERS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
"""What opens and closes reasoning, as control tokens or as text: the chat template may know of it, or a prompt ask for it."""


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Finds reasoning in marked text."""

    pairs: tuple[tuple[str, str], ...]
    """Marked openings and closings."""
    places: re.Pattern[str]
    """Where one of them stands, or a call may begin."""

    @classmethod
    def of(cls, control: ControlTokens, call: str | None) -> "Reasoning":
        """The markers as this tokenizer has them, and the marked text that begins a call, if there are calls."""
        pairs = tuple((control.mark_text(opening), control.mark_text(closing)) for opening, closing in MARKERS)
        words = [*(marker for pair in pairs for marker in pair), *([call] if call else [])]
        return cls(pairs, re.compile("|".join(re.escape(word) for word in words)))

    def opened(self, before: str) -> str | None:
        """What closes the reasoning that the marked text before a turn leaves open; None: it leaves none open.

        Only what follows the last control token other than the markers counts: the template's opening of the turn.
        """
        markers = {marker for pair in self.pairs for marker in pair}
        starts = [i + 1 for i, character in enumerate(before) if is_control(character) and character not in markers]
        opening_of_turn = before[starts[-1] if starts else 0 :]
        for opening, closing in self.pairs:
            if opening_of_turn.rfind(opening) > opening_of_turn.rfind(closing):
                return closing
        return None

    def split(self, text: str, closing: str | None, call_end: Callable[[str, int], int | None]) -> tuple[str, str]:
        """(reasoning, the rest) of a marked turn. Reasoning that is not closed goes to the end.

        Args:
            closing: what closes the reasoning that the turn began in, or None.
            call_end: where the call at a place ends, None if there is none: markers inside of arguments are arguments.
        """
        thoughts: list[str] = []
        rest: list[str] = []
        at = 0
        while True:
            if closing is not None:
                end = text.find(closing, at)
                thoughts.append(text[at:] if end < 0 else text[at:end])
                if end < 0:
                    return "\n".join(thoughts), "\n".join(rest)
                at, closing = end + len(closing), None
            start, marker, closing = self._next(text, at, call_end)
            if marker in {pair[1] for pair in self.pairs}:  # closed, but never opened: all before it was reasoning
                thoughts, rest = [*thoughts, *rest, text[at:start]], []
                at = start + len(marker)
                continue
            rest.append(text[at:start])
            if not marker:
                return "\n".join(thoughts), "\n".join(rest)
            at = start + len(marker)

    def _next(self, text: str, at: int, call_end: Callable[[str, int], int | None]) -> tuple[int, str, str | None]:
        """The next marker outside of calls: its place, itself, and what closes it if it opens reasoning."""
        closings: dict[str, str | None] = dict.fromkeys((closing for _, closing in self.pairs), None)
        closings.update(dict(self.pairs))
        while (found := self.places.search(text, at)) is not None:
            if found[0] in closings:
                return found.start(), found[0], closings[found[0]]
            at = call_end(text, found.start()) or found.end()
        return len(text), "", None
