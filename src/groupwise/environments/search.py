"""The environment of the task `search`: a hidden number, found by asking whether it is higher or lower."""

import math
from typing import Any

GUESSES = 6
"""How often a number may be guessed."""


class Search:
    """A hidden number. Each guess is answered by "higher", "lower" or "found"."""

    def __init__(self) -> None:
        self.hidden = self.low = self.high = self.guesses = 0
        self.size = 1
        self.found = False
        self.turn_reward: float | None = None
        """What the last turn gained: the share of the search that it did, in bits. Those of a search that succeeds sum to 1."""

    def reset(self, *, low: int, high: int, hidden: int, **row: Any) -> None:
        """Hide a number of low to high."""
        self.hidden, self.low, self.high = hidden, low, high
        self.size = high - low + 1
        self.guesses, self.found, self.turn_reward = 0, False, None

    def guess(self, number: int) -> str:
        """Guess the hidden number.

        Args:
            number: The guess.
        """
        if self.guesses == GUESSES or self.found:
            raise ValueError("no guesses left")
        number = int(number)
        self.guesses += 1
        before = self.high - self.low + 1
        if number == self.hidden:
            self.low = self.high = self.hidden
            self.found = True
        elif number < self.hidden:
            self.low = max(self.low, number + 1)
        else:
            self.high = min(self.high, number - 1)
        gained = math.log2(before / (self.high - self.low + 1)) / math.log2(self.size)
        self.turn_reward = gained + (self.turn_reward or 0.0)
        if self.found:
            return "found"
        if self.guesses == GUESSES:
            return "no guesses left"
        return "higher" if number < self.hidden else "lower"

    def get_reward(self) -> float:
        """1 if the number was found."""
        return float(self.found)
