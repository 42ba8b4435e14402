"""Student's t distribution, central and noncentral, to double precision: probabilities, quantiles, power."""

import math
from functools import lru_cache

_STEPS = 200
"""Intervals of Simpson's rule. Eight times as many change no power by more than 1e-6."""


def two_sided(t: float, freedom: float) -> float:
    """The probability that |T| exceeds |t|, for any positive degrees of freedom: a two-sided p-value."""
    if math.isinf(t):
        return 0.0
    square = t * t
    return _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + square), square / (freedom + square))


@lru_cache(maxsize=4096)
def critical(level: float, freedom: float) -> float:
    """The t that |T| exceeds with probability `level`: 4.303 for 0.05 and two degrees of freedom."""
    low, high = 0.0, 2.0
    while two_sided(high, freedom) > level:
        low, high = high, 2 * high
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if two_sided(middle, freedom) > level else (low, middle)
    return high


@lru_cache(maxsize=4096)
def power(shift: float, freedom: float, bound: float) -> float:
    """The probability that |T| exceeds `bound` where T is noncentral.

    T = (Z + shift) / U with Z standard normal and U² an independent χ² over its degrees of freedom. The integral over U is
    P(|Z + shift| > bound U), by Simpson's rule.

    Args:
        shift: the noncentrality, the true difference in standard errors.
        freedom: degrees of freedom of U.
        bound: the critical value, of whichever test.
    """
    spread = 12 / math.sqrt(2 * freedom)  # U has mean about 1 and standard deviation about 1 / sqrt(2 freedom)
    low, high = max(0.0, 1 - spread), min(1 + spread, (abs(shift) + 9) / bound)  # beyond, P(|Z + shift| > bound U) is below 1e-18
    if high <= low:
        return 0.0
    width = (high - low) / _STEPS
    constant = math.log(2) + freedom / 2 * math.log(freedom / 2) - math.lgamma(freedom / 2)
    total = 0.0
    for i in range(_STEPS + 1):
        u = low + i * width
        log_power = (freedom - 1) * math.log(u) if u > 0 else (0.0 if freedom == 1 else -math.inf)
        density = math.exp(constant + log_power - freedom * u * u / 2)
        weight = 1 if i in (0, _STEPS) else 4 if i % 2 else 2
        total += weight * density * (_normal(shift - bound * u) + _normal(-shift - bound * u))
    return min(1.0, total * width / 3)


@lru_cache(maxsize=4096)
def shift_needed(freedom: float, bound: float, chance: float) -> float:
    """The noncentrality with which |T| exceeds `bound` with a probability of `chance`; accurate to 1e-6 of it."""
    low, high = 0.0, bound
    while power(high, freedom, bound) < chance:
        low, high = high, 2 * high
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle, freedom, bound) < chance else (low, middle)
    return high


def _normal(z: float) -> float:
    """The standard normal distribution function."""
    return math.erfc(-z / math.sqrt(2)) / 2


def _incomplete_beta(a: float, b: float, x: float, rest: float) -> float:
    """The regularised incomplete beta function I_x(a, b), with `rest` = 1 - x given apart so that neither end loses digits."""
    if x <= 0 or rest <= 0:
        return 0.0 if x <= 0 else 1.0
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(rest))
    if x < (a + 1) / (a + b + 2):
        return front * _continued_fraction(a, b, x) / a
    return 1 - front * _continued_fraction(b, a, rest) / b


def _continued_fraction(a: float, b: float, x: float) -> float:
    """Lentz's evaluation of the continued fraction of I_x(a, b) (DLMF 8.17.22), which converges fast for x < (a + 1) / (a + b + 2)."""
    tiny = 1e-300
    c, d = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1), tiny)
    value = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for factor in (even, odd):
            d = 1 / _away_from_zero(1 + factor * d, tiny)
            c = _away_from_zero(1 + factor / c, tiny)
            value *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return value


def _away_from_zero(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny
