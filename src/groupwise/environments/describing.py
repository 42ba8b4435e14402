"""What a user's environment class and tools offer, found out in a worker process: to look at them runs them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import loads
from typing import Any

from groupwise.environments.kinds import Kind
from groupwise.errors import UserError
from groupwise.plugins import load_function
from groupwise.workers import Pool, Target, WorkerError, wait_elsewhere
from groupwise.workers.worker import LOAD_LIMIT


class Refused(UserError):
    """A class or tool that cannot be used."""

    def __init__(self, text: str, key: str | None) -> None:
        """`key`: of [environment], where it is known; None: one of "class" and "tools"."""
        super().__init__(text)
        self.key = key


def describe(made: Target | None, functions: Sequence[Target]) -> Kind:
    """The kind of environment that a class, or none, and functions are.

    Raises:
        Refused: one of them cannot be loaded, or see `Kind.of`.
    """
    try:
        reply = wait_elsewhere(Pool(1).call(Target.of(look_at), made, list(functions), limit=LOAD_LIMIT))
    except WorkerError as error:
        raise Refused(error.text if error.detail.startswith("UserError: ") else f"{error.kind}: {error.detail}", None) from error
    found = reply.value
    if "refused" in found:
        raise Refused(found["refused"], found["key"])
    return Kind(
        make=None,
        names=tuple(found["names"]),
        schemas=tuple(found["schemas"]),
        has_reward=found["has_reward"],
        has_step=found["has_step"],
        rewards_turns=found["rewards_turns"],
        targets=(made, *functions),
    )


def look_at(made: Target | None, functions: Sequence[Target]) -> Mapping[str, Any]:
    """In the worker process: what a `Kind` holds."""
    key = "tools"
    try:
        loaded = [_load(function) for function in functions]
        key = "class"
        kind = None if made is None else _load(made)
    except UserError as error:
        return {"refused": str(error), "key": key}
    found = Kind.of(kind, loaded)
    fields = ("names", "schemas", "has_reward", "has_step", "rewards_turns")
    return {name: getattr(found, name) for name in fields}


def _load(target: Target) -> Any:
    return load_function(f"{target.file}:{target.name}", Path()).function if target.file else loads(target.value)
