"""How models write tool calls, read from marked text (`ControlTokens.mark`): ordinary text that spells a marker is none.

The syntax is inferred from what the model's own template makes of calls that are known: see `groupwise.models.call_syntax`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from groupwise.models.control_tokens import is_control

T = TypeVar("T")
Parameters = Mapping[str, Mapping[str, Any]]
"""The JSON schemas of the parameters of each tool, by its name."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a tool."""

    name: str
    arguments: dict[str, Any]
    id: str = ""
    """What the answering message names as its tool_call_id."""

    def as_message(self, text: bool = False) -> dict[str, Any]:
        """The entry of a message's tool_calls; the arguments as JSON text where the template takes them so."""
        arguments = json.dumps(self.arguments, ensure_ascii=False) if text else self.arguments
        return {"type": "function", "id": self.id, "function": {"name": self.name, "arguments": arguments}}


class BadCall(Exception):
    """A call that cannot be read; the text says why, for the model to read."""


class Syntax(Protocol):
    """One way to write calls."""

    @property
    def opening(self) -> str:
        """Marked text that begins a call; empty: a call is a turn that consists of it."""
        ...

    def read(self, text: str, at: int, parameters: Parameters) -> tuple[list[Call], int]:
        """The calls whose opening ends at `at`, and where they end.

        Raises:
            BadCall: what follows the opening is no call.
        """
        ...


def read_json(text: str, at: int) -> tuple[Any, int]:
    """The JSON value at `at`, and where it ends."""
    try:
        return json.JSONDecoder(parse_constant=_refuse_constant).raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise BadCall(f"the call is not valid JSON: {error.msg} at character {error.pos - at} of it") from error
    except ValueError as error:  # an integer of thousands of digits
        raise BadCall(f"the call is not valid JSON: {error}") from error
    except RecursionError as error:
        raise BadCall("the call is nested too deeply") from error


def _refuse_constant(name: str) -> Any:
    raise BadCall(f"the call is not valid JSON: {name} is no number of JSON")


def expect(text: str, at: int, closing: str) -> int:
    """Where `closing` ends, which must be at `at`, whitespace aside."""
    start = skip(text, at)
    if not text.startswith(closing, start):
        raise BadCall("the call is not closed")
    return start + len(closing) if closing else at


def skip(text: str, at: int) -> int:
    """The next character that is no whitespace."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def common_start(*sequences: Sequence[T]) -> int:
    """How many first elements all of the sequences share."""
    places = enumerate(zip(*sequences, strict=False))
    return next((i for i, elements in places if any(element != elements[0] for element in elements)), min(map(len, sequences)))


def common_end(first: str, second: str) -> str:
    """The longest text that both end with."""
    return first[len(first) - common_start(first[::-1], second[::-1]) :]


def _arguments(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        value, _ = read_json(value, 0)
    if not isinstance(value, dict):
        raise BadCall("the arguments are not a JSON object")
    return value


@dataclass(frozen=True, slots=True)
class JsonCalls:
    """A JSON object with the name and the arguments, or a list of them: Hermes and Qwen, Llama 3, Mistral, Phi 4, Granite."""

    opening: str
    closing: str
    name_key: str
    arguments_key: str

    def read(self, text: str, at: int, parameters: Parameters) -> tuple[list[Call], int]:
        value, end = read_json(text, skip(text, at))
        calls = []
        for item in value if isinstance(value, list) else [value]:
            inner = item.get("function", item) if isinstance(item, dict) else item
            if not isinstance(inner, dict) or not isinstance(inner.get(self.name_key), str) or self.arguments_key not in inner:
                raise BadCall(f"a call is a JSON object with {self.name_key!r} and {self.arguments_key!r}")
            calls.append(Call(inner[self.name_key], _arguments(inner[self.arguments_key]), str(item.get("id") or "")))
        return calls, expect(text, end, self.closing)


@dataclass(frozen=True, slots=True)
class NamedJsonCalls:
    """The name as it is, then the arguments as JSON: DeepSeek, Kimi, Mistral from version 11."""

    opening: str
    between: str
    """A regular expression for what stands between the name and the arguments, with a group `id` where there is one."""
    closing: str

    def read(self, text: str, at: int, parameters: Parameters) -> tuple[list[Call], int]:
        match = re.compile(rf"\s*(?P<name>[\w.\-]+?)\s*{self.between}\s*").match(text, at)
        if not match:
            raise BadCall("the name of the tool or its arguments are missing")
        value, end = read_json(text, match.end())
        call = Call(match["name"], _arguments(value), match.groupdict().get("id") or "")
        return [call], expect(text, end, self.closing)


@dataclass(frozen=True, slots=True)
class TaggedCalls:
    """The name and each argument in tags of their own: Qwen3-Coder, Nemotron, MiniMax, GLM."""

    opening: str
    """Before the name."""
    name_end: str
    key_open: str
    key_end: str
    value_end: str
    closing: str
    trims_newlines: bool
    """Whether one newline on either side of a value belongs to the tags."""

    def read(self, text: str, at: int, parameters: Parameters) -> tuple[list[Call], int]:
        stops = [re.escape(stop) for stop in (self.name_end, self.key_open, self.closing) if stop]
        head = re.compile(rf"\s*([\w.\-]+)\s*(?={'|'.join(stops)})").match(text, at)
        if not head:
            raise BadCall("the name of the tool is missing")
        name, at = head[1], expect(text, head.end(), self.name_end)
        arguments: dict[str, Any] = {}
        while text.startswith(self.key_open, skip(text, at)):
            start = skip(text, at) + len(self.key_open)
            key_end = text.find(self.key_end, start)
            value_start = key_end + len(self.key_end)
            value_end = self._end_of_value(text, value_start)
            if key_end < 0 or value_end < 0:
                raise BadCall("an argument is not closed")
            key = text[start:key_end].strip()
            if key in arguments:
                raise BadCall(f"the argument {key!r} is given twice")
            arguments[key] = self._value(text[value_start:value_end], parameters.get(name, {}).get(key, {}))
            at = value_end + len(self.value_end)
        return [Call(name, arguments)], expect(text, at, self.closing)

    def _end_of_value(self, text: str, start: int) -> int:
        """Where the value ends: at the first end tag after which another argument begins or the call ends."""
        follows = "|".join(re.escape(tag) for tag in (self.key_open, self.closing))
        found = re.compile(rf"{re.escape(self.value_end)}(?=\s*(?:{follows}))").search(text, start)
        return found.start() if found else -1

    def _value(self, text: str, schema: Mapping[str, Any]) -> Any:
        if self.trims_newlines:
            text = text.removeprefix("\n").removesuffix("\n")
        if schema.get("type") == "string":
            return text
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            literals = {"True": True, "False": False, "None": None}  # templates that print values as Python does
            return literals.get(text, text)


def parse_calls(text: str, syntax: Syntax, parameters: Parameters) -> tuple[list[Call], str, str | None]:
    """The calls in a marked text without reasoning, what stands outside of them, and why a call could not be read."""
    if not syntax.opening:
        start = skip(text, 0)
        while text[start : start + 1] and is_control(text[start]):  # such as Llama's <|python_tag|>
            start = skip(text, start + 1)
        if not text.startswith(("{", "["), start):
            return [], text, None
        try:
            calls, end = syntax.read(text, start, parameters)
        except BadCall as error:
            return [], text, str(error) if '"name"' in text else None
        return (calls, "", None) if not text[end:].strip() else ([], text, "text follows the call")
    calls, outside, problem, at = [], [], None, 0
    while (found := text.find(syntax.opening, at)) >= 0:
        outside.append(text[at:found])
        after = found + len(syntax.opening)
        try:
            read, at = syntax.read(text, after, parameters)
            calls += read
        except BadCall as error:
            problem = problem or str(error)
            outside.append(text[found:after])
            at = after
    return calls, "".join([*outside, text[at:]]), problem


def with_ids(calls: Sequence[Call], takes_any: bool) -> tuple[Call, ...]:
    """The calls, those without an id with one of nine digits, which is what Mistral's templates ask for.

    Args:
        takes_any: whether the template takes ids of any form; if not, what the model wrote is kept where it has nine letters and
            digits.
    """

    def keeps(id: str) -> bool:
        return bool(id) and (takes_any or re.fullmatch("[a-zA-Z0-9]{9}", id) is not None)

    return tuple(replace(call, id=call.id if keeps(call.id) else f"{i:09d}") for i, call in enumerate(calls))
