"""Judges of one answer against the reference answer."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from groupwise.environments.hosting import Lent
from groupwise.rewards.answers import answer_line, any_final, last_boxed, last_number
from groupwise.rewards.base import Progress, Rated
from groupwise.rewards.boxes import SandboxError
from groupwise.rewards.code import judge
from groupwise.rewards.countdown import countdown
from groupwise.rewards.sandbox import find_box
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


MOST_DIGITS = 1000
"""Characters of a number that is compared: Python refuses to convert thousands of digits, which models do write."""


def gsm8k(answer: str, text: str) -> Verdict:
    """Right when the number after the last "####" is the answer; unparsed when there is none.

    Raises:
        ValueError: the answer is no number; commas, a dollar sign and a full stop are taken off, as from what was said.
    """
    try:
        wanted = Fraction(answer.strip().removeprefix("$").replace(",", "").rstrip("."))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"the answer {answer[:80]!r} is no number") from error
    said = last_number(text)
    if said is None:
        return "unparsed"
    return "correct" if len(said) <= MOST_DIGITS and Fraction(said) == wanted else "wrong"


async def boxed(answer: str, text: str, in_worker: InWorker) -> Verdict:
    """Right when the last \\boxed{…} equals the answer (math-verify)."""
    return await _equal(answer, last_boxed(text), in_worker)


async def dapo(answer: str, text: str, in_worker: InWorker) -> Verdict:
    """Right when what follows "Answer:" in the last 300 characters, or else the last box there, equals the answer."""
    return await _equal(answer, answer_line(text), in_worker)


async def final(answer: str, text: str, in_worker: InWorker) -> Verdict:
    """Right when the number after "####", or else what follows "Answer:", or else the last box, equals the answer."""
    return await _equal(answer, any_final(text), in_worker)


async def _equal(answer: str, said: str | None, in_worker: InWorker) -> Verdict:
    if said is None:
        return "unparsed"
    bare = answer.strip().strip("$").strip()
    bare = last_boxed(bare) or bare
    if said == bare:
        return "correct"
    return await math(f"\\boxed{{{bare}}}", f"\\boxed{{{said}}}", in_worker)


async def code(answer: str, text: str, in_worker: InWorker) -> Verdict:
    """Right when the last block of Python passes every test, in the strongest sandbox that can be built here."""
    return await asyncio.to_thread(judge, answer, text, find_box())


async def code_in_processes(answer: str, text: str, in_worker: InWorker) -> Verdict:
    """As `code`, without a sandbox: programs run in processes with limits, and can read and write what this user can."""
    return await asyncio.to_thread(judge, answer, text, find_box(weaker=True))


CHECKERS: dict[str, Callable[[str, str], Verdict]] = {
    "exact": exact,
    "last_line": last_line,
    "gsm8k": gsm8k,
    "countdown": countdown,
}
"""Those that answer at once."""
SLOW_CHECKERS: dict[str, Callable[[str, str, InWorker], Awaitable[Verdict]]] = {
    "math": math,
    "boxed": boxed,
    "dapo": dapo,
    "final": final,
    "code": code,
    "code-in-processes": code_in_processes,
}
"""Those that wait for another process."""


@dataclass(frozen=True, slots=True)
class CheckerReward:
    """A checker as a reward: 1 for a right answer, else 0."""

    name: str
    in_worker: InWorker

    async def rate(
        self, problem: Problem, completions: Sequence[Completion], progress: Progress, environments: Lent | None = None
    ) -> Sequence[Rated]:
        if self.name in CHECKERS:
            return [self._fast(problem.answer, completion.answer) for completion in completions]
        return await asyncio.gather(*(self._slow(problem.answer, completion.answer) for completion in completions))

    def _fast(self, answer: str, text: str) -> Rated:
        try:
            return _rated(CHECKERS[self.name](answer, text))
        except Exception as error:  # the data set's answer and the model's text may be anything
            return Rated(failure="raised", detail=f"{self.name}: {error}")

    async def _slow(self, answer: str, text: str) -> Rated:
        try:
            return _rated(await SLOW_CHECKERS[self.name](answer, text, self.in_worker))
        except WorkerError as error:
            return Rated(failure=error.kind, detail=f"{self.name}: {error.detail}, on {text[-80:]!r}")
        except (SandboxError, ValueError, OSError, RecursionError) as error:  # no box could be built, or the tests cannot be read
            return Rated(failure="raised", detail=f"{self.name}: {error}")


def _rated(verdict: Verdict) -> Rated:
    return Rated(reward=float(verdict == "correct"), verdict=verdict)
