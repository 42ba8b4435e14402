"""Conversations whose tokens are known, against what the code for conversations makes of them."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from groupwise.errors import UserError
from groupwise.models.call_syntax import ANSWER, QUESTION, synthetic_calls
from groupwise.models.tool_calls import Call, common_start
from groupwise.models.turn_ends import USER, TurnEnds
from groupwise.types import Message

THOUGHT = "zqthoughtqz"
KEPT = "conversations keep the tokens as they were sampled; a server that renders the history anew shows the model something else"


class _Said(Protocol):
    @property
    def calls(self) -> tuple[Call, ...]: ...
    @property
    def closed(self) -> bool: ...
    @property
    def problem(self) -> str | None: ...


class _Conversations(Protocol):
    def parse(self, tokens: Tensor, before: Tensor | None = None) -> _Said: ...
    def after(self, tokens: Tensor, messages: Sequence[Message]) -> Tensor: ...


class Check:
    """Points 3 to 5 of what docs/conversations.md promises, on the model's own template."""

    def __init__(self, ends: TurnEnds, conversations: _Conversations) -> None:
        self.ends, self.conversations = ends, conversations
        self.question: Message = {"role": "user", "content": QUESTION}
        self.opened = self._ids([self.question], generation=True)
        self.remarks: dict[str, str] = {}
        words = f"<think>{QUESTION}{ANSWER}</think>" + "".join(f" {call.name} {call.arguments}" for call in self._calls(2))
        self.readable = ends.control.mark(ends.chat.ids(words)) == ends.control.mark_text(words)
        """Whether the tokenizer has the characters of the synthetic conversations, so that they can be read back."""

    def run(self) -> tuple[str, ...]:
        """The remarks.

        Raises:
            UserError: something differs.
        """
        self._round(self.ends.plain(), [USER], [])
        form = self.ends.form
        if form is not None:
            for count in (1, 2) if form.several else (1,):
                calls = self._calls(count)
                answers = [self._answer(call, f"zqresult{i}qz") for i, call in enumerate(calls)]
                self._round([self.question, form.message(calls)], answers, calls)
            self._later_round()
        self._reasoning()
        if not self.readable:
            self.remarks["characters"] = "the tokenizer lacks letters or signs: whether calls are read rightly could not be tried"
        return tuple(self.remarks.values())

    def _calls(self, count: int) -> list[Call]:
        return synthetic_calls(self.ends.names[:1] * count)

    def _ids(self, messages: Sequence[Message], generation: bool = False) -> list[int]:
        return self.ends.chat.ids(self.ends.chat.render(messages, self.ends.tools, generation=generation))

    def _answer(self, call: Call, content: str) -> dict[str, Any]:
        return {"role": "tool", "name": call.name, "tool_call_id": call.id, "content": content}

    def _turn(self, start: Sequence[Message], messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """The last turn of `start` as the model samples it, the end included, and what the template writes before it."""
        whole, tail = self._ids([*start, *messages], generation=True), self.ends.tail(messages)
        before = whole[: len(whole) - len(tail.rest)]
        shared = common_start(before, self.opened)
        if shared < len(self.opened):
            found = self.ends.difference(before, self.opened)
            self.remarks["opening"] = (
                f"the chat template writes an earlier turn of the assistant in another way than it opened it ({found}): {KEPT}"
            )
        return before[:shared], before[shared:]

    def _round(self, start: Sequence[Message], messages: Sequence[Message], calls: Sequence[Call]) -> None:
        """One turn, complete and truncated, and what follows it."""
        before, turn = self._turn(start, messages)
        said = self.conversations.parse(torch.tensor(turn), torch.tensor(before))
        read = [(call.name, call.arguments) for call in said.calls]
        if self.readable and (said.problem or not said.closed or read != [(call.name, call.arguments) for call in calls]):
            text = self.ends.control.unmark(self.ends.control.mark(turn))
            raise UserError(f"a turn that the model's chat template wrote itself is read wrongly ({said.problem}): {text!r}")
        whole, tail = self._ids([*start, *messages], generation=True), self.ends.tail(messages)
        for sampled in (turn, turn[: len(turn) - len(tail.ending)]):
            after = self.conversations.after(torch.tensor(sampled, dtype=torch.long), messages).tolist()
            if (built := [*before, *sampled, *after]) != whole:
                found = self.ends.difference(built, whole)
                raise UserError(f"a conversation differs from what the model's chat template makes of it: {found}")

    def _later_round(self) -> None:
        """The same messages later in a conversation must be written as after the first turn."""
        assert self.ends.form is not None
        (call,) = self._calls(1)
        called = self.ends.form.message([call])
        plain = {"role": "assistant", "content": ANSWER}
        for said, answer in ((called, self._answer(call, "zqresult1qz")), (plain, USER)):
            rest = self.ends.tail([answer]).rest
            messages = [self.question, called, self._answer(call, "zqresult0qz"), said, answer]
            whole = self._ids(messages, generation=True)
            if whole[-len(rest) :] != rest:
                found = self.ends.difference(whole[-len(rest) :], rest)
                raise UserError(f"the model's chat template writes later messages in another way than early ones: {found}")

    def _reasoning(self) -> None:
        """Calls inside of reasoning must not be executed; whether the template drops earlier reasoning is remarked."""
        form = self.ends.form
        if form is not None and self.readable:
            calls = self._calls(1)
            _, turn = self._turn([self.question, form.message(calls)], [self._answer(calls[0], "zqresultqz")])
            thought = [*self.ends.chat.ids("<think>"), *turn[:-1], *self.ends.chat.ids("</think>"), *turn[-1:]]
            if self.conversations.parse(torch.tensor(thought)).calls:
                raise UserError("a call inside of reasoning is read as a call")
        turns = [self.question, {"role": "assistant", "content": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"}]
        if THOUGHT not in self.ends.chat.render([*turns, USER], self.ends.tools):
            self.remarks["reasoning"] = f"the chat template drops the reasoning of earlier turns: {KEPT}"
