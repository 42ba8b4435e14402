"""Pass rates on held-out problems."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from groupwise.errors import RunError
from groupwise.rollouts.groups import Rollouts
from groupwise.training.metrics import turn_metrics
from groupwise.training.supply import describe_failures
from groupwise.types import Group, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Held-out results, and the answers they came from, problem by problem."""

    metrics: dict[str, float]
    """eval/pass@1 (mean over samples, so also avg@k) and eval/pass@k where the task says what is right, eval/reward and its
    standard deviation over problems, eval/reward_std, eval/length, eval/truncated, eval/grade_N; eval/failed where a completion
    could not be scored."""
    groups: Sequence[Group]
    """The answers, in the order of the problems."""
    values: dict[str, list[float]]
    """Each metric's value of each problem that it is a mean over."""


def evaluate(rollouts: Rollouts, problems: Sequence[Problem], *, samples: int = 1, seed: int) -> Evaluation:
    """Sample each held-out problem `samples` times, at the training temperature.

    Raises:
        RunError: no completion could be scored.
    """
    groups, _ = rollouts.groups(problems, samples, seed)
    scored = [group for group in groups if group.scored]
    if groups and not scored:
        raise RunError(f"no completion of the held-out problems could be scored: {describe_failures(groups[0].scores)}")
    every = [completion for group in groups for completion in group.completions]
    failed = sum(len(group.scores) - len(group.scored) for group in groups)
    graded = any(score.correct is None for group in scored for score in group.scored)
    rewards = [_mean([score.reward for score in group.scored]) for group in scored]
    values = {
        **({} if graded else _pass_rates(scored, samples)),
        "eval/reward": rewards,
        "eval/length": [_mean([len(completion.tokens) for completion in group.completions]) for group in groups],
        "eval/truncated": [_mean([completion.stop == "length" for completion in group.completions]) for group in groups],
    }
    by_grade = defaultdict(list)
    for group in scored:
        if "grade" in group.problem.metadata:
            of_group = [score.reward if graded else float(score.correct is True) for score in group.scored]
            by_grade[group.problem.metadata["grade"]].append(_mean(of_group))
    values |= {f"eval/grade_{grade}": of_grade for grade, of_grade in sorted(by_grade.items())}
    metrics = {key: _mean(of) for key, of in values.items()}
    metrics["eval/reward_std"] = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
    metrics |= {f"eval/{name}": value for name, value in turn_metrics(every).items()}
    if failed:
        metrics["eval/failed"] = failed / len(every)
    return Evaluation(groups=groups, values=values, metrics=metrics)


def _pass_rates(groups: Sequence[Group], samples: int) -> dict[str, list[float]]:
    """pass@1, and pass@k for powers of two and for `samples`; a k counts only groups of which k completions were scored,
    and has no value where there is none."""
    rates = {"eval/pass@1": [group.correct_count / len(group.scored) for group in groups]}
    for k in sorted({2**i for i in range(1, samples.bit_length())} | {samples} - {1}):
        rates[f"eval/pass@{k}"] = [
            pass_at(k, len(group.scored), group.correct_count) for group in groups if len(group.scored) >= k
        ]
    return {name: of_groups for name, of_groups in rates.items() if of_groups}


def pass_at(k: int, samples: int, correct: int) -> float:
    """Unbiased chance that one of k samples is right (arXiv 2107.03374, equation 1)."""
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
