"""The user's own reward function: `def reward(problem, completions) -> list`, one float per completion.

Or one mapping of floats per completion, {"right": 1.0, "short": 0.2}: the reward is their sum, and each is recorded.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from groupwise.errors import UserError
from groupwise.plugins import UserFunction
from groupwise.types import Problem, Score


def call_reward(function: UserFunction, problem: Problem, texts: Sequence[str], correct_above: float | None) -> list[Score]:
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
        parts = [{key: float(part) for key, part in value.items()} if isinstance(value, Mapping) else {} for value in values]
        rewards = [sum(part.values()) if part else float(value) for value, part in zip(values, parts, strict=True)]
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"reward {name}: returned {values!r}; expected a list of {len(texts)} numbers") from error
    if len(rewards) != len(texts):
        raise UserError(f"reward {name}: returned {len(rewards)} values for {len(texts)} completions; expected one for each")
    for i, reward in enumerate(rewards):
        if not math.isfinite(reward):
            raise UserError(f"reward {name}: returned {reward} for completion {i} of problem {problem.id!r}; must be finite")
    return [
        Score(reward=reward, correct=None if correct_above is None else reward > correct_above, components=part)
        for reward, part in zip(rewards, parts, strict=True)
    ]
