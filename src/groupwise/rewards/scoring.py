"""The rewards of a task: several, each with its weight, as one score for each completion."""

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from groupwise.environments.hosting import Lent
from groupwise.rewards.base import Progress, Rated, Reward
from groupwise.types import Completion, Problem, Score


@dataclass(slots=True, kw_only=True)
class Rewards:
    """Scores completions by the weighted sum of rewards."""

    rewards: Sequence[Reward]
    weights: Sequence[float]
    correct_above: float | None
    """A completion is correct when its reward is above this; None: by the only checker among the rewards, if there is one."""
    progress: Progress = field(default_factory=Progress)

    async def score(self, problem: Problem, completions: Sequence[Completion], environments: Lent | None = None) -> list[Score]:
        """A score for each completion: failed where one of the rewards failed, or none applies."""
        if not self.rewards:
            return [Score(reward=0.0)] * len(completions)
        calls = [reward.rate(problem, completions, self.progress, environments) for reward in self.rewards]
        rated = await asyncio.gather(*calls)
        return [self._combine(parts) for parts in zip(*rated, strict=True)]

    def _combine(self, parts: Sequence[Rated]) -> Score:
        logged: dict[str, Any] = {
            "extra": {key: value for part in parts for key, value in part.extra.items()},
            "metrics": {key: value for part in parts for key, value in part.metrics.items()},
        }
        for part in parts:
            if part.failure is not None:
                return Score(reward=math.nan, failure=part.failure, detail=part.detail, **logged)
        if all(part.reward is None for part in parts):
            return Score(reward=math.nan, failure="none", detail="no reward applies: all are None", **logged)
        if sum(bool(part.steps) for part in parts) > 1:
            return Score.failed("wrong type", "more than one reward gives rewards of steps")
        reward = sum(weight * (part.reward or 0.0) for weight, part in zip(self.weights, parts, strict=True))
        if not math.isfinite(reward):
            return Score.failed("not finite", f"the weighted sum is {reward}")
        components, weights = self._components(parts)
        alone = len(parts) == 1 and self.weights[0] == 1.0
        return Score(
            reward=reward,
            correct=self._correct(reward, parts),
            verdict=parts[0].verdict if alone else None,
            components=components,
            weights=weights,
            steps=tuple(
                (end, weight * value) for weight, part in zip(self.weights, parts, strict=True) for end, value in part.steps
            ),
            **logged,
        )

    def _components(self, parts: Sequence[Rated]) -> tuple[dict[str, float], dict[str, float]]:
        """The rewards by name and the weight of each; of the only one its own parts, where it has any."""
        components: dict[str, float] = {}
        weights: dict[str, float] = {}
        names = unique([reward.name for reward in self.rewards])
        for reward, weight, part in zip(names, self.weights, parts, strict=True):
            prefix = "" if len(parts) == 1 else f"{reward}."
            named = {prefix + name: value for name, value in part.components.items()}
            if not named and part.reward is not None and (len(parts) > 1 or weight != 1.0):
                named = {reward: part.reward}
            components |= named
            weights |= dict.fromkeys(named, weight) if weight != 1.0 else {}
        return components, weights

    def _correct(self, reward: float, parts: Sequence[Rated]) -> bool | None:
        if self.correct_above is not None:
            return reward > self.correct_above
        verdicts = [part.verdict for part in parts if part.verdict is not None]
        return verdicts[0] == "correct" if len(verdicts) == 1 else None


def unique(names: Sequence[str]) -> list[str]:
    """The names, a number behind each that was there before."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return found
