"""From problems to scored groups: completions sampled and scored, many groups at once, in training and on held-out problems."""

import itertools
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

from groupwise.models import Chat
from groupwise.rollouts.base import Request, Sampler, Sampling
from groupwise.rollouts.driver import gather, wait_for
from groupwise.rollouts.episodes import Draw, Episodes
from groupwise.tasks.base import Task
from groupwise.types import Group, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollouts:
    """Everything that makes groups: an engine, a task to score them, and how prompts are written and completions drawn."""

    sampler: Sampler
    task: Task
    chat: Chat
    sampling: Sampling
    episodes: Episodes | None = None
    """Holds conversations with environments; None: a completion is one turn."""
    wait: Callable[[Coroutine[Any, Any, Any]], Any] = wait_for
    """Runs a coroutine to its end: in a loop of its own, or in the one in which other groups are under way."""

    def groups(self, problems: Sequence[Problem], n: int | Sequence[int], seed: int) -> tuple[list[Group], float]:
        """A group of n completions for each problem (or of its own n), each scored while others are still generated.

        `seed`: of all of them, which draw from consecutive ranges of it.

        Returns:
            The groups in the order of their problems, and the seconds that scores took longer than generation.
        """
        counts = [n] * len(problems) if isinstance(n, int) else n
        before = list(itertools.accumulate(counts, initial=0))[:-1]
        triples = zip(problems, counts, before, strict=True)
        return self.drawn([Order(problem, count, Draw(seed=seed, before=first)) for problem, count, first in triples])

    def drawn(self, orders: Sequence["Order"]) -> tuple[list[Group], float]:
        """The same, where each group has random numbers of its own."""
        found = self.wait(gather(*(self.group(order) for order in orders)))
        waited = time.perf_counter() - max((generated for _, generated in found), default=time.perf_counter())
        return [group for group, _ in found], waited

    async def group(self, order: "Order") -> tuple[Group, float]:
        """A group, scored, and when its last completion was there."""
        if self.episodes is not None:
            group, generated = await self.episodes.group(
                self.sampler, self.sampling, self.task, order.problem, order.n, order.draw
            )
        else:
            group, generated = await self._single_turn(order)
        # Whoever scored them, no number that is not finite goes further.
        return replace(group, scores=tuple(score.checked() for score in group.scores), position=order.position), generated

    async def _single_turn(self, order: "Order") -> tuple[Group, float]:
        request = Request(
            prompt=self.chat.encode(order.problem.prompt),
            sampling=self.sampling,
            seed=order.draw.seed,
            offset=order.draw.before * self.sampling.max_tokens,
            n=order.n,
        )
        completions = await self.sampler.generate(request)
        generated = time.perf_counter()
        scores = tuple(await self.task.score(order.problem, completions))
        found = Group(problem=order.problem, prompt_tokens=request.prompt, completions=completions, scores=scores)
        return found, generated


@dataclass(frozen=True, slots=True)
class Order:
    """A group that is to be made."""

    problem: Problem
    n: int
    """Completions."""
    draw: Draw
    position: int | None = None
    """Its place among all groups of the run; None: it is not trained on."""
