"""What one optimiser step reports, and how several of a training step are combined."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from groupwise.algorithms.diagnostics import summarise
from groupwise.algorithms.loss import LARGEST
from groupwise.types import Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """Metrics of one optimiser step."""

    tokens: int
    """Trained tokens of the completions that were run: what `means` are means over."""
    skipped_tokens: int
    """Trained tokens of completions that were not run, because their advantages are all zero and nothing else would move them."""
    means: dict[str, float]
    """Means over tokens."""
    largest: dict[str, float]
    """Largest values over tokens."""
    step: dict[str, float]
    """Of the step as a whole: loss, gradient norm, the critic's."""
    latest: dict[str, float]
    """What only the last of several updates is asked for: learning rate, updates skipped so far."""
    sums: dict[str, list[float]] = field(default_factory=dict)
    """Sums over tokens and rows, in bins; see `groupwise.algorithms.diagnostics`."""


class TokenMetrics:
    """Accumulates metrics over micro-batches: losses are summed, means weighted by tokens, largest values kept."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.tokens = 0
        self._sums: dict[str, float] = {}
        self.largest: dict[str, float] = {}

    def add(self, loss: float, metrics: dict[str, Tensor], tokens: int) -> None:
        """`metrics`: of `policy_loss`, over so many tokens."""
        self.loss += loss
        self.tokens += tokens
        for name, value in metrics.items():
            if name in LARGEST:
                self.largest[name] = max(self.largest.get(name, -math.inf), float(value))
            else:
                self._sums[name] = self._sums.get(name, 0.0) + float(value) * tokens

    def merge(self, other: "TokenMetrics") -> None:
        """Add what another process has accumulated."""
        self.loss += other.loss
        self.tokens += other.tokens
        for name, value in other._sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        for name, value in other.largest.items():
            self.largest[name] = max(self.largest.get(name, -math.inf), value)

    def means(self) -> dict[str, float]:
        return {name: value / max(1, self.tokens) for name, value in self._sums.items()}


def combine(updates: Sequence[Update]) -> Metrics:
    """Metrics of a training step from those of its updates.

    Means go over the trained tokens of all completions that were run, whichever update ran them; NaN where there are none.
    """
    tokens = sum(update.tokens for update in updates)
    result: Metrics = {"tokens/measured": float(tokens), "tokens/skipped": float(sum(u.skipped_tokens for u in updates))}
    for name in dict.fromkeys(name for update in updates for name in update.means):
        parts = [(update.means[name], update.tokens) for update in updates if name in update.means]
        parts = [(value, count) for value, count in parts if math.isfinite(value)]
        measured = sum(count for _, count in parts)
        result[name] = sum(value * count for value, count in parts) / measured if measured else math.nan
    for name in dict.fromkeys(name for update in updates for name in update.largest):
        found = [update.largest[name] for update in updates if math.isfinite(update.largest.get(name, math.nan))]
        result[name] = max(found, default=math.nan)
    for name in dict.fromkeys(name for update in updates for name in update.step):
        found = [update.step[name] for update in updates if math.isfinite(update.step.get(name, math.nan))]
        result[name] = sum(found) / len(found) if found else math.nan
    result |= updates[-1].latest if updates else {}
    sums: dict[str, list[float]] = {}
    for update in updates:
        for name, values in update.sums.items():
            sums[name] = [a + b for a, b in zip(sums.get(name, [0.0] * len(values)), values, strict=True)]
    return {**result, **(summarise(sums) if sums else {}), **sums}
