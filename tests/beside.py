"""A native sampler that generates while the learner computes: in a thread of its own, from its own copy of the weights.

Run as a program, `python -m tests.beside RUN RECIPE SETTING...` begins a run with it, for tests that kill it.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from groupwise.learner.local import LocalLearner
from groupwise.rollouts.base import Request
from groupwise.rollouts.driver import LoopThread
from groupwise.terminal import Terminal
from groupwise.training import session
from groupwise.training.loop import Trainer
from groupwise.training.records import RunDirectory
from groupwise.training.setup import Ready, load_policy
from groupwise.types import Completion, Metrics


class Beside:
    """A learner, and a sampler that takes the longer the longer its completions are."""

    def __init__(self, ready: Ready, *, delay: float = 0.0) -> None:
        """`delay`: seconds for each token of a group's longest completion, after it."""
        self.ready = ready
        self.learner, self.delay = LocalLearner.build(ready.recipe, ready.algorithm, ready.model), delay
        self.thread, self.native = LoopThread("sampler"), ready.make_sampler(load_policy(ready.recipe, ready.source))
        self.learns = False
        """Whether the learner has groups whose weights are not out."""
        self.under_way = self.most = 0
        """Requests now, and at most."""
        self.loops: set[Any] = set()
        """From which it was called."""

    @property
    def sampler(self) -> "Beside":
        return self

    async def generate(self, request: Request) -> tuple[Completion, ...]:
        self.loops.add(asyncio.get_running_loop())
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            future = asyncio.run_coroutine_threadsafe(self.native.generate(request), self.thread.loop)
            found = await asyncio.wrap_future(future)
            await asyncio.sleep(self.delay * max(len(completion.tokens) for completion in found))
            return found
        finally:
            self.under_way -= 1

    def hold(self, steps: int) -> None:
        """While the learner computes, make so many decoding steps and no more, so that new weights come in the middle."""
        advance, left = self.native._advance, [steps]  # type: ignore[attr-defined]

        def advance_or_wait() -> None:
            if self.learns and left[0] == 0:
                time.sleep(0.002)
            else:
                left[0] = left[0] - 1 if self.learns else steps
                advance()

        self.native._advance = advance_or_wait  # type: ignore[attr-defined]

    def health(self) -> dict[str, float]:
        return self.native.health()

    def bring_weights(self) -> None:
        async def load() -> None:
            self.native.load(self.learner.weights(), self.learner.version)

        self.thread.wait_for(load())
        self.learns = False

    def restart_learner(self) -> None:
        ready = self.ready
        fresh = LocalLearner.build(ready.recipe, ready.algorithm, load_policy(ready.recipe, ready.source))
        self.learner.__dict__.update(fresh.__dict__)

    def notes(self) -> list[str]:
        return []

    def metrics(self) -> Metrics:
        return {}


@contextlib.contextmanager
def beside(ready: Ready, directory: RunDirectory, *, stop_after: int = 0) -> Iterator[Beside]:
    """A `Launch`. `stop_after`: a step after which the process is asked to stop, as Ctrl-C does."""
    pieces = Beside(ready, delay=0.01)
    bring = pieces.bring_weights

    def bring_and_stop() -> None:
        bring()
        if pieces.learner.version >= stop_after * ready.recipe.learner.minibatches:
            os.kill(os.getpid(), signal.SIGINT)

    if stop_after:
        pieces.bring_weights = bring_and_stop  # type: ignore[method-assign]
    try:
        yield pieces
    finally:
        pieces.thread.close()


def trainer_of(ready: Ready, path: Path, *, delay: float = 0.0) -> tuple[Trainer, Beside]:
    """A trainer whose learner and sampler are `Beside`."""
    directory = RunDirectory(path, ready.tokenizer)
    directory.create({})
    pieces = Beside(ready, delay=delay)
    return Trainer(ready, directory, pieces=pieces), pieces


if __name__ == "__main__":
    run, recipe, *settings = sys.argv[1:]
    session.run(session.plan(recipe, out=Path(run), overrides=settings), Terminal(), launch=beside)
