"""What a user's reward returned, completion by completion, checked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from groupwise.rewards.base import Rated, all_failed
from groupwise.workers import Other, Reply

STEPS = "steps"
"""The entry of a mapping that holds rewards of steps."""


def rate_values(values: Any, lengths: Sequence[int]) -> list[Rated]:
    """Rewards from what came back: a list with a number, None or a mapping for each completion.

    Args:
        lengths: characters of each completion.
    """
    count = len(lengths)
    if not isinstance(values, list):
        return all_failed(count, "wrong type", f"returned {_kind(values)}; expected a list of {count} numbers")
    if len(values) != count:
        return all_failed(count, "wrong count", f"returned {len(values)} values for {count} completions; expected one for each")
    return [rate_value(value, length) for value, length in zip(values, lengths, strict=True)]


def rate_value(value: Any, length: int) -> Rated:
    """The reward of one completion of so many characters: a number, None, or numbers by name, whose sum it is, with "steps" as
    a list of [end, reward]."""
    if value is None:
        return Rated()
    if isinstance(value, Mapping):
        return _rate_mapping(value, length)
    if not isinstance(value, int | float):
        return Rated(failure="wrong type", detail=f"returned {_kind(value)} for a completion; expected a number")
    if not _is_finite(value):
        shown = "an integer of hundreds of digits" if isinstance(value, int) else value
        return Rated(failure="not finite", detail=f"returned {shown} for a completion")
    return Rated(reward=float(value))


def _rate_mapping(value: Mapping[str, Any], length: int) -> Rated:
    named = {name: part for name, part in value.items() if name != STEPS}
    for name, part in named.items():
        if isinstance(part, Mapping):
            return Rated(failure="wrong type", detail=f"{name}: returned a mapping for a completion")
    parts = {name: rate_value(part, length) for name, part in named.items()}
    for name, part in parts.items():
        if part.failure is not None:
            return Rated(failure=part.failure, detail=f"{name}: {part.detail}")
    components = {name: part.reward for name, part in parts.items() if part.reward is not None}
    steps = value.get(STEPS, [])
    if (problem := _problem_of(steps, length)) is not None:
        return Rated(failure="wrong type", detail=f"steps: {problem}")
    if not components:
        return Rated()
    found = Rated(
        reward=sum(components.values()),
        components=components if len(components) > 1 or STEPS not in value else {},
        steps=tuple((int(end), float(reward)) for end, reward in steps),
    )
    return found if math.isfinite(found.reward or 0.0) else Rated(failure="not finite", detail="the sum is not finite")


def _problem_of(steps: Any, length: int) -> str | None:
    """What is wrong with rewards of steps."""
    expected = "expected a list of [end, reward], the end in characters"
    if not isinstance(steps, list):
        return f"returned {_kind(steps)}; {expected}"
    before = 0
    for step in steps:
        numbers = isinstance(step, list) and len(step) == 2 and all(isinstance(x, int | float) and _is_finite(x) for x in step)
        if not numbers:
            return f"{_shown(step)}; {expected}"
        if step[0] != int(step[0]) or not before <= step[0] <= length:
            return f"the end {step[0]:g} after {before}, in a completion of {length} characters"
        before = step[0]
    return None


def with_logs(rated: Sequence[Rated], reply: Reply) -> list[Rated]:
    """The rewards with what was logged beside them: `log_extra(column, values)` and `log_metric(name, value)`."""
    count = len(rated)
    for column, values in reply.extra.items():
        if len(values) != count:
            detail = f"log_extra({column!r}) was given {len(values)} values for {count} completions; expected one for each"
            return all_failed(count, "wrong count", detail)
    metrics = {}
    for name, values in reply.metrics.items():
        if not all(isinstance(value, int | float) and _is_finite(value) for value in values):
            return all_failed(count, "wrong type", f"log_metric({name!r}) was given {_shown(values)}; expected a finite number")
        metrics[name] = sum(values) / len(values)
    return [
        replace(one, extra={column: values[i] for column, values in reply.extra.items()}, metrics=metrics)
        for i, one in enumerate(rated)
    ]


def _is_finite(value: float) -> bool:
    """Whether a number is finite, also as a float."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.200}"
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists nested too deep
        return _kind(value)


def _kind(value: Any) -> str:
    """What a value is, in words."""
    name = value.type_name if isinstance(value, Other) else type(value).__name__
    if name == "coroutine":
        return "a coroutine that was never awaited"
    return "None" if value is None else f"a value of type {name}"
