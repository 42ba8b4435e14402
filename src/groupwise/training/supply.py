"""The problems of a run in the order in which groups are begun, and what is remembered of how groups fared."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from groupwise.algorithms import Algorithm, Candidates, Results
from groupwise.algorithms.allocation import allocation_problem
from groupwise.config import Recipe
from groupwise.errors import RunError, UserError
from groupwise.rollouts.episodes import Draw
from groupwise.rollouts.groups import Order
from groupwise.seeding import derive
from groupwise.tasks.base import Task
from groupwise.training.kept_sets import check_kept
from groupwise.types import Group, Problem, Score


@dataclass(frozen=True, slots=True)
class Drawn:
    """A problem that is to get a group."""

    index: int
    """Its place in the task's stream."""
    problem: Problem
    n: int
    """Completions."""


class Supply:
    """Draws problems, and judges the groups that are made of them."""

    def __init__(self, task: Task, recipe: Recipe, algorithm: Algorithm) -> None:
        self.task, self.recipe, self.algorithm = task, recipe, algorithm
        self.position = 0
        """How many training problems have been drawn."""
        self.failed_groups = 0
        """How many groups in a row, up to the last one, scoring failed for."""
        self.history: Mapping[str, tuple[float, float]] = {}
        """Of each prompt, for allocations that need it."""

    # --- before

    def draw(self, count: int, seed: int) -> list[Drawn]:
        """The problems that the algorithm allocates completions to: `group_size` on average.

        Raises:
            RunError: an allocation of the user's own gave what cannot be used, or the task has no such problem.
        """
        ahead = math.ceil(count * getattr(self.algorithm.allocation, "candidates", 1))
        first, problems = self.position, [self.problem(self.position + i) for i in range(ahead)]
        self.position += ahead
        candidates = Candidates(
            prompt_ids=[problem.id for problem in problems],
            count=count,
            completions=count * self.recipe.rollouts.group_size,
            history=self.history,
            seed=seed,
        )
        chosen = self.algorithm.allocation(candidates)
        if (wrong := allocation_problem(chosen, candidates)) is not None:
            raise RunError(f"the allocation {self.algorithm.choice('allocation')} {wrong}")
        return [Drawn(first + i, problems[i], n) for i, n in chosen]

    def problem(self, index: int) -> Problem:
        """
        Raises:
            RunError: the task has no such problem.
        """
        try:
            return self.task.problem(index, self.recipe.seed)
        except UserError as error:  # a row of a stream, or a task of the user's own, is found to be wrong only now
            raise RunError(str(error)) from error

    def order(self, drawn: Drawn, position: int) -> Order:
        """The order for a group, whose random numbers follow from its position."""
        draw = Draw(seed=derive(self.recipe.seed, "rollouts", position), before=0)
        return Order(drawn.problem, drawn.n, draw, position)

    # --- after

    def why_dropped(self, group: Group) -> str | None:
        """Why a group is not trained on; None if it is. Without dynamic sampling everything is that could be scored.

        Raises:
            UserError: the learner cannot compute the log-probabilities of its completions.
        """
        check_kept(group.completions, self.recipe, self.algorithm)
        if not group.scored:
            return "failed"
        if not self.algorithm.dynamic_sampling or is_selected(group, self.algorithm):
            return None
        return "unselected" if group.outcome == "mixed" else group.outcome

    def remember(self, groups: Sequence[Group]) -> None:
        """Tell the allocation how each prompt fared, where it keeps a history.

        Raises:
            RunError: a graded reward is no share of a success.
        """
        remember = getattr(self.algorithm.allocation, "remember", None)
        if remember is None:
            return
        visits = []
        for group in groups:
            for score in group.scored:
                if score.correct is None and not 0 <= score.reward <= 1:
                    raise RunError(
                        f"the allocation {self.algorithm.choice('allocation')} counts pass rates, or rewards from 0 to 1 "
                        f"as a share of one, and a completion of {group.problem.id!r} got {score.reward:g}"
                    )
            rewards = [score.reward if score.correct is None else float(score.correct) for score in group.scored]
            visits.append((group.problem.id, sum(rewards), len(rewards) - sum(rewards)))
        self.history = remember(self.history, visits)

    def check_failures(self, groups: Sequence[Group]) -> None:
        """Count groups in a row of which no completion could be scored.

        Raises:
            RunError: there are too many.
        """
        most = self.recipe.rollouts.max_failed_groups
        for group in groups:
            self.failed_groups = 0 if group.scored else self.failed_groups + 1
            if self.failed_groups >= most:
                self.failed_groups = 0  # when the run is resumed, they are counted anew
                raise RunError(
                    f"scoring failed for every completion of {most} groups in a row: {describe_failures(group.scores)}"
                )

    # --- state

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "failed_groups": self.failed_groups, "history": self.history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position, self.failed_groups, self.history = state["position"], state["failed_groups"], state["history"]


def is_selected(group: Group, algorithm: Algorithm) -> bool:
    """Whether the algorithm's selection keeps the group, by its completions that enter the baseline.

    Those are all with `overlong_in_baseline`, else those that overlong filtering leaves in the loss. False if none is trained on.
    """
    scored = [(c, s) for c, s in zip(group.completions, group.scores, strict=True) if s.failure is None]
    trained = [score for completion, score in scored if not (algorithm.overlong_filter and completion.stop == "length")]
    counted = [score for _, score in scored] if algorithm.overlong_in_baseline else trained
    if not trained:
        return False
    graded = any(score.correct is None for score in counted)
    return algorithm.selection(
        Results(
            rewards_G=torch.tensor([score.reward for score in counted], dtype=torch.float64),
            correct_G=None if graded else torch.tensor([score.correct is True for score in counted]),
        )
    )


def describe_failures(scores: Sequence[Score]) -> str:
    """How many completions could not be scored for which cause, and what was said of the first."""
    failed = [score for score in scores if score.failure is not None]
    counts = Counter(score.failure for score in failed)
    detail = next((f"; the first: {score.detail}" for score in failed if score.detail), "")
    return ", ".join(f"{count} {cause}" for cause, count in counts.items()) + detail
