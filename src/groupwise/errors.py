"""The two ways a command can end badly, each with one clear message."""

from groupwise.algorithms.part import nearest as nearest


class UserError(Exception):
    """The user's input is wrong: exit code 2. The message names the place, what was wrong and the nearest right thing."""


class RunError(Exception):
    """A run failed on its way, for a reason that is not the user's input: exit code 1."""


DIVERGED = "the weights have diverged: a lower learning rate or more warm-up may help"
