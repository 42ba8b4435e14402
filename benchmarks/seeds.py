"""How often comparisons of settings are wrong, and how often they find what is there, by simulation.

python benchmarks/seeds.py             # a minute on one core
"""

import argparse
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from groupwise.evidence.outcomes import costs
from groupwise.evidence.records import Records
from groupwise.evidence.runs import PASS_RATE, Run
from groupwise.evidence.statistics import LEVEL, Difference, difference, holm, seeds_needed

Scores = dict[int, float]
Draw = Callable[[random.Random], tuple[Scores, Scores]]


def normal(first: int, second: int, *, ratio: float = 1.0, effect: float = 0.0, shared: float | None = None) -> Draw:
    """Normal scores; `shared`: the seeds are the same, and have this part of the variance in common; None: other seeds."""

    def draw(rng: random.Random) -> tuple[Scores, Scores]:
        part = shared or 0.0
        own = [rng.gauss(0, math.sqrt(part)) for _ in range(max(first, second))]
        spread = math.sqrt(1 - part)
        one = {i: own[i] + rng.gauss(0, spread) for i in range(first)}
        other = {i: own[i] + rng.gauss(effect, ratio * spread) for i in range(second)}
        return one, other if shared is not None else {1000 + i: value for i, value in other.items()}

    return draw


def evaluated(count: int, score: Callable[[random.Random], float], problems: int = 500) -> Draw:
    """Settings that do not differ: each seed's true score is drawn, and measured with so many problems."""

    def measured(rng: random.Random) -> float:
        true = min(1.0, max(0.0, score(rng)))
        return sum(rng.random() < true for _ in range(problems)) / problems

    def draw(rng: random.Random) -> tuple[Scores, Scores]:
        first, second = ({i: measured(rng) for i in range(count)} for _ in range(2))
        return first, second

    return draw


def skewed(count: int) -> Draw:
    """The same mean, but one setting's seeds are spread evenly and the other's have a long tail downwards."""

    def draw(rng: random.Random) -> tuple[Scores, Scores]:
        return {i: rng.gauss(0, 0.3) for i in range(count)}, {i: 1 - rng.expovariate(1) for i in range(count)}

    return draw


def share(draw: Draw, trials: int, level: float = LEVEL) -> float:
    """How often the p-value is below the level."""
    rng, below = random.Random(1), 0
    for _ in range(trials):
        found = difference(*draw(rng), least=1 / 500)
        below += found is not None and found.p < level
    return below / trials


def family(settings: int, seeds: int, trials: int) -> float:
    """How often any of equal settings is called different from the first, by Holm's method."""
    rng, wrong = random.Random(2), 0
    for _ in range(trials):
        own = [rng.gauss(0, 0.7) for _ in range(seeds)]
        scores = [{i: own[i] + rng.gauss(0, 0.7) for i in range(seeds)} for _ in range(settings)]
        found = [difference(scores[0], other) for other in scores[1:]]
        wrong += min(holm([one.p for one in found if one is not None])) < LEVEL
    return wrong / trials


def curve(seed: int, name: str, rng: random.Random) -> Run:
    """A run whose held-out score rises, measured with 500 problems every 5 steps; speed and final score vary between seeds."""
    final, speed = rng.gauss(0.85, 0.02), math.exp(rng.gauss(0, 0.2)) / 8
    steps = [{"step": i, "reward/mean": 0.5, "rollouts/completions": 256.0, "seconds/rollouts": 1.0} for i in range(1, 41)]
    scores = [(i, final - (final - 0.3) * math.exp(-speed * i)) for i in range(0, 41, 5)]
    measured = [(i, min(1.0, max(0.0, rng.gauss(p, math.sqrt(p * (1 - p) / 500))))) for i, p in scores]
    evaluations = [{"step": i, "eval/pass@1": score, "eval_problems": 500.0} for i, score in measured]
    recipe = {"seed": seed, "training": {"steps": 40}}
    return Run(path=Path(name, str(seed)), recipe=recipe, steps=Records(steps), evaluations=Records(evaluations))


def cost(seeds: int, trials: int) -> float:
    """How often equal settings are said to need other numbers of completions until a score."""
    rng, wrong = random.Random(3), 0
    for _ in range(trials):
        runs = [[curve(seed, name, rng) for seed in range(seeds)] for name in ("a", "b")]
        for outcomes in costs(*runs, PASS_RATE)[:1]:
            found = difference(outcomes.first, outcomes.second)
            wrong += found is not None and found.p < LEVEL
    return wrong / trials


def looked_at_each_seed(first: int, last: int, trials: int) -> float:
    """How often equal settings are called different at any of the numbers of seeds."""
    rng, wrong = random.Random(4), 0
    for _ in range(trials):
        one, other = ({i: rng.gauss(0, 1) for i in range(last)} for _ in range(2))
        for count in range(first, last + 1):
            found = difference({i: one[i] for i in range(count)}, {i: other[i] for i in range(count)})
            if found is not None and found.p < LEVEL:
                wrong += 1
                break
    return wrong / trials


def as_planned(first: int, effect: float, trials: int, most: int = 30) -> tuple[float, float]:
    """How often a difference is called real where open ones get as many seeds as the report says, up to `most`, and are looked at
    once more; and how many seeds that took, on average."""
    rng, called, used = random.Random(5), 0, 0
    for _ in range(trials):
        changes = [rng.gauss(effect, 1) for _ in range(most)]
        count = first
        found = _pairs(changes[:count])
        if found.p >= LEVEL:
            count = seeds_needed(found, LEVEL, most) or most
            found = _pairs(changes[:count])
        called += found.p < LEVEL
        used += count
    return called / trials, used / trials


def _pairs(changes: list[float]) -> Difference:
    found = difference(dict.fromkeys(range(len(changes)), 0.0), dict(enumerate(changes)))
    assert found is not None
    return found


def rows(trials: int) -> Iterator[tuple[str, float | str]]:
    yield "Equal settings that are called different", "at most 0.05"
    for count in (3, 5, 10):
        yield f"  {count} shared seeds", share(normal(count, count, shared=0.5), trials)
    yield "  5 shared seeds, one setting with 3 times the spread", share(normal(5, 5, ratio=3, shared=0.2), trials)
    for first, second, ratio in ((3, 3, 1.0), (3, 3, 4.0), (5, 5, 1.0), (3, 10, 0.5), (3, 10, 1.0), (10, 10, 2.0)):
        yield (
            f"  {first} and {second} seeds of their own, spreads 1 and {ratio:g}",
            share(normal(first, second, ratio=ratio), trials),
        )
    yield "  5 seeds near the ceiling (0.98 ± 0.01)", share(evaluated(5, lambda rng: rng.gauss(0.98, 0.01)), trials // 5)
    yield (
        "  5 seeds, one in ten of which fails to learn",
        share(evaluated(5, lambda rng: 0.3 if rng.random() < 0.1 else rng.gauss(0.9, 0.02)), trials // 5),
    )
    yield "  5 seeds, one setting with a long tail downwards", share(skewed(5), trials)
    yield "  10 seeds, one setting with a long tail downwards", share(skewed(10), trials)
    yield "  any of 5 settings against the first, 5 seeds", family(6, 5, trials)
    yield "  completions until a score, 5 seeds", cost(5, trials // 10)
    yield "Real differences that are found with the stated number of seeds", "about 0.80"
    for effect, level in ((0.7, 0.05), (1.0, 0.05), (1.5, 0.05), (1.0, 0.01)):
        needed = seeds_needed(Difference(mean=effect, spreads=(1.0,), counts=(3,)), level, 100) or 100
        draw = normal(needed, needed, effect=effect * math.sqrt(2), shared=0.0)  # the differences have √2 times the spread
        yield f"  {effect:g} spreads of the differences, level {level:g}: {needed} shared seeds", share(draw, trials, level)
    for effect in (1.0, 1.5):
        needed = seeds_needed(Difference(mean=effect, spreads=(1.0, 1.0), counts=(3, 3)), LEVEL, 100) or 100
        yield f"  {effect:g} spreads, {needed} seeds of their own", share(normal(needed, needed, effect=effect), trials)
    yield "Equal settings that are called different where it is looked at more than once", ""
    yield "  after each seed from 3 to 10", looked_at_each_seed(3, 10, trials // 4)
    for first in (3, 5):
        wrong, used = as_planned(first, 0.0, trials // 2)
        yield f"  after {first} and after the stated number, at most 30 ({used:.0f} on average)", wrong
    for first in (3, 5):
        found, used = as_planned(first, 1.0, trials // 2)
        yield f"  a real one of 1 spread found so, after {first} ({used:.0f} on average)", found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20_000)
    for name, value in rows(parser.parse_args().trials):
        print(f"{name:76} {value if isinstance(value, str) else format(value, '.3f')}", flush=True)


if __name__ == "__main__":
    main()
