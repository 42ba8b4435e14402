"""Metrics over training steps as lines of a figure: one run's, or the mean over seeds with its 95 % interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from groupwise.evidence.naming import Group, run_id, run_names
from groupwise.evidence.phrases import Phrase
from groupwise.evidence.records import Steps, Values
from groupwise.evidence.runs import Run
from groupwise.evidence.shapes import Clock, Line, Mark
from groupwise.evidence.statistics import FEWEST_SEEDS, LEVEL
from groupwise.evidence.student import critical
from groupwise.text import shortened, visible

MOST_POINTS, FEWEST_POINTS = 4096, 64
"""Of a line."""
PAGE_POINTS = 600_000
"""Of all lines of a page: at most 6.5 MB of it, where each stands for several steps."""
LONG_GAP = 4
"""A line is broken where it has no value for longer than this many times its usual distance between values."""
EXACT_POWER = 22
"""Powers of ten up to this one are held exactly by a float."""
NEAR_TIE = 0.499999
"""A product farther than this from the nearest integer is so near to a tie that the rounding error of the product may decide it."""
CLOCK_POINTS = 256
MOST_MARKS, LONGEST_MARK = 40, 120
"""How many events are marked in a figure, and characters of each."""
MARKED_RUNS = 4
"""Events of more runs are not marked: no line could be told from the next."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric at each step that has it; NaN in `low` and `high`: no interval at that step."""

    steps: Steps
    values: Values
    low: Values | None = None
    high: Values | None = None

    @property
    def extent(self) -> tuple[float, float]:
        """The lowest and the highest value, as they are written."""
        return short(float(self.values.min())), short(float(self.values.max()))


def of_run(run: Run, metric: str) -> Curve:
    return Curve(*run.column(metric))


def mean_over_seeds(runs: Sequence[Run], metric: str, *, percent: bool = False, log: bool = False) -> Curve:
    """The mean over the seeds that have the metric at a step, with Student's 95 % interval where those are at least `FEWEST_SEEDS`.

    Args:
        percent: it is a share, so that the interval ends at 0 and 1.
        log: the interval is that of the mean's logarithm (delta method): it is above 0, so that a logarithmic axis holds it. There is
            none where the mean is not above 0.
    """
    having = [(run.seed, column) for run in runs if len((column := run.column(metric))[0])]
    columns = [column for _, column in having]
    steps = columns[0][0]
    if any(not np.array_equal(steps, own) for own, _ in columns[1:]):
        steps = np.unique(np.concatenate([own for own, _ in columns]))
    table = np.full((len(columns), len(steps)), np.nan)
    for row, (own, values) in zip(table, columns, strict=True):
        row[np.searchsorted(steps, own)] = values
    table = _by_seed(table, [seed for seed, _ in having])
    known = ~np.isnan(table)
    counts = known.sum(axis=0)
    mean = np.where(known, table, 0.0).sum(axis=0) / counts
    with np.errstate(over="ignore"):  # a damaged run may hold anything
        squares = (np.where(known, table - mean, 0.0) ** 2).sum(axis=0)
    factors = np.array([math.nan] * FEWEST_SEEDS + [critical(LEVEL, n - 1) for n in range(FEWEST_SEEDS, len(columns) + 1)])
    half = factors[counts] * np.sqrt(squares / np.maximum(counts - 1, 1) / counts)
    if log:
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            factor = np.where(mean > 0, np.exp(half / mean), np.nan)
            return Curve(steps, mean, mean / factor, mean * factor)
    low, high = mean - half, mean + half
    return Curve(steps, mean, *((np.maximum(low, 0.0), np.minimum(high, 1.0)) if percent else (low, high)))


def _by_seed(table: Values, seeds: Sequence[int]) -> Values:
    """A row for each seed, from a row for each run: runs of the same seed repeat each other more or less, and are no further seeds."""
    rows = []
    for seed in dict.fromkeys(seeds):
        own = table[[other == seed for other in seeds]]
        known = ~np.isnan(own)
        rows.append(np.where(known, own, 0.0).sum(axis=0) / np.where(known.any(axis=0), known.sum(axis=0), np.nan))
    return np.array(rows) if len(rows) < len(table) else table


def points_of(lines: int) -> int:
    """How many points each of so many lines may have: a power of two, so that another line seldom changes the others."""
    fair = max(FEWEST_POINTS, min(MOST_POINTS, PAGE_POINTS // max(1, lines)))
    return 1 << (fair.bit_length() - 1)


def thinned(values: Values, most: int) -> tuple[NDArray[np.int64], int]:
    """Choose at most `most` of the values so that peaks stay: the lowest and the highest of each stretch of values, or two of them
    where all are alike.

    Stretches have a power of two of values, and begin at multiples of it: another value changes the choice in the last stretch only,
    until all stretches become twice as long.

    Returns:
        The places of the chosen values, ascending, the first and the last among them; and the length of a stretch, 1: all are chosen.
    """
    count = len(values)
    if count <= most:
        return np.arange(count), 1
    stretch = 2
    while 2 * -(-count // stretch) + 2 > most:
        stretch *= 2
    rest = count // stretch * stretch
    starts, parts = np.arange(0, rest, stretch), values[:rest].reshape(-1, stretch)
    chosen = np.zeros(count, dtype=bool)
    chosen[[0, -1]] = True
    lowest, highest = parts.argmin(axis=1), parts.argmax(axis=1)
    chosen[starts + lowest] = chosen[starts + np.where(highest == lowest, stretch - 1, highest)] = True
    if rest < count:
        chosen[[rest + int(values[rest:].argmin()), rest + int(values[rest:].argmax())]] = True
    return np.flatnonzero(chosen), stretch


def line(
    curve: Curve, *, id: str, setting: str, run: str | None, label: Phrase, dash: int, seeds: int, most: int, broken: bool
) -> Line:
    """A curve as JSON, of at most `most` points.

    Args:
        broken: whether it ends where it has no value for long, and begins anew: a point without a value stands in the gap.
    """
    chosen, stretch = thinned(curve.values, most)
    places, gaps = _gaps(curve.steps if broken else curve.steps[:0], chosen)
    apart = round((curve.steps[-1] - curve.steps[0]) / (len(curve.steps) - 1)) if stretch > 1 else 1
    points = [None if part is None else part[chosen] for part in (curve.values, curve.low, curve.high)]
    points.append(means_around(curve.values, chosen, stretch) if stretch > 1 else None)
    values, low, high, means = (
        None if part is None or np.isnan(part).all() else numbers(np.insert(part, places, np.nan)) for part in points
    )
    steps: list[int] = np.insert(curve.steps[chosen], places, gaps).tolist()
    return {
        "id": id,
        "setting": setting,
        "run": run,
        "label": label.as_json(),
        "dash": dash,
        "steps": steps,
        "values": values or [],
        "low": low,
        "high": high,
        "means": means,
        "seeds": seeds,
        "stretch": stretch * max(1, apart),
    }


def means_around(values: Values, chosen: NDArray[np.int64], stretch: int) -> Values:
    """For each chosen value the mean of its stretch: smoothing the chosen ones would show the middle between extremes."""
    starts = np.arange(0, len(values), stretch)
    means: Values = np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values)))
    return means[chosen // stretch]


def _gaps(steps: Steps, chosen: NDArray[np.int64]) -> tuple[NDArray[np.intp], Steps]:
    """The places among the chosen points before which a line is broken, and the steps of its breaks."""
    distances = np.diff(steps)
    if len(distances) < LONG_GAP:
        return np.empty(0, dtype=np.intp), np.empty(0, dtype=np.int64)
    before = np.flatnonzero(distances > LONG_GAP * np.median(distances))
    places, first = np.unique(np.searchsorted(chosen, before, side="right"), return_index=True)
    return places, steps[before[first]] + 1


def numbers(values: Values | Sequence[float]) -> list[float | None]:
    """Numbers as a page gets them, of five significant digits: a plot shows no more, and the page is half the size. None: not known."""
    shown = rounded(np.asarray(values, dtype=np.float64))
    found: list[float | None] = shown.tolist()
    for place in np.flatnonzero(~np.isfinite(shown)).tolist():
        found[place] = None
    return found


def rounded(values: Values) -> Values:
    """To five significant digits; each is the number nearest to these digits, which is written with no more of them."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        digits = 4 - np.floor(np.log10(np.abs(values)))
        power = 10.0 ** np.abs(np.nan_to_num(digits, nan=0.0, posinf=0.0, neginf=0.0))
        scaled = np.where(digits >= 0, values * power, values / power)
        digits_only = np.rint(scaled)
        found = np.where(digits >= 0, digits_only / power, digits_only * power)
        # Powers and digits are held exactly then, so that the division rounds once; a tie is left to Python's own formatting.
        exact = (np.abs(digits) <= EXACT_POWER) & (np.abs(scaled - digits_only) < NEAR_TIE)
    for place in np.flatnonzero(~exact & np.isfinite(values) & (values != 0)).tolist():
        found[place] = float(f"{values[place]:.5g}")
    return np.where(values == 0, 0.0, found)


def short(value: float) -> float:
    """One number of five significant digits."""
    return float(f"{value:.5g}")


def clock(runs: Sequence[Run]) -> Clock:
    """Completions and seconds by step, means over the runs. Where runs have ended, the others' steps continue the mean."""
    spent = [run.spent() for run in runs]
    steps = (
        max((own for own, _, _ in spent), key=len) if len(spent) == 1 else np.unique(np.concatenate([own for own, _, _ in spent]))
    )
    totals = []
    for kind in (1, 2):
        gained, counts = np.zeros(len(steps)), np.zeros(len(steps))
        for one in spent:
            places = np.searchsorted(steps, one[0])
            gained[places] += np.diff(one[kind], prepend=0.0)
            counts[places] += 1
        totals.append((gained / counts).cumsum())
    stretch = 1
    while len(steps) // stretch > CLOCK_POINTS:
        stretch *= 2
    chosen = np.unique(np.append(np.arange(0, len(steps), stretch), len(steps) - 1))
    completions, seconds = (rounded(total[chosen]).tolist() for total in totals)
    return {"steps": steps[chosen].tolist(), "completions": completions, "seconds": seconds}


def marks(groups: Sequence[Group]) -> list[Mark]:
    """Where runs noted warnings and faults, and where their settings were changed, at the steps that are recorded."""
    names, found = run_names(groups), []
    if len(names) > MARKED_RUNS:
        return []
    for group in groups:
        for run in group.runs:
            beginning = f"{names[run_id(run)]}: " if len(names) > 1 else ""
            noted = [(event.step, event.text or event.name) for event in run.events if event.kind != "note"]
            noted += [(segment.first_step, ", ".join(segment.changed)) for segment in run.segments if segment.changed]
            found += [(step, beginning + text) for step, text in noted if step <= run.last_step]
    shown = sorted(dict.fromkeys(found))
    every = max(1, -(-len(shown) // MOST_MARKS))
    return [{"step": step, "text": visible(shortened(text, LONGEST_MARK))} for step, text in shown[::every]]
