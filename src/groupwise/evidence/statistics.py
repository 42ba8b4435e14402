"""Means over seeds with confidence intervals for small samples."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_T_975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09, 2.09)
"""97.5 % quantiles of Student's t distribution for 1, 2, 3, ... degrees of freedom: two-sided 95 % intervals."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its 95 % confidence interval."""

    mean: float
    half: float
    """Half the width of the interval; NaN for fewer than two values."""
    count: int
    """How many values the mean is of."""

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if math.isnan(self.half) else f"{self.mean:.3f} ± {self.half:.3f}"


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent values, one per seed, with Student's 95 % interval. Values that are not finite are left out."""
    values = [value for value in values if math.isfinite(value)]
    n = len(values)
    if n < 2:
        return Interval(values[0] if values else math.nan, math.nan, n)
    t = _T_975[n - 2] if n - 2 < len(_T_975) else 1.96 + 2.4 / (n - 1)  # within 0.01 of the quantile
    return Interval(statistics.mean(values), t * statistics.stdev(values) / math.sqrt(n), n)


def paired(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The mean of second - first, paired by seed: runs of the same seed see the same problems, so pairing removes shared noise."""
    return interval([b - a for a, b in zip(first, second, strict=True)])


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
    z2 = 1.96**2
    centre = (share + z2 / (2 * effective)) / (1 + z2 / effective)
    half = 1.96 * math.sqrt(independent / effective + z2 / (4 * effective**2)) / (1 + z2 / effective)
    return max(0.0, centre - half), min(1.0, centre + half)
