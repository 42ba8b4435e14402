"""A user's task in its worker process: the object of the user's class, and what it returns as JSON.

Nothing here runs in the process that trains. See `groupwise.tasks.user`.
"""

import functools
import inspect
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from json import dumps  # by name, since the user's code can put another in its module
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from groupwise.config import Source, explain
from groupwise.errors import UserError, nearest
from groupwise.plugins import load_function
from groupwise.types import Completion, Demonstration, Problem, Score

NEEDED = {"problem": "(position, seed)", "held_out": "(count)", "score": "(problem, completions)"}


@dataclass(frozen=True)
class Method:
    """A method of the task that a recipe describes, bound where it is unpickled: in a worker process."""

    settings: Mapping[str, Any]
    source: Source
    name: str

    def __reduce__(self) -> tuple[Any, ...]:
        return _bound, (pickle.dumps((dict(self.settings), self.source)), self.name)


def _bound(described: bytes, name: str) -> Callable[..., Any]:
    return getattr(_hosted(described), name)  # type: ignore[no-any-return]


@functools.cache
def _hosted(described: bytes) -> "HostedTask":
    """The task, once in each process."""
    return HostedTask.build(*pickle.loads(described))


class HostedTask:
    """An object of the user's class, with what it returns checked. Every method returns JSON."""

    def __init__(self, reference: str, task: Any, settings: dict[str, Any] | None) -> None:
        """`settings`: of a pydantic model, its defaults included."""
        self.reference, self.task, self.settings = reference, task, settings
        self.held: dict[int, list[Any]] = {}

    @classmethod
    def build(cls, settings: dict[str, Any], source: Source) -> "HostedTask":
        """The task that [task] names and describes.

        Raises:
            UserError: there is no such class, it lacks a method, or a setting is wrong.
        """
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
        if not issubclass(kind, BaseModel):
            return cls(found.reference, _made(kind, settings, found.reference, source), None)
        try:
            task = kind.model_validate({"name": found.reference, **settings} if "name" in kind.model_fields else settings)
        except ValidationError as error:
            raise explain(error, kind, source, "task.") from error
        dumped = {key: value for key, value in task.model_dump().items() if key != "name"}
        try:
            plain(dumped)
        except ValueError:  # as a recipe can hold it
            dumped = {key: value for key, value in task.model_dump(mode="json").items() if key != "name"}
        return cls(found.reference, task, dumped)

    def about(self) -> str:
        """What the other process must know of it."""
        known = {"asynchronous": inspect.iscoroutinefunction(self.task.score), "settings": self.settings}
        return dumps({"reference": self.reference, **known})

    def problem(self, position: int, seed: int) -> str:
        return dumps(_problem(self.task.problem(position, seed), f"problem({position}, {seed})"))

    def held_out(self, count: int, start: int, end: int) -> str:
        """Those from `start` to `end` of what held_out(count) returns."""
        if count not in self.held:
            found = self.task.held_out(count)
            if not isinstance(found, Sequence) or not found:
                raise UserError(f"held_out({count}) returned {found!r:.200}; expected a list of problems, not empty")
            self.held[count] = [_problem(problem, f"held_out({count})") for problem in list(found)[:count]]
        return dumps(self.held[count][start:end])

    def score(self, problem: Problem, completions: Sequence[Completion]) -> str:
        return _scores(self.task.score(problem, completions), len(completions))

    async def score_asynchronously(self, problem: Problem, completions: Sequence[Completion]) -> str:
        return _scores(await self.task.score(problem, completions), len(completions))

    def demonstration(self, position: int, seed: int) -> str:
        if not callable(getattr(self.task, "demonstration", None)):
            raise UserError("has no demonstration(position, seed), which groupwise sft needs")
        shown = self.task.demonstration(position, seed)
        if not isinstance(shown, Demonstration):
            raise UserError(f"demonstration() returned {type(shown).__name__}; expected groupwise.types.Demonstration")
        return dumps(_tree(shown, "demonstration()"))


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


def _problem(problem: Any, method: str) -> dict[str, Any]:
    if not isinstance(problem, Problem):
        name = method.partition("(")[0]
        raise UserError(f"{name}() returned {type(problem).__name__}; expected groupwise.types.Problem")
    return _tree(problem, method)


TEXTS = ("id", "answer", "completion")
"""Fields that are texts."""


def _tree(value: Any, method: str) -> dict[str, Any]:
    """A problem or a demonstration as JSON can hold it."""
    tree = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if field.name in TEXTS and not isinstance(item, str):
            raise UserError(f"{method}: its {field.name} is {item!r:.100}; expected a text")
        try:
            tree[field.name] = plain(item)
        except ValueError as error:
            raise UserError(f"{method}: its {field.name} {error}") from error
    prompt = tree["prompt"]
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(isinstance(item, dict) for item in prompt)):
        raise UserError(f"{method}: its prompt is {value.prompt!r:.100}; expected a text, or messages")
    return tree


def plain(value: Any, depth: int = 0) -> Any:
    """A value as JSON holds it, numpy's numbers as Python's and tuples as lists.

    Raises:
        ValueError: it holds something else, or an integer that cannot be written.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Integral):
        return int(str(int(value)))  # Python writes and reads no integer of more than some thousands of digits
    if isinstance(value, Real):
        return float(value)
    if depth > 32:
        raise ValueError("is nested too deep")
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str(key): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, depth + 1) for item in value]
    what = "a mapping whose keys are no texts" if isinstance(value, Mapping) else f"a value of type {type(value).__name__}"
    raise ValueError(f"holds {what}; it may hold numbers, texts, None, and lists and mappings of these")


def _scores(scores: Any, count: int) -> str:
    """Scores as JSON.

    Raises:
        UserError: it is not a score for each completion.
    """
    if not isinstance(scores, Sequence) or len(scores) != count or not all(isinstance(item, Score) for item in scores):
        raise UserError(f"score() returned {scores!r:.200}; expected {count} groupwise.types.Score")
    return dumps([_score(score) for score in scores])


def _score(score: Score) -> dict[str, Any]:
    checked = score.checked()
    checked = replace(checked, correct=None if checked.correct is None else bool(checked.correct))
    return {field.name: plain(getattr(checked, field.name)) for field in fields(checked)}
