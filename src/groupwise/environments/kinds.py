"""What a kind of environment offers: TRL's environment class as it is, and tool functions beside it.

    class Game:
        def reset(self, **row): ...        called with the row's columns; a text that it returns is appended to the prompt
        def look(self, where: str): ...    every other public method is a tool: typed, with a Google docstring
        def get_reward(self): ...          the episode's reward; may be async; without it the task scores the completion

Beyond TRL, a class may have

        turn_reward = None                 an attribute: what the last turn earned. Read, and set to None, after each turn
        async def step(self, message)      a simulated user: called with each turn of the model that calls no tool; returns
                                           (messages that answer it, a reward or None, whether the conversation is over).
                                           A `step` with other arguments is a tool, as in TRL
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils import get_json_schema

from groupwise.errors import UserError
from groupwise.workers import Target
from groupwise.workers.child import text_of

RESERVED = ("reset", "get_reward")
"""Methods that are no tools."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Kind:
    """An environment class, or none, and tool functions."""

    make: Callable[[], Any] | None
    """Makes an instance in this process, which serves one conversation at a time; None: there are only functions, or instances
    live elsewhere."""
    functions: tuple[Callable[..., Any], ...] = ()
    """Tools of this process that belong to no instance."""
    names: tuple[str, ...] = ()
    """Of the functions."""
    schemas: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of all tools, for the chat template."""
    has_reward: bool = False
    has_step: bool = False
    rewards_turns: bool = False
    """Whether instances have the attribute `turn_reward`."""
    targets: tuple[Target | None, ...] = ()
    """The class, or None, and the functions as worker processes load them; empty: they run in this process."""

    @classmethod
    def of(
        cls,
        make: Callable[[], Any] | None,
        functions: Sequence[Callable[..., Any]] = (),
    ) -> "Kind":
        """Look at a class, by making an instance of it, and at functions.

        Raises:
            UserError: an instance cannot be made, has no reset(), or a tool is not described well enough to be called.
        """
        instance = None
        name = getattr(make, "__name__", str(make))
        if make is not None:
            try:
                instance = make()
            except BaseException as error:  # the user's class may raise anything
                raise UserError(f"{name}(): {type(error).__name__}: {text_of(error)}") from error
            if not callable(getattr(instance, "reset", None)):
                raise UserError(f"{name} has no reset(): it is called with the row's columns before each conversation")
        methods = tool_methods(instance)
        names = [*(function.__name__ for function in functions), *methods]
        if classes := [function.__name__ for function in functions if isinstance(function, type)]:
            raise UserError(f"{classes[0]} is a class, and tools are functions; environment.class takes classes")
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise UserError(f"two tools are named {twice[0]!r}")
        return cls(
            make=make,
            functions=tuple(functions),
            names=tuple(function.__name__ for function in functions),
            schemas=tuple(schema(tool) for tool in (*functions, *methods.values())),
            has_reward=hasattr(instance, "get_reward"),
            has_step=answers_turns(instance),
            rewards_turns=hasattr(instance, "turn_reward"),
        )

    @property
    def tool_names(self) -> list[str]:
        return [str(tool["function"]["name"]) for tool in self.schemas]


def tool_methods(instance: Any) -> dict[str, Callable[..., Any]]:
    """An instance's tools by name: its public methods, but for those that the protocol names."""
    found = inspect.getmembers(type(instance), predicate=inspect.isfunction) if instance is not None else []
    reserved = (*RESERVED, "step") if answers_turns(instance) else RESERVED
    return {name: getattr(instance, name) for name, _ in found if not name.startswith("_") and name not in reserved}


def answers_turns(instance: Any) -> bool:
    """Whether its `step` is a simulated user's, which takes a message and nothing else, and no tool."""
    step = getattr(instance, "step", None)
    return callable(step) and list(inspect.signature(step).parameters) == ["message"]


def schema(tool: Callable[..., Any]) -> Mapping[str, Any]:
    """A tool's JSON schema, from its types and its Google docstring.

    Raises:
        UserError: an argument has no type, or no description.
    """
    try:
        found: Mapping[str, Any] = get_json_schema(tool)
    except Exception as error:  # transformers raises several kinds of its own
        raise UserError(f"tool {getattr(tool, '__name__', tool)}: {error}") from error
    return found
