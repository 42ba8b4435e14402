"""Figures whose x axis is not the training step: tokens by their probability, completions by their length."""

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import pyarrow.compute as pc

from groupwise.algorithms.diagnostics import LENGTH_EDGES, PROBABILITY_EDGES
from groupwise.errors import UserError
from groupwise.evidence.lines import numbers, short
from groupwise.evidence.naming import Group
from groupwise.evidence.phrases import phrase
from groupwise.evidence.reading import read_tokens
from groupwise.evidence.runs import Run
from groupwise.evidence.shapes import Figure, Series
from groupwise.text import shortened, visible

MOST_TOKENS, FEWEST_TOKENS, PAGE_TOKENS = 1200, 100, 12_000
"""About how many tokens a scatter plot shows of a setting, and of all together."""
LONGEST_TOKEN = 60
"""Characters of a token in a tooltip."""
FEWEST_COMPLETIONS = 20
"""A mean square over fewer is not drawn."""


def distributions(groups: Sequence[Group]) -> list[Figure]:
    """Those for which the runs recorded data."""
    return [made for make in (_clipping, _ratios, _log_ratios) if (made := make(groups)) is not None]


def _clipping(groups: Sequence[Group]) -> Figure | None:
    """Which share of the tokens of each probability each bound clipped."""
    series: list[Series] = []
    for group in groups:
        counts = [
            _summed([run.total(f"by_probability/{name}") for run in group.runs])
            for name in ("tokens", "clipped_low", "clipped_high")
        ]
        tokens, low, high = counts
        if all(counts):
            for dash, (key, clipped) in enumerate((("low", low), ("high", high))):
                shares = [number / of if of > 0 else math.nan for number, of in zip(clipped, tokens, strict=True)]
                series.append(
                    {
                        "id": f"{group.id}/{key}",
                        "setting": group.id,
                        "label": phrase("figures", f"clip-by-probability.{key}").as_json(),
                        "dash": dash,
                        "x": list(range(len(shares))),
                        "y": numbers(shares),
                    }
                )
    if not any(share for one in series for share in one["y"]):
        return None
    edges = [0.0, *PROBABILITY_EDGES, 1.0]
    figure = _figure("clip-by-probability", "bars", series, percent=True)
    figure["bins"] = [f"{low:g}–{high:g}" for low, high in itertools.pairwise(edges)]
    return figure


def _ratios(groups: Sequence[Group]) -> Figure | None:
    """Tokens of a recorded step, one in the middle, of the first run of each setting."""
    series: list[Series] = []
    most, steps = max(FEWEST_TOKENS, min(MOST_TOKENS, PAGE_TOKENS // max(1, len(groups)))), set()
    for group in groups:
        recorded = group.runs[0].token_steps()
        step = recorded[len(recorded) // 2] if recorded else 0
        points = _tokens(group.runs[0], step, most) if recorded else None
        if points is not None and points[0]:
            steps.add(step)
            series.append(
                {
                    "id": group.id,
                    "setting": group.id,
                    "label": phrase("figures", "ratio.tokens").as_json(),
                    "dash": 0,
                    "x": points[0],
                    "y": points[1],
                    "tips": points[2],
                    "flags": points[3],
                }
            )
    if not series:
        return None
    figure = _figure("ratio", "dots", series, log=True)
    shown = sorted(steps)
    figure["note"] = phrase(
        "figures", "step_shown", steps=f"{shown[0]:,}" if len(shown) == 1 else f"{shown[0]:,}–{shown[-1]:,}"
    ).as_json()
    return figure


Points = tuple[list[float], list[float], list[str], list[bool]]


def _tokens(run: Run, step: int, most: int) -> Points | None:
    """Of about `most` tokens of a step, evenly spaced: π_old, ratio, text, whether it was clipped; None: the file cannot be read."""
    path = run.path / "tokens" / f"step-{step:06d}.parquet"
    try:
        return _sampled(path, path.stat().st_mtime_ns, most)
    except (UserError, OSError):
        run.readable_tokens(step)  # which notes why it cannot
        return None


@lru_cache(maxsize=64)
def _sampled(path: Path, modified: int, most: int) -> Points:
    """See `_tokens`; a live page draws the same tokens after each step."""
    table = read_tokens(path)
    table = table.filter(pc.and_(pc.is_valid(table["ratio"]), pc.is_valid(table["old_logprob"])))
    every = max(1, len(table) // most)
    columns = [table[name].to_pylist()[::every] for name in ("old_logprob", "ratio", "clipped", "text", "advantage")]
    old, ratio, clipped, text, advantage = columns
    return (
        [short(math.exp(value)) for value in old],
        [short(min(max(value, 1e-6), 1e6)) for value in ratio],
        [visible(shortened(word, LONGEST_TOKEN)) + _signed(value) for word, value in zip(text, advantage, strict=True)],
        [bool(value) for value in clipped],
    )


def _signed(advantage: float | None) -> str:
    return "" if advantage is None else f" (A = {advantage:.3g})".replace("-", "−")


def _log_ratios(groups: Sequence[Group]) -> Figure | None:
    """How large the mean and the sum of a completion's log ratios are, by its length."""
    starts, series = [1, *LENGTH_EDGES], list[Series]()
    for group in groups:
        counts = _summed([run.total("by_length/rows") for run in group.runs])
        for dash, (key, name) in enumerate((("mean", "mean_square"), ("sum", "sum_square"))):
            squares = _summed([run.total(f"by_length/{name}") for run in group.runs])
            points = [
                (start * 1.4, math.sqrt(square / count))  # the geometric middle of a range that doubles
                for start, count, square in zip(starts, counts, squares, strict=False)
                if count >= FEWEST_COMPLETIONS and square > 0
            ]
            if points:
                series.append(
                    {
                        "id": f"{group.id}/{key}",
                        "setting": group.id,
                        "label": phrase("figures", f"spread-length.{key}").as_json(),
                        "dash": dash,
                        "x": [short(length) for length, _ in points],
                        "y": numbers([size for _, size in points]),
                    }
                )
    if len({length for one in series for length in one["x"]}) < 2:
        return None
    figure = _figure("spread-length", "curve", series, log=True)
    figure["x"]["log"] = True
    return figure


def _figure(id: str, kind: str, series: list[Series], *, percent: bool = False, log: bool = False) -> Figure:
    title, caption, x, y = (phrase("figures", f"{id}.{part}").as_json() for part in ("title", "caption", "x", "y"))
    return {
        "id": id,
        "group": "policy",
        "title": title,
        "caption": caption,
        "kind": kind,  # type: ignore[typeddict-item]
        "x": {"title": x, "percent": False, "log": False},
        "y": {"title": y, "percent": percent, "log": log},
        "series": series,
    }


def _summed(lists: Sequence[list[float]]) -> list[float]:
    """Element-wise sum of the lists that are not empty."""
    return [sum(column) for column in zip(*(values for values in lists if values), strict=True)]
