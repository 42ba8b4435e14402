"""Means over seeds with confidence intervals for small samples, and what a difference between two settings can be said to show."""

import bisect
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from groupwise.evidence.student import critical, power, shift_needed, two_sided

FEWEST_SEEDS = 3
"""Fewer values have no interval. That of two is 12.7 standard errors to either side, and whether they are typical cannot be seen."""
LEVEL = 0.05
"""The probability with which any of a family of differences is called real where none is."""
POWER = 0.8
"""The probability with which a difference is to be found that is real."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95 % confidence interval."""

    mean: float
    half: float
    """Half the width of the interval; NaN for fewer than `FEWEST_SEEDS` values."""
    count: int
    """How many values the mean is of."""

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if math.isnan(self.half) else f"{self.mean:.3f} ± {self.half:.3f}"


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent values, one per seed, with Student's 95 % interval. Values that are not finite are left out."""
    values = [value for value in values if math.isfinite(value)]
    n = len(values)
    mean = statistics.fmean(values) if values else math.nan
    if n < FEWEST_SEEDS:
        return Interval(mean, math.nan, n)
    return Interval(mean, critical(LEVEL, n - 1) * deviation(values) / math.sqrt(n), n)


def deviation(values: Iterable[float]) -> float:
    """The sample standard deviation; of numbers so large that their squares are not finite too."""
    values = list(values)
    mean = statistics.fmean(values)
    return math.hypot(*(value - mean for value in values)) / math.sqrt(len(values) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How much larger the second of two settings is than the first, in the mean over seeds."""

    mean: float
    spreads: tuple[float, ...]
    """Standard deviations between seeds: of the differences seed by seed, or of each setting where the seeds are not the same."""
    counts: tuple[int, ...]
    """How many values each of `spreads` is of."""

    @property
    def paired(self) -> bool:
        return len(self.counts) == 1

    @property
    def error(self) -> float:
        """The standard error."""
        return math.hypot(*self._errors)

    @property
    def _errors(self) -> list[float]:
        """The standard error of each mean."""
        return [spread / math.sqrt(n) for spread, n in zip(self.spreads, self.counts, strict=True)]

    @property
    def freedom(self) -> int:
        """Degrees of freedom. Of two settings with seeds of their own they are those of the smaller one: with them Welch's t test
        errs with at most the probability it states, however different the variances (Mickey and Brown 1966). With Welch's own it
        errs in up to 7 % where 3 seeds are compared with 10, with a level of 5 %."""
        return min(self.counts) - 1

    @property
    def p(self) -> float:
        """The two-sided p-value of no difference."""
        if self.error == 0:
            return float(self.mean == 0)
        return two_sided(self.mean / self.error, self.freedom)

    @property
    def half(self) -> float:
        """Half the width of the 95 % interval."""
        return critical(LEVEL, self.freedom) * self.error

    @property
    def shape(self) -> float:
        """Welch's degrees of freedom, those of the estimated error's distribution."""
        shares = [(one / self.error) ** 2 for one in self._errors]
        return sum(shares) ** 2 / sum(share**2 / (n - 1) for share, n in zip(shares, self.counts, strict=True))

    def chance(self, level: float) -> float:
        """The probability that the p-value is below `level` where mean and spreads are the true ones: the power."""
        if self.error == 0:
            return float(self.mean != 0)
        return power(self.mean / self.error, self.shape, critical(level, self.freedom))


def difference(first: Mapping[int, float], second: Mapping[int, float], least: float = 0.0) -> Difference | None:
    """Compare two settings, each with one value per seed.

    Seed by seed over the seeds that both have, if those are enough, and most of those of the setting with fewer: runs of the same seed
    see the same problems, so pairing removes shared noise. Else mean by mean over all their seeds.

    Args:
        first: seed -> value; values that are not finite are left out.
        second: the same of the other setting.
        least: the smallest spread to believe in. A score of n problems has steps of 1/n, so that a few seeds can be equal by chance.

    Returns:
        None: fewer than `FEWEST_SEEDS` seeds.
    """
    one, other = ({seed: value for seed, value in of.items() if math.isfinite(value)} for of in (first, second))
    shared = one.keys() & other.keys()
    if len(shared) >= FEWEST_SEEDS and 2 * len(shared) > min(len(one), len(other)):
        changes = [other[seed] - one[seed] for seed in sorted(shared)]
        return Difference(mean=statistics.fmean(changes), spreads=(max(deviation(changes), least),), counts=(len(changes),))
    if min(len(one), len(other)) < FEWEST_SEEDS:
        return None
    return Difference(
        mean=statistics.fmean(other.values()) - statistics.fmean(one.values()),
        spreads=tuple(max(deviation(of.values()), least) for of in (one, other)),
        counts=(len(one), len(other)),
    )


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number by Holm's method (1979): those below 0.05 are all true with a probability of 95 %."""
    adjusted, largest = [0.0] * len(values), 0.0
    for place, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - place) * values[i]))
        adjusted[i] = largest
    return adjusted


def seeds_needed(found: Difference, level: float, most: int) -> int | None:
    """The smallest number of seeds of each setting with which the difference found, if it is the true one, has a p-value below
    `level` with a probability of `POWER`; None: more than `most`."""
    numbers = range(min(found.counts), most + 1)
    place = bisect.bisect_left(numbers, POWER, key=lambda n: _with_seeds(found, n).chance(level))
    return numbers[place] if place < len(numbers) else None


def _with_seeds(found: Difference, least: int) -> Difference:
    """The same with at least so many seeds of each setting."""
    return replace(found, counts=tuple(max(least, count) for count in found.counts))


def detectable(found: Difference, level: float) -> float:
    """The true difference that has a p-value below `level` with a probability of `POWER`, with the seeds there are."""
    return found.error * shift_needed(found.shape, critical(level, found.freedom), POWER) if found.error else 0.0


def wilson(share: float, count: float) -> tuple[float, float]:
    """The ends of the 95 % interval of a proportion of `count` independent trials (Wilson's score interval)."""
    share, z2 = min(max(share, 0.0), 1.0), 1.96**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = 1.96 * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def binomial(share: float, count: int) -> float:
    """Half the width of the 95 % interval of a proportion of `count` independent trials (Agresti and Coull)."""
    shrunk = (min(max(share, 0.0), 1.0) * count + 2) / (count + 4)
    return 1.96 * math.sqrt(shrunk * (1 - shrunk) / (count + 4))


def clustered_share(rates: Sequence[float], per_cluster: float = 1.0) -> tuple[float, float]:
    """The ends of the 95 % interval of a share that is measured in clusters: problems, each tried several times.

    Tries of one problem resemble each other, so that n problems of k tries hold less than n k independent ones. Wilson's score
    interval is taken with the effective number of tries, n p (1 - p) / (variance of the rates between problems): exactly n where
    each problem is tried once (Wilson's own), n k where problems do not differ (Korn and Graubard 1998, Wilson in place of
    Clopper and Pearson). It stays inside 0 to 1, and has a width where all rates are 0 or 1.

    Args:
        rates: the share in each cluster, 0 to 1.
        per_cluster: independent tries in a cluster, which bounds the effective number.
    """
    n = len(rates)
    if n == 0:
        return math.nan, math.nan
    share = statistics.fmean(rates)
    variance, independent = statistics.pvariance(rates, share), share * (1 - share)
    effective = (
        n * min(max(independent / variance, 1.0), per_cluster) if variance > 0 else n * (per_cluster if independent else 1)
    )
    return wilson(share, effective)
