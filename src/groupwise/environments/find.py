"""Which environments a recipe's [environment] and its task mean."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groupwise.config import EnvironmentSection, Source
from groupwise.environments.describing import Refused, describe
from groupwise.environments.kinds import Kind
from groupwise.errors import UserError
from groupwise.plugins import UserFunction, find_file
from groupwise.types import Problem
from groupwise.workers import Target

COLUMN = "environment"
"""The column of a problem that names its environment, where a recipe has several."""


class Environments:
    """The kinds of environment of a run."""

    def __init__(
        self,
        kinds: Mapping[str | None, Kind],
        correct_above: float | None,
        *,
        prompt_key: str = "prompt",
        answer_key: str = "answer",
    ) -> None:
        """
        Args:
            kinds: by the name in a problem's `environment` column; one under None serves every problem.
            correct_above: a conversation is correct when get_reward() is above it; None: rewards are graded.
            prompt_key, answer_key: the columns that prompt and answer came from.
        """
        self.kinds, self.correct_above = kinds, correct_above
        self._keys = prompt_key, answer_key

    def name_of(self, problem: Problem) -> str | None:
        """Under which name the problem's environment is found.

        Raises:
            UserError: the problem names none of them.
        """
        if None in self.kinds:
            return None
        name = problem.metadata.get(COLUMN)
        if name not in self.kinds:
            known = sorted(map(str, self.kinds))
            raise UserError(f"problem {problem.id!r}: its column {COLUMN!r} is {name!r}, not one of {known}")
        return str(name)

    def row(self, problem: Problem) -> dict[str, Any]:
        """What reset() is called with: the problem's columns, the prompt and the answer."""
        prompt_key, answer_key = self._keys
        row = {prompt_key: problem.prompt, answer_key: problem.answer, **problem.metadata}
        if None not in self.kinds:
            del row[COLUMN]  # it chose the class, and is not of its own columns
        return row


@dataclass(frozen=True, slots=True)
class Found:
    """A class or function: one that is shipped, and runs in this process, or one of the user's, which worker processes load."""

    function: Callable[..., Any] | None
    """Shipped."""
    target: Target | None
    """The user's."""

    @classmethod
    def of(cls, reference: str | UserFunction, base: Path) -> "Found":
        """What a recipe's "file.py:name" means, or what Python gave.

        Raises:
            UserError: there is no such file, or it cannot be passed to another process.
        """
        if isinstance(reference, str):
            return cls(None, Target.in_file(*find_file(reference, base)))
        try:
            return cls(None, Target.of(reference.function))
        except ValueError as error:
            raise UserError(f"{reference.reference} cannot run in another process: {error}") from error

    def elsewhere(self) -> Target | None:
        """As a worker process loads it."""
        return Target.of(self.function) if self.target is None and self.function is not None else self.target


def kind_of(made: Found, functions: Sequence[Found]) -> Kind:
    """
    Raises:
        UserError: see `Kind.of`.
    """
    if all(part.target is None for part in (made, *functions)):
        return Kind.of(made.function, [tool.function for tool in functions if tool.function is not None])
    return describe(made.elsewhere(), [target for tool in functions if (target := tool.elsewhere()) is not None])


def find_environments(settings: EnvironmentSection, task: Any, source: Source) -> Environments | None:
    """The environments of a recipe: those that [environment] names, or else the task's own; None: turns are not answered.

    Raises:
        UserError: a class or a tool cannot be found or used.
    """
    base = Path(source.path).parent

    def found(reference: str | UserFunction, key: str) -> Found:
        try:
            return Found.of(reference, base)
        except UserError as error:
            raise source.error(key, str(error)) from error

    functions = [found(tool, "environment.tools") for tool in settings.tools]
    functions = functions or [Found(tool, None) for tool in getattr(task, "tools", ())]
    named: dict[str | None, str | UserFunction] = {}
    if isinstance(settings.kind, dict):
        named |= {str(name): item for name, item in settings.kind.items()}
    elif settings.kind is not None:
        named[None] = settings.kind
    classes: dict[str | None, Found]
    classes = {name: found(item, "environment.class") for name, item in named.items()}
    above = settings.correct_above
    if not classes:
        classes = {None: Found(getattr(task, "environment", None), None)}
        above = getattr(task, "correct_above", None) if above is None else above
    if not functions and all(item.target is None and item.function is None for item in classes.values()):
        return None
    keys = {key: getattr(task, key) for key in ("prompt_key", "answer_key") if hasattr(task, key)}
    try:
        return Environments({name: kind_of(item, functions) for name, item in classes.items()}, above, **keys)
    except UserError as error:
        key = error.key if isinstance(error, Refused) else None
        raise source.error(f"environment.{key or ('class' if named else 'tools')}", str(error)) from error
