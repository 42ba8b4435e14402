"""What a chat template writes between a turn of the model and the next: the token that ends it, the messages, the next opening.

Read from renderings of a short synthetic conversation that ends with the messages in question, so that it does not depend on what
was sampled. It begins with a control token, before which a tokenizer splits any text: that is checked at the level of ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from groupwise.errors import UserError
from groupwise.models.call_syntax import ANSWER, QUESTION, CallForm, infer, synthetic_calls, value_word
from groupwise.models.chat import Chat, Tool
from groupwise.models.control_tokens import ControlTokens
from groupwise.models.tool_calls import Parameters, common_start
from groupwise.types import Message

USER: Message = {"role": "user", "content": "zqfurtherqz"}
DEFAULT_ID = "0" * 9


@dataclass(frozen=True, slots=True)
class Tail:
    """The ids between the end of what a turn says and where the next turn is sampled."""

    ending: list[int]
    """What ends the turn, and is sampled where the turn was not truncated."""
    rest: list[int]
    """What follows, and is never sampled."""


class TurnEnds:
    """How turns end and calls are written in one chat template."""

    def __init__(self, chat: Chat, tools: Sequence[Tool], control: ControlTokens, parameters: Parameters) -> None:
        """Raises:
        UserError: turns do not end with a token, or calls are written in an unknown way.
        """
        self.chat, self.tools, self.control = chat, tools, control
        self.names = tuple(parameters)
        self._verified: set[str] = set()
        self.closing = control.find(self._common(self.plain(), ANSWER, [[], [USER]]))
        """The ids of control tokens that end a turn whatever follows; empty: the opening of the next message ends it."""
        self._skip = 0
        """Control tokens between the last argument of the last call and the one that ends the turn."""
        self.form: CallForm | None = None
        """How calls are written; None without tools."""
        self.takes_any_id = True
        """Whether the template takes ids of calls that are not of nine letters and digits, as Mistral's does not."""
        endings = [self.tail([USER]).ending]
        self._refuse_several_messages(endings[0][-1])
        if parameters:
            self.form = infer(chat, tools, control, parameters, control.mark(self.closing[-1:]))
            answer = {"role": "tool", "name": self.names[0], "tool_call_id": DEFAULT_ID, "content": "zqresultqz"}
            inside = control.find(self._common(self.called(), value_word(0), [[], [answer]]))
            self._skip = inside.index(self.closing[-1]) if self.closing and self.closing[-1] in inside else len(inside)
            endings.append(self.tail([answer]).ending)
            self.takes_any_id = self._takes({**answer, "tool_call_id": "call:0"})
        self.stop_tokens = tuple(dict.fromkeys(ending[-1] for ending in endings))
        """Ids that end a turn."""

    def plain(self) -> list[dict[str, Any]]:
        """A synthetic conversation that ends with a turn without calls."""
        return [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]

    def called(self, answers: Sequence[Message] = ()) -> list[dict[str, Any]]:
        """A synthetic conversation that ends with the calls that these messages answer, or with one call of the first tool.

        A tool that there is not is written as the first one: a model may name it with any text, that of an argument included.
        """
        assert self.form is not None
        said = [answer.get("name") for answer in answers] or [None]
        names = [name if name in self.names else self.names[0] for name in said]
        ids = [str(answer.get("tool_call_id") or f"{i:09d}") for i, answer in enumerate(answers)] or [DEFAULT_ID]
        return [{"role": "user", "content": QUESTION}, self.form.message(synthetic_calls(names, ids))]

    def _takes(self, answer: Message) -> bool:
        """Whether the template takes this answer to a call."""
        try:
            self.chat.render([*self.called([answer]), answer], self.tools)
        except UserError:
            return False
        return True

    def _refuse_several_messages(self, stop: int) -> None:
        """A turn of gpt-oss is a message of reasoning and one of the answer, each with the same end."""
        message = {"role": "assistant", "content": ANSWER, "reasoning_content": "zqthoughtqz"}
        text = self.chat.render([{"role": "user", "content": QUESTION}, message], self.tools, generation=False)
        between = text.rpartition(QUESTION)[2].partition(ANSWER)[0].partition("zqthoughtqz")[2]
        if stop in self.control.find(self.control.mark_text(between)):
            raise UserError("the model's chat template makes several messages of a turn: such conversations are not supported")

    def tail(self, messages: Sequence[Message]) -> Tail:
        """What ends a turn that these messages follow, the messages, and the opening of the model's next turn.

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
        word, skip = (value_word(len(answers) - 1), self._skip) if answers else (ANSWER, 0)
        text = self.chat.render([*start, *messages], self.tools)
        place = text.find(word) + len(word)
        ids = self.chat.ids(text[place:])
        places = [i for i, token in enumerate(ids) if token in self.control]
        if len(places) <= skip or (not answers and self.control.mark(ids[: places[0]]).strip()):
            raise UserError(
                "the model's chat template ends the assistant's turns with text rather than with a token, so that their end "
                "cannot be seen in sampled tokens"
            )
        last = skip if answers else skip + max(len(self.closing), 1) - 1
        self._verify(text, text[:place], ids[places[skip] :])
        return Tail(ids[places[skip] : places[last] + 1], ids[places[last] + 1 :])

    def _verify(self, text: str, head: str, tail: list[int]) -> None:
        """Assert, once for each synthetic conversation, that the rendered text ends with these ids when it is encoded as one."""
        if head in self._verified:
            return
        whole = self.chat.ids(text)
        if whole[-len(tail) :] != tail:
            found = self.difference(whole[-len(tail) :], tail)
            raise UserError(f"the tokenizer merges the end of a turn with what precedes it: {found}")
        self._verified.add(head)

    def _common(self, start: Sequence[Message], word: str, continuations: Sequence[Sequence[Message]]) -> str:
        """The marked text after a word that does not depend on what follows the turn."""
        tails = []
        for more in continuations:
            text = self.chat.render([*start, *more], self.tools, generation=bool(more))
            tails.append(self.control.mark_text(text).rpartition(word)[2])
        return tails[0][: common_start(*tails)]

    def difference(self, first: Sequence[int], second: Sequence[int]) -> str:
        """Where two sequences of ids first differ, in words."""
        place = common_start(first, second)
        tokens = [self.chat.tokenizer.convert_ids_to_tokens(list(ids)) for ids in (first, second)]
        names = [repr(found[place]) if place < len(found) else "nothing" for found in tokens]
        return f"token {place} is {names[0]} in one and {names[1]} in the other"
