"""What a chat template writes between a turn of the model and the next: the token that ends it, the messages, the next opening.

Read from renderings of a short synthetic conversation that ends with the messages in question, so that it does not depend on what
was sampled. It begins with a control token, before which a tokenizer splits any text: that is checked at the level of ids.
"""

from collections.abc import Sequence
from typing import Any

from groupwise.errors import UserError
from groupwise.models.call_syntax import ANSWER, QUESTION, CallForm, infer, synthetic_calls, value_word
from groupwise.models.chat import Chat, Tool
from groupwise.models.control_tokens import ControlTokens
from groupwise.models.tool_calls import Parameters, common_start
from groupwise.types import Message

USER: Message = {"role": "user", "content": "zqfurtherqz"}
DEFAULT_ID = "0" * 9


class TurnEnds:
    """How turns end and calls are written in one chat template."""

    def __init__(self, chat: Chat, tools: Sequence[Tool], control: ControlTokens, parameters: Parameters) -> None:
        """Raises:
        UserError: turns do not end with a token, or calls are written in an unknown way.
        """
        self.chat, self.tools, self.control = chat, tools, control
        self._names = tuple(parameters)
        self._verified: set[tuple[str, int]] = set()
        self.closing: int | None = None
        """The id that ends a turn; None: the opening of the next message does."""
        self.form: CallForm | None = None
        """How calls are written; None without tools."""
        common = self._common(self.plain(), ANSWER, [[], [USER]])
        if found := control.find(common):
            self.closing = found[0]
        self._skip = {"user": 0}
        """Control tokens between the last synthetic word and the one that ends the turn, by the role of the message after it."""
        openings = [self.tail([USER])[0]]
        if parameters:
            self.form = infer(chat, tools, control, parameters, control.mark(found[:1]))
            answer = {"role": "tool", "name": self._names[0], "tool_call_id": DEFAULT_ID, "content": "zqresultqz"}
            inside = control.find(self._common(self.called(), value_word(0), [[], [answer]]))
            self._skip["tool"] = inside.index(self.closing) if self.closing in inside else len(inside)
            openings.append(self.tail([answer])[0])
        self.stop_tokens = tuple(dict.fromkeys(openings))
        """Ids that end a turn."""

    def plain(self) -> list[dict[str, Any]]:
        """A synthetic conversation that ends with a turn without calls."""
        return [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]

    def called(self, answers: Sequence[Message] = ()) -> list[dict[str, Any]]:
        """A synthetic conversation that ends with the calls that these messages answer, or with one call of the first tool."""
        assert self.form is not None
        names = [str(answer.get("name") or self._names[0]) for answer in answers] or [self._names[0]]
        ids = [str(answer.get("tool_call_id") or f"{i:09d}") for i, answer in enumerate(answers)] or [DEFAULT_ID]
        return [{"role": "user", "content": QUESTION}, self.form.message(synthetic_calls(names, ids))]

    def tail(self, messages: Sequence[Message]) -> list[int]:
        """The ids from the one that ends a turn, through these messages, to the opening of the model's next turn.

        Raises:
            UserError: the template refuses the messages.
        """
        answers = [message for message in messages if message["role"] == "tool"]
        roles = [message["role"] for message in messages]
        if not roles or "assistant" in roles or "tool" in roles[len(answers) :]:
            raise ValueError("what follows a turn are messages of tools, then of others than the assistant")
        if answers and self.form is None:
            raise ValueError("messages of tools need tools")
        start = self.called(answers) if answers else self.plain()
        word, skip = (value_word(len(answers) - 1), self._skip["tool"]) if answers else (ANSWER, self._skip["user"])
        text = self.chat.render([*start, *messages], self.tools)
        place = text.find(word) + len(word)
        ids = self.chat.ids(text[place:])
        places = [i for i, token in enumerate(ids) if token in self.control]
        tail = ids[places[skip] :] if len(places) > skip else []
        as_text = not answers and bool(self.control.mark(ids[: places[0]] if places else ids).strip())
        if not tail or as_text or (not answers and self.closing not in (None, tail[0])):
            raise UserError(
                "the model's chat template ends the assistant's turns with text rather than with a token, so that their end "
                "cannot be seen in sampled tokens"
            )
        if (text[:place], skip) not in self._verified:
            whole = self.chat.ids(text)
            if whole[-len(tail) :] != tail:
                found = self.difference(whole[-len(tail) :], tail)
                raise UserError(f"the tokenizer merges the end of a turn with what precedes it: {found}")
            self._verified.add((text[:place], skip))
        return tail

    def _common(self, start: Sequence[Message], word: str, continuations: Sequence[Sequence[Message]]) -> str:
        """The marked text after a word that does not depend on what follows the turn."""
        tails = []
        for more in continuations:
            text = self.chat.render([*start, *more], self.tools, generation=bool(more))
            tails.append(self.control.mark(self.chat.ids(text)).rpartition(word)[2])
        return tails[0][: common_start(*tails)]

    def difference(self, first: Sequence[int], second: Sequence[int]) -> str:
        """Where two sequences of ids first differ, in words."""
        place = common_start(first, second)
        tokens = [self.chat.tokenizer.convert_ids_to_tokens(list(ids)) for ids in (first, second)]
        names = [repr(found[place]) if place < len(found) else "nothing" for found in tokens]
        return f"token {place} is {names[0]} in one and {names[1]} in the other"
