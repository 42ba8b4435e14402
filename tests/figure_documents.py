"""Documents for tests of the page's figures: runs of any length and number, made from formulas."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from groupwise.evidence.phrases import same
from groupwise.evidence.shapes import Constant, Document, Figure, Line, Mark

GROUPS = ("learning", "health", "policy", "cost")


def line(steps: Any, values: Any, *, setting: str, label: str, dash: int = 0, run: str | None = None, seeds: int = 1) -> Line:
    """A line; of several seeds with an interval."""
    half = np.full(len(values), 0.1 * float(np.std(values))) if seeds > 2 else None
    return {
        "id": f"{setting}/{run}/{label}",
        "setting": setting,
        "run": run,
        "label": same(label).as_json(),
        "dash": dash,
        "steps": [int(step) for step in steps],
        "values": short(values),
        "low": None if half is None else short(values - half),
        "high": None if half is None else short(values + half),
        "means": None,
        "seeds": seeds,
        "stretch": 1,
    }


def short(values: Any) -> list[float | None]:
    return [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]


def thinned(steps: Any, values: Any, stretch: int) -> tuple[Any, Any]:
    """The lowest and the highest value of each stretch, at their own steps."""
    if stretch == 1:
        return steps, values
    whole = len(values) // stretch * stretch
    parts = values[:whole].reshape(-1, stretch)
    base = np.arange(0, whole, stretch)
    kept = np.unique(np.concatenate([base + parts.argmin(1), base + parts.argmax(1)]))
    return steps[kept], values[kept]


def figure(id: str, group: str, title: str, lines: list[Line], y: str = "value", **more: Any) -> Figure:
    made: Figure = {
        "id": id,
        "group": group,  # type: ignore[typeddict-item]
        "title": same(title).as_json(),
        "caption": same(f"What {title.lower()} is, and where it is from.").as_json(),
        "kind": "lines",
        "y": {"title": same(y).as_json(), "percent": more.pop("percent", False), "log": more.pop("log", False)},
        "lines": lines,
    }
    return {**made, **more}  # type: ignore[typeddict-item]


def document(steps: int, settings: int = 1, seeds: int = 1, points: int = 1000, figures: int = 24) -> Document:
    """As many figures as a report has, of runs of `steps` steps."""
    random = np.random.default_rng(0)
    stretch = 1
    while 2 * steps / stretch > points and steps > points:
        stretch *= 2
    all_steps = np.arange(1, steps + 1)
    names = [f"s{i}" for i in range(settings)]

    def curve(level: float, spread: float) -> Any:
        return level + (0.9 - level) * (1 - np.exp(-3 * all_steps / steps)) + spread * random.standard_normal(steps)

    def one(setting: int, label: str, dash: int, level: float, spread: float, scale: float = 1.0) -> Line:
        kept, values = thinned(all_steps, scale * curve(level, spread), stretch)
        made = line(kept, values, setting=names[setting], label=label, dash=dash, seeds=seeds)
        made["stretch"] = stretch
        made["means"] = made["values"] if stretch > 1 else None
        return made

    def some(labels: Sequence[str], spread: float, scale: float = 1.0) -> list[Line]:
        pairs = [(s, d) for s in range(settings) for d in range(len(labels))]
        return [one(s, labels[d], d, 0.1 + 0.1 * d + 0.02 * s, spread, scale) for s, d in pairs]

    def flat(label: str, dash: int) -> list[Line]:
        kept = all_steps[::stretch]
        return [line(kept, np.zeros(len(kept)), setting=name, label=label, dash=dash) for name in names]

    tested = np.arange(0, steps + 1, max(1, steps // 10))
    scores = [0.2 + 0.5 * tested / steps + 0.02 * s for s in range(settings)]
    accuracies = [
        line(tested, score, setting=name, label="accuracy", seeds=seeds) for name, score in zip(names, scores, strict=True)
    ]
    outcomes = [*some(["mixed"], 0.05), *flat("all correct", 1), *flat("all wrong", 2)]
    divergences = some(["KL(π_old ‖ π) within a step", "KL to the reference"], 0.2, 1e-3)
    noted: list[Mark] = [{"step": steps // 2, "text": "entropy_low"}, {"step": steps // 2 + 1, "text": "settings changed"}]
    unused: list[Constant] = [{"label": same("groups of zero variance").as_json(), "value": "0"}]
    made = [
        figure("accuracy", "learning", "Held-out results", accuracies, "accuracy", percent=True),
        figure("rewards", "learning", "Reward by component", some(["total", "correct", "format"], 0.05), "mean reward"),
        figure("groups", "learning", "Groups by outcome", outcomes, "share of groups", percent=True),
        figure("kl", "health", "KL divergences and sampler mismatch", divergences, "nats per token", log=True),
        figure("gradient", "health", "Gradient norm", some(["gradient norm"], 0.3, 1e4), "gradient norm", log=True),
        figure("dropped", "cost", "Discarded data", [], "count", constants=unused),
        *(
            figure(f"more{i}", GROUPS[i % 4], f"Metric {i}", some([f"metric {i}"], 0.1, 10.0 ** (i % 5)))
            for i in range(figures - 9)
        ),
        bars(names),
        dots(names, random),
        spread(names),
    ]
    clock = {
        "steps": [0, *map(int, all_steps[:: max(1, steps // 50)])],
        "completions": [0.0, *(64.0 * s for s in map(int, all_steps[:: max(1, steps // 50)]))],
        "seconds": [0.0, *(3.5 * s for s in map(int, all_steps[:: max(1, steps // 50)]))],
    }
    nothing: list[Any] = []
    return {
        "title": "run1 · dapo",
        "measure": same("accuracy").as_json(),
        "settings": [{"id": name, "name": f"setting {name} · dapo", "runs": [f"r{name}"], "clock": clock} for name in names],  # type: ignore[typeddict-item]
        "runs": nothing, "tiles": nothing, "summary": nothing, "differences": {"keys": [], "rows": []}, "comparisons": nothing,
        "findings": nothing, "events": nothing, "segments": nothing, "left_out": [], "marks": noted,
        "figures": sorted(made, key=lambda item: GROUPS.index(item["group"])),
    }  # fmt: skip


def bars(names: list[str]) -> Figure:
    bins = ["0 to 0.001", "0.001 to 0.01", "0.01 to 0.1", "0.1 to 0.5", "0.5 to 0.9", "0.9 to 0.99", "0.99 to 1"]
    series = [
        {"id": f"{name}/{bound}", "setting": name, "label": same(bound).as_json(), "dash": d, "x": list(range(len(bins))),
         "y": [0.1 * (d + 1) / (1 + i) for i in range(len(bins))]}
        for name in names for d, bound in enumerate(("lower bound", "upper bound"))
    ]  # fmt: skip
    more: dict[str, Any] = {"kind": "bars", "series": series, "bins": bins, "x": _axis("π_old of the token")}
    return figure("clip-by-probability", "policy", "Clipped tokens by probability", [], "share", percent=True, **more)


def dots(names: list[str], random: Any) -> Figure:
    series = []
    for name in names[:4]:
        p = random.beta(2, 0.5, 600)
        ratio = np.exp(0.1 * random.standard_normal(600) / np.sqrt(p))
        flags = [bool(far) for far in abs(ratio - 1) > 0.2]
        series.append({"id": name, "setting": name, "label": same("tokens").as_json(), "dash": 0,
                       "x": short(p), "y": short(ratio), "tips": [f"token {i}" for i in range(600)], "flags": flags})  # fmt: skip
    more: dict[str, Any] = {"kind": "dots", "series": series, "x": _axis("π_old")}
    return figure("ratio", "policy", "Token ratios by probability", [], "ratio π / π_old", log=True, **more)


def spread(names: list[str]) -> Figure:
    x = [1.5, 3.0, 6.0, 12.0, 24.0, 48.0, 96.0]
    powers = {"mean of token log ratios": -0.5, "sum of token log ratios": 0.5}
    series = [
        {"id": f"{name}/{label}", "setting": name, "label": same(label).as_json(), "dash": d, "x": x, "y": [a**power for a in x]}
        for name in names for d, (label, power) in enumerate(powers.items())
    ]  # fmt: skip
    more: dict[str, Any] = {"kind": "curve", "series": series, "x": {**_axis("completion length (tokens)"), "log": True}}
    return figure("spread-by-length", "policy", "Log ratios by length", [], "RMS log ratio (nats)", log=True, **more)


def _axis(title: str) -> dict[str, Any]:
    return {"title": same(title).as_json(), "percent": False, "log": False}
