"""A task of the user's own: `name = "tasks.py:MyTask"` in a recipe's [task].

A class with problem(position, seed), held_out(count) and score(problem, completions), as `groupwise.tasks.base.Task` says; score
may be async or not, and demonstration(position, seed) is only needed for `groupwise sft`. The other keys of [task] are its
settings: the fields of a pydantic model, or the keyword arguments of a plain class.
"""

import asyncio
import inspect
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from groupwise.config import Source, explain
from groupwise.errors import UserError, nearest
from groupwise.plugins import load_function
from groupwise.types import Completion, Demonstration, Problem, Score

NEEDED = {"problem": "(position, seed)", "held_out": "(count)", "score": "(problem, completions)"}


class UserTask:
    """An object of the user's class, with what it returns checked."""

    def __init__(self, reference: str, task: Any, settings: dict[str, Any]) -> None:
        """`settings`: what it was made from, without its name."""
        self.name, self.task, self.settings = reference, task, settings
        self._short = f"{Path(reference.rpartition(':')[0]).name}:{reference.rpartition(':')[2]}"
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="score")

    @classmethod
    def build(cls, settings: dict[str, Any], source: Source) -> "UserTask":
        """The task that [task] names and describes.

        Raises:
            UserError: there is no such class, it lacks a method, or a setting is wrong.
        """
        settings = dict(settings)
        try:
            found = load_function(settings.pop("name"), Path(source.path).parent)
        except UserError as error:
            raise source.error("task.name", str(error)) from error
        kind = found.function
        if not inspect.isclass(kind):
            raise source.error("task.name", f"{found.reference} is no class")
        missing = [f"{name}{form}" for name, form in NEEDED.items() if not callable(getattr(kind, name, None))]
        if missing:
            raise source.error("task.name", f"{found.reference} has no {' and no '.join(missing)}, which a task needs")
        if issubclass(kind, BaseModel):
            try:
                task = kind.model_validate({"name": found.reference, **settings} if "name" in kind.model_fields else settings)
            except ValidationError as error:
                raise explain(error, kind, source, "task.") from error
            settings = {key: value for key, value in task.model_dump().items() if key != "name"}
        else:
            task = _made(kind, settings, found.reference, source)
        return cls(found.reference, task, settings)

    def problem(self, position: int, seed: int) -> Problem:
        return self._checked("problem", self._call("problem", position, seed))

    def held_out(self, count: int) -> list[Problem]:
        problems = self._call("held_out", count)
        if not isinstance(problems, Sequence) or not problems:
            raise UserError(f"{self._short}: held_out({count}) returned {problems!r}; expected a list of problems, not empty")
        return [self._checked("held_out", problem) for problem in list(problems)[:count]]

    async def score(self, problem: Problem, completions: Sequence[Completion]) -> Sequence[Score]:
        """A method that is not async runs in a thread, one call at a time, beside generation."""
        try:
            if inspect.iscoroutinefunction(self.task.score):
                scores = await self.task.score(problem, completions)
            else:
                loop = asyncio.get_running_loop()
                scores = await loop.run_in_executor(self._thread, self.task.score, problem, completions)
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # the user's method may raise anything
            return [Score.failed("raised", f"{self._short}: {type(error).__name__}: {error}") for _ in completions]
        scores = list(scores) if isinstance(scores, Sequence) else scores
        if not isinstance(scores, list) or len(scores) != len(completions) or not all(isinstance(item, Score) for item in scores):
            raise UserError(f"{self._short}: score() returned {scores!r:.200}; expected {len(completions)} groupwise.types.Score")
        return scores

    def demonstration(self, position: int, seed: int) -> Demonstration:
        if not callable(getattr(self.task, "demonstration", None)):
            raise UserError(f"{self._short} has no demonstration(position, seed), which groupwise sft needs")
        shown = self._call("demonstration", position, seed)
        if not isinstance(shown, Demonstration):
            raise UserError(
                f"{self._short}: demonstration() returned {type(shown).__name__}; expected groupwise.types.Demonstration"
            )
        return shown

    def model_dump(self) -> dict[str, Any]:
        return {"name": self.name, **self.settings}

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self.task, name)(*arguments)
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # the user's method may raise anything
            shown = ", ".join(map(repr, arguments))
            raise UserError(f"{self._short}: {name}({shown}): {type(error).__name__}: {error}") from error

    def _checked(self, method: str, problem: Any) -> Problem:
        if not isinstance(problem, Problem):
            raise UserError(f"{self._short}: {method}() returned {type(problem).__name__}; expected groupwise.types.Problem")
        return problem


def _made(kind: type, settings: dict[str, Any], reference: str, source: Source) -> Any:
    """An object of a plain class."""
    parameters = inspect.signature(kind).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for key in settings:
            if key not in parameters:
                raise source.error(f"task.{key}", f"unknown key{nearest(key, parameters)}")
    for name, parameter in parameters.items():
        optional = parameter.default is not parameter.empty or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if not optional and name not in settings:
            raise source.error("task", f"{reference} needs {name}")
    try:
        return kind(**settings)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the user's class may raise anything
        raise source.error("task", f"{reference}: {type(error).__name__}: {error}") from error
