"""One conversation's environment, and what its calls may return: failures are told apart from errors of a tool."""

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from groupwise.environments.kinds import Kind, tool_methods
from groupwise.types import Message


class EnvironmentFailed(Exception):
    """An environment cannot go on: its conversation is set aside."""

    def __init__(self, cause: str, detail: str) -> None:
        """`cause`: as in `Score.failure`; `detail`: for a person to read."""
        super().__init__(f"{cause}: {detail}")
        self.cause, self.detail = cause, detail


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool call came to."""

    content: str
    """For the tool's message."""
    error: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What a simulated user says to a turn of the model."""

    messages: tuple[Message, ...]
    reward: float | None
    done: bool


class Instance(Protocol):
    """The environment of one conversation. Every method may raise `EnvironmentFailed`."""

    async def reset(self, row: Mapping[str, Any]) -> str | None:
        """Begin; returns what is appended to the prompt."""
        ...

    async def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Call a tool. What it raises is a result, for the model to read."""
        ...

    async def step(self, message: Message) -> Answer:
        """The simulated user's answer."""
        ...

    async def turn_reward(self) -> float | None:
        """What the last turn earned; None: nothing. Asked once for each turn."""
        ...

    async def get_reward(self) -> float:
        """The reward of the conversation."""
        ...


class LocalInstance:
    """An instance in this process, for the shipped ones: they neither wait nor compute."""

    def __init__(self, kind: Kind) -> None:
        self._environment = kind.make() if kind.make is not None else None
        self._has_tools = bool(kind.schemas)
        self._tools = {function.__name__: function for function in kind.functions} | tool_methods(self._environment)

    async def reset(self, row: Mapping[str, Any]) -> str | None:
        if self._environment is None:
            return None
        return as_observation(await _guarded("reset()", self._environment.reset, **row))

    async def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        try:
            return ToolResult(str(await _result(self._tools[name], **arguments)))
        except Exception as error:  # a tool may raise anything, and the model is told
            return ToolResult(error_text(str(error)), error=True)

    async def step(self, message: Message) -> Answer:
        assert self._environment is not None
        return as_answer(await _guarded("step()", self._environment.step, message), self._has_tools)

    async def turn_reward(self) -> float | None:
        reward = getattr(self._environment, "turn_reward", None)
        if reward is None:
            return None
        setattr(self._environment, "turn_reward", None)  # noqa: B010 of whatever class
        return as_reward("turn_reward", reward)

    async def get_reward(self) -> float:
        assert self._environment is not None
        return as_reward("get_reward()", await _guarded("get_reward()", self._environment.get_reward))


async def _guarded(name: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """The function's result; what it raises is a failure of the environment."""
    try:
        return await _result(function, *arguments, **named)
    except Exception as error:  # an environment may raise anything
        raise EnvironmentFailed("raised", f"{name}: {type(error).__name__}: {error}") from error


async def _result(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    result = function(*arguments, **named)
    return await result if isinstance(result, Awaitable) else result


def error_text(text: str) -> str:
    """What the model reads of an error, as in TRL."""
    return str({"error": text})


def as_observation(value: Any) -> str | None:
    """
    Raises:
        EnvironmentFailed: it is no text.
    """
    if value is not None and not isinstance(value, str):
        raise EnvironmentFailed("wrong type", f"reset() returned {type(value).__name__}; expected a text or None")
    return value


def as_reward(name: str, value: Any) -> float:
    """
    Raises:
        EnvironmentFailed: it is no finite number.
    """
    if value is None:
        raise EnvironmentFailed("none", f"{name} returned None")
    try:
        reward = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise EnvironmentFailed("wrong type", f"{name} returned {type(value).__name__}; expected a number") from error
    if not math.isfinite(reward):
        raise EnvironmentFailed("not finite", f"{name} returned {reward}")
    return reward


def as_answer(value: Any, has_tools: bool) -> Answer:
    """
    Args:
        has_tools: whether messages of tools can be among what step() returned.

    Raises:
        EnvironmentFailed: it is not (messages, reward or None, done).
    """
    expected = "expected (messages, reward or None, done)"
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 3:
        raise EnvironmentFailed("wrong type", f"step() returned {type(value).__name__}; {expected}")
    messages, reward, done = value
    known = isinstance(messages, Sequence) and all(isinstance(m, Mapping) and m.get("role") in ("user", "tool") for m in messages)
    if not known or not isinstance(done, bool):
        raise EnvironmentFailed("wrong type", f"step() returned messages {messages!r} and done {done!r}; {expected}")
    if not all(isinstance(message.get("content"), str) for message in messages):
        raise EnvironmentFailed("wrong type", f"step() returned messages {messages!r}; expected a text as the content of each")
    roles = [message["role"] for message in messages]
    if "tool" in roles and not has_tools:
        raise EnvironmentFailed("wrong type", "step() returned a message of a tool, and there are no tools")
    if roles != sorted(roles):
        raise EnvironmentFailed("wrong type", f"step() returned messages of {', '.join(roles)}; expected those of tools first")
    return Answer(tuple(messages), None if reward is None else as_reward("step()", reward), done)
