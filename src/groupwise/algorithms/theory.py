"""Closed forms behind the papers' figures."""

import math


def steps_to_reach(start: float, target: float, clip_high: float) -> float:
    """Updates until a token's probability climbs from start to target when every one of them ends at the upper clip.

    log(target / start) / log(1 + clip_high): what the clip would allow, not what an optimiser does, since a clipped
    gradient stops pushing but does not hold the model weights back.
    """
    return math.log(target / start) / math.log1p(clip_high)


def probability_after(start: float, steps: float, clip_high: float) -> float:
    """min(1, start (1 + clip_high)^steps): the same climb, which ends at 1."""
    return min(1.0, start * math.exp(steps * math.log1p(clip_high)))


def upper_clip_is_inert_above(clip_high: float) -> float:
    """1 / (1 + clip_high): the old probability above which the ceiling (1 + clip_high) pi_old exceeds 1."""
    return 1 / (1 + clip_high)


def log10_product_bound(clip_high: float, tokens: int) -> float:
    """log10 of (1 + clip_high)^tokens, how far a sequence's ratio may drift when each token's is clipped alone."""
    return tokens * math.log1p(clip_high) / math.log(10)


def dead_group_probability(pass_rate: float, group_size: int) -> float:
    """p^G + (1 - p)^G: the chance that a group's answers are all right or all wrong, and teach nothing."""
    return pass_rate**group_size + (1 - pass_rate) ** group_size
