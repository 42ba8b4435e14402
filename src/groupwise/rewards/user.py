"""The user's own reward function: `def reward(problem, completions) -> list of floats`, one per completion."""

import math
from collections.abc import Iterable, Sequence

from groupwise.errors import UserError
from groupwise.plugins import UserFunction
from groupwise.types import Problem, Score


def call_reward(function: UserFunction, problem: Problem, texts: Sequence[str], correct_above: float) -> list[Score]:
    """Scores from a user's reward function, checked.

    Raises:
        UserError: it raised, or did not return one finite number per completion.
    """
    name = function.reference
    try:
        values = function(problem, list(texts))
        values = list(values) if isinstance(values, Iterable) else values
    except Exception as error:  # the user's function may raise anything
        raise UserError(f"reward {name}: {type(error).__name__}: {error} (problem {problem.id!r})") from error
    try:
        rewards = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"reward {name}: returned {values!r}; expected a list of {len(texts)} numbers") from error
    if len(rewards) != len(texts):
        raise UserError(f"reward {name}: returned {len(rewards)} values for {len(texts)} completions; expected one for each")
    for i, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise UserError(f"reward {name}: returned {reward} for completion {i} of problem {problem.id!r}; must be finite")
    return [Score(reward=reward, correct=reward > correct_above) for reward in rewards]
