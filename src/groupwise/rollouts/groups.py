"""From problems to scored groups: completions sampled and scored, many groups at once, in training and on held-out problems."""

import functools
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from groupwise.models import Chat
from groupwise.rollouts.base import Request, Sampler, Sampling, requests
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

    def groups(self, problems: Sequence[Problem], n: int | Sequence[int], seed: int) -> tuple[list[Group], float]:
        """A group of n completions for each problem (or of its own n), each scored while others are still generated.

        Returns:
            The groups in the order of their problems, and the seconds that scores took longer than generation.
        """
        if self.episodes is not None:
            hold = functools.partial(self.episodes.group, self.sampler, self.sampling, self.task)
            counts = [n] * len(problems) if isinstance(n, int) else n
            before = itertools.accumulate(counts, initial=0)
            draws = [Draw(seed=seed, before=count) for count in before][:-1]
            found = wait_for(gather(*(hold(*triple) for triple in zip(problems, counts, draws, strict=True))))
        else:
            prompts = [self.chat.encode(problem.prompt) for problem in problems]
            pairs = zip(problems, requests(prompts, n, self.sampling, seed), strict=True)
            found = wait_for(gather(*(self._group(problem, request) for problem, request in pairs)))
        waited = time.perf_counter() - max((generated for _, generated in found), default=time.perf_counter())
        # Whoever scored them, no number that is not finite goes further.
        return [replace(group, scores=tuple(score.checked() for score in group.scores)) for group, _ in found], waited

    async def _group(self, problem: Problem, request: Request) -> tuple[Group, float]:
        """A group, scored, and when its last completion was there."""
        completions = await self.sampler.generate(request)
        generated = time.perf_counter()
        scores = await self.task.score(problem, completions)
        return Group(problem=problem, prompt_tokens=request.prompt, completions=completions, scores=tuple(scores)), generated
