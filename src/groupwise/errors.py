"""The two ways a command can end badly, each with one clear message."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The user's input is wrong: exit code 2. The message names the place, what was wrong and the nearest right thing."""


class RunError(Exception):
    """A run failed on its way, for a reason that is not the user's input: exit code 1."""


DIVERGED = "the weights have diverged: a lower learning rate or more warm-up may help"


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint to end a message with: "; did you mean 'x'?", or the list of known words when none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""
