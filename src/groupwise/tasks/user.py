"""A task of the user's own: `name = "tasks.py:MyTask"` in a recipe's [task].

A class with problem(position, seed), held_out(count) and score(problem, completions), as `groupwise.tasks.base.Task` says; score
may be async or not, and demonstration(position, seed) is only needed for `groupwise sft`. The other keys of [task] are its
settings: the fields of a pydantic model, or the keyword arguments of a plain class.

The object lives in a worker process (`groupwise.tasks.hosted`), one call at a time, and is made again where that process ends.
Calls of an async score run at once, in a second process.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from groupwise.config import Source
from groupwise.errors import UserError
from groupwise.tasks.hosted import Method
from groupwise.types import Completion, Demonstration, Problem, Score
from groupwise.workers import Pool, Target, WorkerError, wait_elsewhere
from groupwise.workers.worker import LOAD_LIMIT

LIMIT = "reward_timeout"
"""The key of [task] with the seconds that score() may take; it is no setting of the class."""
AT_ONCE = 256
"""Held-out problems that are fetched at once."""


class UserTask:
    """An object of the user's class in a worker process."""

    def __init__(self, settings: dict[str, Any], source: Source, limit: float) -> None:
        """
        Args:
            settings: the table, without `LIMIT`.
            limit: seconds for the scores of one group.

        Raises:
            UserError: there is no such class, it lacks a method, or a setting is wrong.
        """
        self._pool, self._limit = Pool(1), limit
        self._short = Path(str(settings["name"])).name
        try:
            self._targets = {
                name: Target.of(Method(settings, source, name))
                for name in ("about", "problem", "held_out", "score", "score_asynchronously", "demonstration")
            }
        except ValueError as error:
            raise source.error("task", f"its settings cannot be passed to another process: {error}") from error
        known = self._ask("about", of_file=True)
        self.name: str = known["reference"]
        self._asynchronous: bool = known["asynchronous"]
        own = {key: value for key, value in settings.items() if key != "name"}
        self.settings: dict[str, Any] = own if known["settings"] is None else known["settings"]

    @classmethod
    def build(cls, settings: dict[str, Any], source: Source) -> "UserTask":
        """The task that [task] names and describes.

        Raises:
            UserError: there is no such class, it lacks a method, or a setting is wrong.
        """
        own = {key: value for key, value in settings.items() if key != LIMIT}
        limit = settings.get(LIMIT, 60.0)
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
            raise source.error(f"task.{LIMIT}", f"expected a number of seconds above 0, not {limit!r}")
        return cls(own, source, float(limit))

    def problem(self, position: int, seed: int) -> Problem:
        return _problem(self._ask("problem", position, seed))

    def held_out(self, count: int) -> list[Problem]:
        found: list[Problem] = []
        while len(found) < count:
            listed = self._ask("held_out", count, len(found), len(found) + AT_ONCE)
            found += map(_problem, listed)
            if len(listed) < AT_ONCE:
                break
        return found

    async def score(self, problem: Problem, completions: Sequence[Completion]) -> Sequence[Score]:
        target = self._targets["score_asynchronously" if self._asynchronous else "score"]
        passed = [_passed(completion) for completion in completions]
        try:
            reply = await self._pool.call(target, problem, passed, limit=self._limit, shared=self._asynchronous)
            return [Score(**{**tree, "steps": tuple(map(tuple, tree["steps"]))}) for tree in json.loads(reply.value)]
        except WorkerError as error:
            cause, said = str(error.kind), error.detail
            if said.startswith("UserError: "):
                cause, said = "wrong type", error.text
            failed = Score.failed(cause, f"{self._short}: {said}")
        except (ValueError, TypeError, KeyError) as error:  # code that changed what its process writes
            failed = Score.failed("bad result", f"{self._short}: what it returned cannot be read: {error}")
        return [failed] * len(completions)

    def demonstration(self, position: int, seed: int) -> Demonstration:
        tree = self._ask("demonstration", position, seed)
        return Demonstration(**{**tree, "prompt": _prompt(tree["prompt"]), "messages": tuple(tree["messages"])})

    def model_dump(self) -> dict[str, Any]:
        return {"name": self.name, LIMIT: self._limit, **self.settings}

    def _ask(self, name: str, *arguments: Any, of_file: bool = False) -> Any:
        """What a method returned.

        Args:
            of_file: what is wrong with it is said of the recipe's or the task's file, and not of a method.

        Raises:
            UserError: it raised, took longer than `LOAD_LIMIT`, or ended its process.
        """
        shown = "" if of_file else f"{name}({', '.join(map(repr, arguments[: 2 if name != 'held_out' else 1]))}): "
        try:
            return json.loads(wait_elsewhere(self._pool.call(self._targets[name], *arguments, limit=LOAD_LIMIT)).value)
        except WorkerError as error:
            if error.detail.startswith("UserError: "):
                raise UserError(error.text if of_file else f"{self._short}: {error.text}") from error
            what = error.detail if error.kind == "raised" else f"{error.kind}: {error.detail}"
            raise UserError(f"{self._short}: {shown}{what}") from error
        except (ValueError, TypeError) as error:  # code that changed what its process writes
            raise UserError(f"{self._short}: {shown}what it returned cannot be read: {error}") from error


def _problem(tree: dict[str, Any]) -> Problem:
    return Problem(**{**tree, "prompt": _prompt(tree["prompt"])})


def _prompt(prompt: Any) -> Any:
    return prompt if isinstance(prompt, str) else tuple(prompt)


def _passed(completion: Completion) -> Completion:
    """A completion for another process: tensors of their own, not views of whole batches, and nothing of the sampler's."""
    tensors = {name: getattr(completion, name).detach().cpu().clone() for name in ("tokens", "logprobs", "mask")}
    return replace(completion, **tensors, kept=None, handle=None)
