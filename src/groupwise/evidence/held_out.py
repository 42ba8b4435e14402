"""How a run's held-out results changed, and what of it sampling noise explains."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from groupwise.evidence.runs import Measure, Run
from groupwise.evidence.statistics import interval
from groupwise.evidence.student import critical

ERROR = 0.05
"""Probability with which a change is seen, in either direction, where there is none."""
SMALL = 0.15
"""Of a pass rate: a rise that a run should have shown if there was any."""
SMALL_EFFECT = 0.5
"""The same of a graded reward, in standard deviations between problems."""
FEWEST = 5
"""Steps at either end of a run whose rewards are compared."""

Verdict = Literal["rose", "fell", "fell from peak", "level", "open"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The held-out score of the first evaluation, the last, and the best one between."""

    measure: Measure
    first: float
    last: float
    best: float
    best_step: int
    last_step: int
    noise: float
    """Half the width of the 95 % interval of last - first. It takes the evaluations as independent; they try the same problems with
    the same random numbers, so it is rather too wide."""
    problems: int
    """Of the evaluation that had the fewest."""
    verdict: Verdict
    """rose, fell: by more than sampling noise explains; level: neither, and a rise worth having would have been seen; open: too few
    problems to tell."""

    @property
    def ruined(self) -> bool:
        return self.verdict in ("fell", "fell from peak")


def change(run: Run) -> Change | None:
    """Compare the held-out scores of a run; None: there are fewer than two evaluations."""
    measure = run.measure
    steps, scores = (part.tolist() for part in run.scores(measure.key))
    if len(steps) < 2:
        return None
    known, deviations = dict(run.series("eval_problems")), dict(run.series("eval/reward_std"))
    usual = run.recipe.get("training", {}).get("eval_problems", 500)
    counts = [max(1, int(known.get(step) or usual)) for step in steps]

    def error(place: int) -> float:
        return measure.noise(scores[place], counts[place], deviations.get(steps[place], 0.0))

    small = SMALL if measure.percent else SMALL_EFFECT * max(deviations.get(steps[0], 0.0), deviations.get(steps[-1], 0.0))
    return Change(
        measure=measure,
        first=scores[0],
        last=scores[-1],
        best=max(scores),
        best_step=steps[scores.index(max(scores))],
        last_step=steps[-1],
        noise=math.hypot(error(0), error(-1)),
        problems=min(counts),
        verdict=_verdict(scores, error, max(1, min(counts) - 1), small, least=0.05 if measure.percent else 0.0),
    )


def _verdict(scores: Sequence[float], error: Callable[[int], float], freedom: int, small: float, least: float) -> Verdict:
    """
    Args:
        error: half the width of the 95 % interval of a score, by its place.
        freedom: degrees of freedom of each.
        small: a rise that a run should have shown if there was any.
        least: a fall from the peak that is worth a word.
    """
    first, last = scores[0], scores[-1]
    peak = max(range(1, len(scores)), key=lambda i: scores[i])
    gained, fall = scores[peak] - first, scores[peak] - last
    # The best of many noisy evaluations is high by chance: each is compared at a share of the error probability (Bonferroni), and
    # none at less than 1.5 intervals. A quarter of what was gained may go again, since policies waver from step to step.
    wider = max(1.5, critical(ERROR / (len(scores) - 1), freedom) / critical(ERROR, freedom))
    if gained > 0 and fall > max(wider * math.hypot(error(peak), error(-1)), least, 0.25 * gained):
        return "fell from peak"
    noise = math.hypot(error(0), error(-1))
    if abs(last - first) > noise:
        return "rose" if last > first else "fell"
    return "open" if last - first + noise > small else "level"


def improves(run: Run) -> bool:
    """Whether held-out results rose and stayed up; where these cannot tell yet, whether the rewards of training rose."""
    found = change(run)
    if found is not None and found.verdict != "open":
        return found.verdict == "rose"
    rewards = run.values("reward/mean")
    third = len(rewards) // 3
    early, late = interval(rewards[:third]), interval(rewards[len(rewards) - third :])
    return third >= FEWEST and late.low > early.high  # each step has problems of its own, so that their rewards are independent
