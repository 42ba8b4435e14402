"""The numbers of docs/findings.md, from the runs of the shipped ladders.

for ladder in dapo one-change overlong easy gspo dcpo group-size moe; do groupwise ablate $ladder --jobs 2; done
python benchmarks/claims.py runs docs/figures
"""

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from groupwise.algorithms.diagnostics import PROBABILITY_EDGES
from groupwise.evidence.pictures import charts
from groupwise.evidence.runs import Run, open_run
from groupwise.evidence.statistics import Interval, interval

SHOWN = {"entropy", "groups", "utilisation", "accuracy-rollouts", "clip-by-probability", "spread-length", "length", "truncated"}
Rungs = dict[str, list[Run]]


def read(home: Path, ladder: str) -> Rungs:
    """The finished runs of a ladder, seeds in order, by the slug of their rung."""
    rungs: Rungs = {}
    for rung in sorted((home / f"ladder-{ladder}").glob("*-*/")):
        runs = [open_run(path.parent.parent) for path in sorted(rung.glob("seed-*/model/config.json"))]
        if runs:
            rungs[rung.name.split("-", 1)[1]] = runs
    return rungs


def each(runs: Sequence[Run], measure: Callable[[Run], float]) -> list[float]:
    return [measure(run) for run in runs]


def score(run: Run) -> float:
    return run.last("eval/pass@1", 1)


def last(name: str, count: int = 5) -> Callable[[Run], float]:
    return lambda run: run.last(name, count)


def first(name: str, count: int = 3) -> Callable[[Run], float]:
    return lambda run: run.first(name, count)


def mean(name: str) -> Callable[[Run], float]:
    return lambda run: run.last(name, len(run.steps))


def below(edge: float) -> Callable[[Run], float]:
    """Share of up-clipped tokens whose old probability was below `edge`."""

    def measure(run: Run) -> float:
        held = run.total("by_probability/clipped_high")
        return sum(held[: PROBABILITY_EDGES.index(edge) + 1]) / sum(held) if sum(held) else math.nan

    return measure


def all_tokens_below(edge: float) -> Callable[[Run], float]:
    def measure(run: Run) -> float:
        tokens = run.total("by_probability/tokens")
        return sum(tokens[: PROBABILITY_EDGES.index(edge) + 1]) / sum(tokens)

    return measure


def growth_of_spread(name: str) -> Callable[[Run], float]:
    """The exponent with which a row's spread grows with its length: the slope of its logarithm, weighted by rows."""

    def measure(run: Run) -> float:
        rows, squares = run.total("by_length/rows"), run.total(f"by_length/{name}")
        points = [
            (i * math.log(2), 0.5 * math.log(s / n), n)
            for i, (n, s) in enumerate(zip(rows, squares, strict=True))
            if n > 20 and s > 0
        ]
        if len(points) < 2:
            return math.nan
        weight = sum(n for _, _, n in points)
        mx, my = (sum(p[k] * p[2] for p in points) / weight for k in (0, 1))
        return sum(n * (x - mx) * (y - my) for x, y, n in points) / sum(n * (x - mx) ** 2 for x, _, n in points)

    return measure


def reached(threshold: float, place: int) -> Callable[[Run], float]:
    """Completions (place 0) or seconds (1) until held-out pass@1 first passes `threshold`, interpolated; NaN if it never does."""

    def measure(run: Run) -> float:
        steps, *spent = run.spent()
        before = (0.0, run.evaluations[0]["eval/pass@1"])
        for step, score in run.series("eval/pass@1"):
            at = (float(np.interp(step, steps, spent[place])), score)
            if at[1] >= threshold:
                return before[0] + (at[0] - before[0]) * (threshold - before[1]) / max(at[1] - before[1], 1e-9)
            before = at
        return math.nan

    return measure


@torch.no_grad()
def routing_flips(run: Run) -> float:
    """Share of a token's experts, over layers, that one step's updates change: between checkpoints of successive steps."""
    model = AutoModelForCausalLM.from_pretrained(run.path / "model").eval()
    table = run.tokens(run.token_steps()[-1])
    tokenizer = AutoTokenizer.from_pretrained(run.path / "model")
    tokens, positions, prompts = (table[name].to_pylist()[:2000] for name in ("token", "position", "prompt"))
    starts = [i for i, position in enumerate(positions) if position == 0]
    rows = [torch.tensor([*tokenizer(prompts[a]).input_ids, *tokens[a:b]]) for a, b in itertools.pairwise(starts)]
    chosen: list[list[torch.Tensor]] = []
    newest = run.recipe["training"]["keep_checkpoints"]  # the best may be there too, from long before
    for checkpoint in sorted((run.path / "checkpoints").glob("step-*"))[-newest:]:
        load_model(model, str(checkpoint / "model.safetensors"))
        logits = [model(input_ids=row[None], output_router_logits=True).router_logits for row in rows]
        k = model.config.num_experts_per_tok
        chosen.append([torch.cat([one[layer] for one in logits]).topk(k).indices for layer in range(len(logits[0]))])
    changed = []
    for before, after in itertools.pairwise(chosen):
        kept = [(b[:, :, None] == a[:, None, :]).any(2).float().mean() for b, a in zip(before, after, strict=True)]
        changed.append(1 - float(torch.stack(kept).mean()))
    return sum(changed) / len(changed)


def show(text: str, value: Interval) -> None:
    print(f"  {text}: {value.mean:.4g} ± {value.half:.2g} (n {value.count}){' *' if abs(value.mean) > value.half else ''}")


def beside(rungs: Rungs, names: Sequence[str], measures: dict[str, Callable[[Run], float]], against: str | None = None) -> None:
    """Each measure of each rung, and its change from one of them, seed by seed."""
    for label, measure in measures.items():
        for name in names:
            if name not in rungs:
                continue
            values = each(rungs[name], measure)
            show(f"{label}, {name}", interval(values))
            if against and name != against and against in rungs:
                base = {run.seed: measure(run) for run in rungs[against]}
                pairs = [(base[run.seed], value) for run, value in zip(rungs[name], values, strict=True) if run.seed in base]
                pairs = [pair for pair in pairs if not any(map(math.isnan, pair))]
                show("    change", interval([after - before for before, after in pairs]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("figures", type=Path, help="Where to draw the figures of the ladders.")
    arguments = parser.parse_args()
    arguments.figures.mkdir(parents=True, exist_ok=True)
    ladders = {
        path.name.removeprefix("ladder-"): read(arguments.runs, path.name.removeprefix("ladder-"))
        for path in arguments.runs.glob("ladder-*")
    }
    common = {
        "score": score,
        "entropy at the end": last("entropy"),
        "entropy, end over start": lambda r: last("entropy")(r) / first("entropy")(r),
        "length at the end": last("length/mean"),
        "truncated at the end": last("length/truncated"),
        "all right, start": first("groups/all_correct"),
        "all right, end": last("groups/all_correct"),
        "dead, end": last("groups/zero_variance"),
        "utilisation": mean("utilisation"),
        "effective": mean("utilisation/effective"),
        "clip fraction": mean("clip_fraction"),
        "clipped up": mean("clip_fraction_high"),
        "clipped down": mean("clip_fraction_low"),
        "mean probability of up-clipped": mean("clip/high_probability"),
        "up-clipped below 0.2": below(0.2),
        "all tokens below 0.2": all_tokens_below(0.2),
        "exponent of the sum's spread": growth_of_spread("sum_square"),
        "exponent of the mean's spread": growth_of_spread("mean_square"),
        "gradient norm": mean("grad_norm"),
        "completions": lambda r: r.spent()[1][-1],
        "seconds": lambda r: r.spent()[2][-1],
        "completions to 0.6": reached(0.6, 0),
        "seconds to 0.6": reached(0.6, 1),
    }
    for ladder, rungs in sorted(ladders.items()):
        if not rungs:
            continue
        print(f"## {ladder}")
        names = list(rungs)
        for label, measure in common.items():
            beside(rungs, names, {label: measure}, against=names[0])
        if any("num_experts" in (runs[0].path / "model" / "config.json").read_text() for runs in rungs.values()):
            beside(rungs, names, {"experts changed by a step": routing_flips})
        for id, chart in charts([run for runs in rungs.values() for run in runs]).items():
            if id in SHOWN:
                chart.save(arguments.figures / f"{ladder}-{id}.png", scale_factor=1.5)


if __name__ == "__main__":
    main()
