"""What a reward is asked, and what it says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from groupwise.environments.hosting import Lent
from groupwise.types import Completion, Problem, Verdict


@dataclass(frozen=True, slots=True)
class Progress:
    """How far training has come, for rewards that depend on it."""

    step: int = 0
    """Training steps that are done."""
    steps: int = 0
    """Of how many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rated:
    """What one reward says of one completion."""

    reward: float | None = None
    """None: it does not apply to this completion."""
    verdict: Verdict | None = None
    """Set where the reward is nothing but a verdict: 1 for "correct", else 0."""
    components: Mapping[str, float] = field(default_factory=dict)
    """The parts of it that have names; the reward is their sum."""
    steps: tuple[tuple[int, float], ...] = ()
    """(end, reward) of each step, the end in characters of the text."""
    failure: str | None = None
    """Why there is no reward."""
    detail: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What it logged of this completion, by column."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Numbers that it logged."""


class Reward(Protocol):
    """Judges the completions of a problem."""

    @property
    def name(self) -> str: ...

    async def rate(
        self, problem: Problem, completions: Sequence[Completion], progress: Progress, environments: Lent | None = None
    ) -> Sequence[Rated]:
        """One entry for each completion. It raises nothing: what goes wrong is a failure of the completions concerned.

        Args:
            environments: the instances in which the completions came about; None: there is no environment class.
        """
        ...


def all_failed(count: int, failure: str, detail: str) -> list[Rated]:
    return [Rated(failure=failure, detail=detail)] * count
