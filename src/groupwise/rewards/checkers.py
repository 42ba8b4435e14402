"""Judges of one answer against the reference answer."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groupwise.rewards.base import Progress, Rated
from groupwise.types import Completion, Problem, Verdict
from groupwise.workers import Target, WorkerError

InWorker = Callable[..., Awaitable[Any]]
"""Calls a `Target` with the given arguments in a worker process."""


def exact(answer: str, text: str) -> Verdict:
    """Right when the completion, without white space around it, is the answer."""
    return "correct" if text.strip() == answer.strip() else "wrong"


def last_line(answer: str, text: str) -> Verdict:
    """Right when the completion's last line that is not empty is the answer; unparsed when there is none."""
    lines = text.strip().splitlines()
    if not lines:
        return "unparsed"
    return "correct" if lines[-1].strip() == answer.strip() else "wrong"


TIME_LIMIT = 5.0
"""Seconds of computing for one answer: simplifying what a model wrote can take forever."""
MATH = Target.in_file(Path(__file__).with_name("math_answers.py"), "verdict")


async def math(answer: str, text: str, in_worker: InWorker) -> Verdict:
    """Right when the mathematical expression at the end of the completion equals the answer's (the library math-verify).

    It is judged in a worker process, since some expressions hold the interpreter in one call that nothing else can stop.

    Raises:
        WorkerError: it takes longer than `TIME_LIMIT`.
    """
    verdict: Verdict = await in_worker(MATH, answer, text)
    return verdict


CHECKERS: dict[str, Callable[[str, str], Verdict]] = {"exact": exact, "last_line": last_line}
"""Those that answer at once."""
SLOW_CHECKERS: dict[str, Callable[[str, str, InWorker], Awaitable[Verdict]]] = {"math": math}
"""Those that wait for a worker process."""


@dataclass(frozen=True, slots=True)
class CheckerReward:
    """A checker as a reward: 1 for a right answer, else 0."""

    name: str
    in_worker: InWorker

    async def rate(self, problem: Problem, completions: Sequence[Completion], progress: Progress) -> Sequence[Rated]:
        if self.name in CHECKERS:
            return [_rated(CHECKERS[self.name](problem.answer, completion.answer)) for completion in completions]
        return await asyncio.gather(*(self._slow(problem.answer, completion.answer) for completion in completions))

    async def _slow(self, answer: str, text: str) -> Rated:
        try:
            return _rated(await SLOW_CHECKERS[self.name](answer, text, self.in_worker))
        except WorkerError as error:
            return Rated(failure=error.kind, detail=f"{self.name}: {error.detail}, on {text[-80:]!r}")


def _rated(verdict: Verdict) -> Rated:
    return Rated(reward=float(verdict == "correct"), verdict=verdict)
