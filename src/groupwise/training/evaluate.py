"""Pass rates on held-out problems."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from groupwise.models import encode_prompt
from groupwise.rollouts.base import Sampler, Sampling, requests
from groupwise.rollouts.driver import generate_all
from groupwise.tasks.base import Task
from groupwise.types import Completion, Problem, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Held-out results, and the answers they came from, problem by problem."""

    metrics: dict[str, float]
    """eval/pass@1 (mean over samples, so also avg@k), eval/pass@k, eval/length, eval/truncated, eval/grade_N."""
    problems: Sequence[Problem]
    completions: Sequence[tuple[Completion, ...]]
    scores: Sequence[tuple[Score, ...]]


def evaluate(
    sampler: Sampler,
    task: Task,
    tokenizer: object,
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    samples: int = 1,
    seed: int,
    chat: bool | None = None,
) -> Evaluation:
    """Sample each held-out problem `samples` times, at the training temperature."""
    prompts = [encode_prompt(tokenizer, problem.prompt, chat) for problem in problems]
    completions = generate_all(sampler, requests(prompts, samples, sampling, seed))
    scores = [
        tuple(task.score(problem, [completion.text for completion in row]))
        for problem, row in zip(problems, completions, strict=True)
    ]
    rates = [sum(score.correct for score in row) / samples for row in scores]
    every = [completion for row in completions for completion in row]
    metrics = {
        "eval/pass@1": _mean(rates),
        "eval/length": _mean([len(completion.tokens) for completion in every]),
        "eval/truncated": _mean([completion.stop == "length" for completion in every]),
    }
    for k in sorted({2**i for i in range(1, samples.bit_length())} | {samples} - {1}):
        metrics[f"eval/pass@{k}"] = _mean([pass_at(k, samples, round(rate * samples)) for rate in rates])
    by_grade = defaultdict(list)
    for problem, rate in zip(problems, rates, strict=True):
        if "grade" in problem.metadata:
            by_grade[problem.metadata["grade"]].append(rate)
    metrics |= {f"eval/grade_{grade}": _mean(values) for grade, values in sorted(by_grade.items())}
    return Evaluation(metrics=metrics, problems=problems, completions=completions, scores=scores)


def pass_at(k: int, samples: int, correct: int) -> float:
    """Unbiased chance that one of k samples is right (arXiv 2107.03374, equation 1)."""
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
