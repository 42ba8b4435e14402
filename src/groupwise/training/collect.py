"""Rollouts of one step: problems drawn, completions sampled and scored, groups kept until the batch is full."""

import math
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from groupwise.algorithms import Algorithm, mixed_groups
from groupwise.config import Recipe
from groupwise.models import encode_prompt
from groupwise.rollouts.base import Sampler, Sampling
from groupwise.seeding import derive
from groupwise.tasks.base import Task
from groupwise.types import Completion, Group, Problem, Score

LARGEST_ROUND = 4
"""Dynamic sampling never asks for more than this many times the batch at once."""


@dataclass(slots=True, kw_only=True)
class Collected:
    """Groups to train on, and what they cost."""

    groups: list[Group]
    """Kept: at most prompts_per_step."""
    seen: list[Group]
    """Generated, kept or not."""
    rounds: int
    seconds: float = 0.0
    scoring_seconds: float = 0.0
    full: bool = True
    """Whether the batch was filled."""
    reused: int = 0
    """Groups among those kept that an earlier step generated."""
    too_old: int = 0
    """Groups that earlier steps generated and no batch took in time."""

    outcomes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.outcomes = Counter(group.outcome for group in self.seen)

    @property
    def dropped(self) -> list[Group]:
        """Generated and not kept."""
        kept = {id(group) for group in self.groups}
        return [group for group in self.seen if id(group) not in kept]

    def describe(self) -> str:
        """Why a batch could not be filled."""
        return (
            f"{len(self.groups)} mixed groups after {self.rounds} rounds and {len(self.seen)} prompts: "
            f"{self.outcomes['all_correct']} were all right, {self.outcomes['all_wrong']} all wrong"
        )


class Collector:
    """Draws the problems of a run in order and fills each step's batch."""

    def __init__(self, sampler: Sampler, task: Task, tokenizer: object, recipe: Recipe, algorithm: Algorithm) -> None:
        self.sampler, self.task, self.tokenizer = sampler, task, tokenizer
        self.recipe, self.algorithm = recipe, algorithm
        self.sampling = sampling_of(recipe)
        self.position = 0
        """How many training problems have been drawn."""
        self.keep_rate = 1.0
        """Share of groups that dynamic sampling kept in the last step."""
        self.surplus: list[tuple[int, Group]] = []
        """Mixed groups beyond the last batch, and the step that generated each."""

    def collect(self, step: int) -> Collected:
        """The groups of one step. Without dynamic sampling: one round, everything kept."""
        started = time.perf_counter()
        wanted = self.recipe.rollouts.prompts_per_step
        limit = self.recipe.rollouts.max_rounds if self.algorithm.dynamic_sampling else 1
        young = [(born, group) for born, group in self.surplus if step - born <= self.recipe.rollouts.max_age]
        too_old = len(self.surplus) - len(young)
        kept, seen = list(young), list[Group]()
        rounds, scoring = 0, 0.0
        while len(kept) < wanted and rounds < limit:
            problems = self._draw(self._count(wanted - len(kept)))
            groups, seconds = self._generate(problems, derive(self.recipe.seed, "rollouts", step, rounds))
            seen += groups
            mixed = [group for group in groups if not self.algorithm.dynamic_sampling or is_mixed(group)]
            kept += [(step, group) for group in mixed]
            scoring += seconds
            rounds += 1
            self.keep_rate = (len(kept) - len(young)) / len(seen)
        self.surplus = kept[wanted:] if self.recipe.rollouts.max_age else []
        return Collected(
            groups=[group for _, group in kept[:wanted]],
            seen=seen,
            rounds=rounds,
            seconds=time.perf_counter() - started,
            scoring_seconds=scoring,
            full=len(kept) >= wanted,
            reused=min(len(young), wanted),
            too_old=too_old,
        )

    def _count(self, missing: int) -> int:
        """How many prompts should fill what is missing, at the rate at which they were kept so far."""
        if not self.algorithm.dynamic_sampling:
            return missing
        wanted = self.recipe.rollouts.prompts_per_step
        return min(LARGEST_ROUND * wanted, math.ceil(missing / max(self.keep_rate, 1 / LARGEST_ROUND)))

    def _draw(self, count: int) -> list[Problem]:
        problems = [self.task.problem(self.position + i, self.recipe.seed) for i in range(count)]
        self.position += count
        return problems

    def _generate(self, problems: list[Problem], seed: int) -> tuple[list[Group], float]:
        """Groups in the order of their problems, each scored as it finishes, and the seconds that scoring took of this thread.

        Scoring that computes stays in this thread: in another it would take the interpreter from the generation again and
        again (measured: rollouts 1.6 times slower). Scoring that waits goes on in another.
        """
        prompts = [encode_prompt(self.tokenizer, problem.prompt, self.recipe.model.chat) for problem in problems]
        finished: dict[int, tuple[Completion, ...]] = {}
        scores: dict[int, Future[list[Score]]] = {}
        scoring = 0.0
        with ThreadPoolExecutor(max_workers=1) as thread:
            submit = thread.submit if self.task.scores_beside_generation else _now
            for i, completions in self.sampler.generate(prompts, self.recipe.rollouts.group_size, self.sampling, seed=seed):
                started = time.perf_counter()
                finished[i] = completions
                scores[i] = submit(self.task.score, problems[i], [completion.text for completion in completions])
                scoring += time.perf_counter() - started
            started = time.perf_counter()
            groups = [
                Group(problem=problem, prompt_tokens=prompts[i], completions=finished[i], scores=tuple(scores[i].result()))
                for i, problem in enumerate(problems)
            ]
            scoring += time.perf_counter() - started
        return groups, scoring

    def state_dict(self) -> dict[str, Any]:
        surplus = [(born, asdict(group)) for born, group in self.surplus]
        return {"position": self.position, "keep_rate": self.keep_rate, "surplus": surplus}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position, self.keep_rate = state["position"], state["keep_rate"]
        self.surplus = [(born, Group.from_dict(group)) for born, group in state["surplus"]]


def _now(function: Callable[..., list[Score]], *arguments: Any) -> Future[list[Score]]:
    """What an executor's `submit` does, at once and in this thread."""
    future: Future[list[Score]] = Future()
    future.set_result(function(*arguments))
    return future


def is_mixed(group: Group) -> bool:
    correct_B = torch.tensor([score.correct for score in group.scores])
    return bool(mixed_groups(correct_B, torch.zeros(len(correct_B), dtype=torch.long))[0])


def sampling_of(recipe: Recipe) -> Sampling:
    settings = recipe.rollouts
    return Sampling(
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        stop=tuple(settings.stop),
        stop_tokens=tuple(settings.stop_tokens),
        max_rows=settings.max_rows,
    )
