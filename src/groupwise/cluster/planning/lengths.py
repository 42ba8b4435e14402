"""How long completions are: as in a run, or lognormal."""

import math

import numpy as np
from numpy.typing import NDArray

from groupwise.cluster.planning.simulation import Lengths
from groupwise.evidence.runs import Run


def lognormal(mean: float, variation: float, most: int) -> Lengths:
    """
    Args:
        mean: of the distribution before it is cut off, in tokens.
        variation: its standard deviation over its mean; 0: all are equally long.
        most: longer ones are cut off.
    """
    spread = math.log1p(variation**2)

    def draw(random: np.random.Generator, count: int) -> NDArray[np.int64]:
        found = random.lognormal(math.log(mean) - spread / 2, math.sqrt(spread), count)
        return np.clip(np.rint(found), 1, most).astype(np.int64)

    return draw


def as_found(lengths: NDArray[np.int64]) -> Lengths:
    """Drawn from these, with replacement."""

    def draw(random: np.random.Generator, count: int) -> NDArray[np.int64]:
        return random.choice(lengths, count)

    return draw


def lengths_of(run: Run) -> NDArray[np.int64] | None:
    """Of the completions whose tokens a run has written last; None: of none."""
    steps = run.token_steps()
    if not steps or (table := run.readable_tokens(steps[-1])) is None:
        return None
    counted = table.group_by(["group", "row"]).aggregate([("token", "count")])
    found = counted.column("token_count").to_numpy().astype(np.int64)
    return found if len(found) else None
