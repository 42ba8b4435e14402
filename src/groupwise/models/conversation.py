"""Conversations as tokens: what follows a sampled turn is appended, and no sampled token is ever decoded and encoded again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from groupwise.errors import UserError
from groupwise.models.chat import Chat, Tool
from groupwise.models.control_tokens import ControlTokens
from groupwise.models.conversation_check import Check
from groupwise.models.reasoning import Reasoning
from groupwise.models.tool_calls import BadCall, Call, Parameters, parse_calls, with_ids
from groupwise.models.turn_ends import TurnEnds
from groupwise.types import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """One sampled turn, read."""

    message: Message
    """The assistant's message: content, and where there are any reasoning_content and tool_calls."""
    calls: tuple[Call, ...]
    """The calls in order, also of tools that there are not."""
    closed: bool
    """Whether it ended with one of `Conversations.stop_tokens`; False where it was truncated or ended with another token."""
    problem: str | None
    """Why a call could not be read, for the model to read; None: no such call."""


class Conversations:
    """How the turns of conversations become tokens with one chat template and one set of tools.

    `stop_tokens` are the ids that end a turn, at which a sampler must stop (`Sampling.stop_tokens`). In most templates there is
    one, such as <|im_end|>; in others, such as GLM's, a turn has no end of its own and the opening of the next message ends it.
    """

    def __init__(self, chat: Chat, tools: Sequence[Tool] = ()) -> None:
        """Args:
            tools: JSON schemas, as transformers' `apply_chat_template` takes them.

        Raises:
            UserError: the template has a feature with which sampled tokens could not be kept as they are.
        """
        if not chat.template:
            raise UserError("a conversation needs a tokenizer with a chat template, and model.chat left out or true")
        self.chat, self.tools = chat, tuple(tools)
        self.parameters = tool_parameters(self.tools)
        self.control = ControlTokens(chat.tokenizer)
        self.ends = TurnEnds(chat, self.tools, self.control, self.parameters)
        self.stop_tokens = self.ends.stop_tokens
        """Ids that end a turn."""
        call = None if self.ends.form is None else self.ends.form.syntax.opening or "{"
        self._reasoning = Reasoning.of(self.control, call)
        self._opening = self.control.mark(self.prompt("a question").tolist())

    def prompt(self, prompt: str | Sequence[Message]) -> Tensor:
        """int64 [L]: the prompt, the tools included, and the opening of the assistant's turn."""
        return self.chat.encode(prompt, self.tools)

    def parse(self, tokens: Tensor, before: Tensor | None = None) -> Said:
        """Read one sampled turn.

        Args:
            tokens: int64 [T], as sampled.
            before: int64 [L], what the turn was sampled after, which tells whether it began inside of reasoning; None: what the
                template opens a turn with after a user's message.
        """
        ids: list[int] = tokens.tolist()
        closed = bool(ids) and ids[-1] in self.stop_tokens
        ended = closed or (bool(ids) and ids[-1] == self.chat.tokenizer.eos_token_id)
        opening = self._opening if before is None else self.control.mark(before[-64:].tolist())
        text = self.control.mark(ids[:-1] if ended else ids)
        reasoning, visible = self._reasoning.split(text, self._reasoning.opened(opening), self._call_end)
        calls: list[Call] = []
        problem = None
        if self.ends.form is not None:
            calls, visible, problem = parse_calls(visible, self.ends.form.syntax, self.parameters)
        unmark = self.control.unmark
        plain = [Call(unmark(call.name), self._unmark(call.arguments), unmark(call.id)) for call in calls]
        found = with_ids(plain, self.ends.takes_any_id)
        return Said(message=self._message(reasoning, visible, found), calls=found, closed=closed, problem=problem)

    def suffix(self, messages: Sequence[Message], *, closed: bool) -> Tensor:
        """int64 [L]: what follows a sampled turn, up to where the next one is sampled.

        Args:
            messages: those of tools first.
            closed: `Said.closed`. If False the suffix begins with the token that ends the turn.

        Raises:
            ValueError: a closed turn in a template without an end of turns, where it may have ended with the opening of another
                message than the first of `messages`: `after` sees that.
        """
        if closed and not self.ends.closing:
            raise ValueError("turns have no end of their own in this chat template: use Conversations.after")
        tail = self.ends.tail(messages)
        return torch.tensor(tail.rest if closed else [*tail.ending, *tail.rest], dtype=torch.long)

    def after(self, tokens: Tensor, messages: Sequence[Message]) -> Tensor:
        """int64 [L]: `suffix` for the sampled turn `tokens`, which tell by themselves whether the turn was closed."""
        tail = self.ends.tail(messages)
        ids: list[int] = tokens.tolist()
        written = next(n for n in range(len(tail.ending), -1, -1) if n == 0 or ids[-n:] == tail.ending[:n])
        return torch.tensor([*tail.ending[written:], *tail.rest], dtype=torch.long)

    def check(self) -> tuple[str, ...]:
        """Try the template on conversations whose tokens are known, as `groupwise check` does.

        Returns:
            Remarks for a person to read, such as that the template drops earlier reasoning.

        Raises:
            UserError: tokens differ from the template's own; the message names the first that does.
        """
        return Check(self.ends, self).run()

    def _call_end(self, text: str, at: int) -> int | None:
        """Where the call at this place of a marked text ends; None: there is none."""
        if self.ends.form is None:
            return None
        syntax = self.ends.form.syntax
        if not text.startswith(syntax.opening or "{", at) or (not syntax.opening and self.control.drop(text[:at]).strip()):
            return None
        try:
            return syntax.read(text, at + len(syntax.opening), self.parameters)[1]
        except BadCall:
            return None

    def _unmark(self, value: Any) -> Any:
        """A parsed value with the names of control tokens that stand in its texts."""
        if isinstance(value, str):
            return self.control.unmark(value)
        if isinstance(value, dict):
            return {self.control.unmark(key): self._unmark(entry) for key, entry in value.items()}
        return [self._unmark(entry) for entry in value] if isinstance(value, list) else value

    def _message(self, reasoning: str, visible: str, calls: Sequence[Call]) -> dict[str, Any]:
        content = self.control.drop(visible) if calls else self.control.unmark(visible)  # such as what opens a list of calls
        message: dict[str, Any] = {"role": "assistant", "content": content.strip()}
        if reasoning.strip():
            message["reasoning_content"] = self.control.unmark(reasoning).strip()
        if calls:
            message["tool_calls"] = [call.as_message() for call in calls]
        return message


def tool_parameters(tools: Sequence[Mapping[str, Any]]) -> Parameters:
    """The schemas of the parameters of each tool, by its name.

    Raises:
        UserError: a schema has no name, or two have the same.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool.get("function", tool)
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise UserError(f"a tool's schema has no name: {tool}")
        if name in found:
            raise UserError(f"two tools have the name {name!r}")
        found[name] = function.get("parameters", {}).get("properties", {})
    return found
