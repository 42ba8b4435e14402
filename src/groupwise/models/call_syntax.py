"""The syntax of a model's tool calls, inferred from its chat template.

A known call is rendered, and what surrounds its name and arguments tells the syntax. A candidate is accepted only if it reads
back exactly the calls that the template rendered.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from groupwise.errors import UserError
from groupwise.models.chat import Chat, Tool
from groupwise.models.control_tokens import ControlTokens
from groupwise.models.tool_calls import (
    Call,
    JsonCalls,
    NamedJsonCalls,
    Parameters,
    Syntax,
    TaggedCalls,
    common_end,
    common_start,
    parse_calls,
)

QUESTION, ANSWER, KEYS = "zqquestionqz", "zqanswerqz", ("zqkeyqz", "zqotherqz")
"""Words of the synthetic conversation, which a template has no reason to change or to contain."""

TAGS = (
    (">", "<parameter=", ">", "</parameter>"),
    ('">', '<parameter name="', '">', "</parameter>"),
    ("", "<arg_key>", "</arg_key>", "</arg_value>"),
)
"""What ends the name, opens an argument's name, ends it, and ends its value: Qwen3-Coder and Nemotron, MiniMax, GLM. What opens
and closes a call is inferred, and what stands between the name and the value of an argument."""


def value_word(index: int) -> str:
    """The last argument of the index-th synthetic call."""
    return f"zqvalue{index}qz"


def synthetic_calls(names: Sequence[str], ids: Sequence[str] = ()) -> list[Call]:
    """A call for each name, with arguments that can be found again."""
    ids = ids or [f"{i:09d}" for i in range(len(names))]
    return [Call(name, {KEYS[0]: i, KEYS[1]: value_word(i)}, id) for i, (name, id) in enumerate(zip(names, ids, strict=True))]


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a template writes calls, and how it wants to be given them."""

    syntax: Syntax
    arguments_as_text: bool
    """Whether the template takes the arguments of a call as JSON text."""
    content: str
    """Content of a message with calls that leaves the calls in the rendered text."""
    several: bool
    """Whether a message may have several calls."""

    def message(self, calls: Sequence[Call], content: str | None = None) -> dict[str, Any]:
        """An assistant's message with these calls."""
        return assistant(calls, self.content if content is None else content, self.arguments_as_text)


def assistant(calls: Sequence[Call], content: str, as_text: bool) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": [call.as_message(as_text) for call in calls]}


def infer(chat: Chat, tools: Sequence[Tool], control: ControlTokens, parameters: Parameters, closing: str) -> CallForm:
    """The syntax of calls in the chat's template.

    Args:
        closing: the marked text that ends a turn; empty where the next turn's opening ends it.

    Raises:
        UserError: the template does not show tools or calls, or writes calls in a way that is not known.
    """
    question = {"role": "user", "content": QUESTION}
    if chat.render([question], tools) == chat.render([question]):
        raise UserError("the model's chat template does not show the tools to the model: it has no support for tools")
    refusal: UserError | None = None
    for as_text in (False, True):
        for content in (ANSWER, ""):
            try:
                blocks = _blocks(chat, tools, control, next(iter(parameters)), content, as_text, closing)
            except UserError as error:
                refusal = refusal or error
                continue
            if not (sample := control.unmark(blocks[0]).strip()):
                refusal = UserError("the model's chat template writes no tool calls (docs/conversations.md)")
                continue
            refusal = UserError(
                "the model's chat template writes tool calls in a way that groupwise cannot read (docs/conversations.md): "
                + sample
            )
            for syntax in _candidates(blocks, next(iter(parameters)), control):
                if _reads_back(syntax, blocks, next(iter(parameters)), parameters):
                    return CallForm(syntax, as_text, content, several=bool(blocks[1]))
            if KEYS[1] in blocks[0] and f"'{KEYS[0]}'" not in blocks[0]:  # the arguments are there, and not as Python prints them
                raise refusal
    assert refusal is not None
    raise refusal


def _blocks(
    chat: Chat, tools: Sequence[Tool], control: ControlTokens, name: str, content: str, as_text: bool, closing: str
) -> list[str]:
    """What the template writes for one call and for two; "" where it takes a single one."""
    blocks = [_block(chat, tools, control, [name], content, as_text, closing)]
    try:
        return [*blocks, _block(chat, tools, control, [name, name], content, as_text, closing)]
    except UserError:
        return [*blocks, ""]


def _block(
    chat: Chat, tools: Sequence[Tool], control: ControlTokens, names: Sequence[str], content: str, as_text: bool, closing: str
) -> str:
    """What the template writes for calls, marked: from the end of the message's content to the end of the turn."""
    question = {"role": "user", "content": QUESTION}
    message = assistant(synthetic_calls(names), content, as_text)
    text = control.mark_text(chat.render([question, message], tools, generation=False)).split(QUESTION)[-1]
    opened = control.mark_text(chat.render([question], tools)).split(QUESTION)[-1]
    start = text.find(ANSWER) + len(ANSWER) if ANSWER in text else common_start(text, opened)
    last = text.find(value_word(len(names) - 1))
    end = text.find(closing, max(last, 0)) if closing else len(text)
    return text[start:end]


def _reads_back(syntax: Syntax, blocks: Sequence[str], name: str, parameters: Parameters) -> bool:
    for count, block in enumerate(blocks, start=1):
        calls, _, problem = parse_calls(block, syntax, parameters)
        known = [(call.name, call.arguments) for call in synthetic_calls([name] * count)]
        if block and (problem is not None or [(call.name, call.arguments) for call in calls] != known):
            return False
    return True


def _candidates(blocks: Sequence[str], name: str, control: ControlTokens) -> Iterator[Syntax]:
    yield from _json_candidates(blocks, name)
    yield from _named_candidates(blocks, name)
    yield from _tagged_candidates(blocks[0], name, control)


def _values(block: str) -> list[tuple[int, int, Any]]:
    """(start, end, value) of the outermost JSON objects and lists that hold a synthetic argument."""
    found, at = [], 0
    while at < len(block):
        if block[at] in "[{":
            try:
                value, end = json.JSONDecoder().raw_decode(block, at)
            except ValueError:
                value, end = None, at + 1
            if value is not None and KEYS[1] in block[at:end]:
                found.append((at, end, value))
                at = end
                continue
        at += 1
    return found


def _surroundings(blocks: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]]) -> tuple[str, str]:
    """What opens and closes each of the spans, from a block with one and a block with two (or none, or both in one span)."""
    (start, end), *_ = spans[0]
    opening, closing = blocks[0][:start].strip(), blocks[0][end:].strip()
    if len(spans[1]) == 2:
        (_, first_end), (second_start, second_end) = spans[1]
        between = blocks[1][first_end:second_start].strip()
        opening = common_end(opening, between).strip()
        closing = between[: common_start(between, blocks[1][second_end:].strip())].strip()
    return opening, closing


def _json_candidates(blocks: Sequence[str], name: str) -> Iterator[Syntax]:
    found = [_values(block) for block in blocks]
    if not found[0]:
        return
    value = found[0][0][2]
    item = value[0] if isinstance(value, list) and value else value
    inner = item.get("function", item) if isinstance(item, dict) else {}
    if not isinstance(inner, dict):
        return
    names = [key for key, entry in inner.items() if entry == name]
    keys = [key for key, entry in inner.items() if KEYS[1] in str(entry)]
    if len(names) == 1 and len(keys) == 1:
        opening, closing = _surroundings(blocks, [[(start, end) for start, end, _ in values] for values in found])
        yield JsonCalls(opening, closing, names[0], keys[0])


def _named_candidates(blocks: Sequence[str], name: str) -> Iterator[Syntax]:
    spans: list[list[tuple[int, int]]] = []
    between = ""
    for block in blocks:
        spans.append([])
        at = 0
        for start, end, _ in _values(block):
            named = block.find(name, at, start)
            if named < 0:
                return
            spans[-1].append((named, end))
            between = between or block[named + len(name) : start]
            at = end
    if not spans[0]:
        return
    opening, closing = _surroundings(blocks, spans)
    pattern = re.escape(between.strip()).replace("0" * 9, r"(?P<id>[\w.:\-]+)")
    pattern = re.sub(r"(?<=:)0", r"\\d+", pattern)  # the number of the call
    yield NamedJsonCalls(opening, pattern.replace(r"\ ", r"\s*").replace("\\\n", r"\s*"), closing)


def _tagged_candidates(block: str, name: str, control: ControlTokens) -> Iterator[Syntax]:
    for tags in TAGS:
        name_end, key_open, key_end, value_end = (control.mark_text(tag) for tag in tags)
        head, last = block[: max(block.find(key_open), 0)], block.rfind(value_end)
        value = re.search(f"{re.escape(KEYS[1])}(.*?){value_word(0)}", block, re.DOTALL)
        opening = head[: max(head.rfind(name), 0)].strip()
        if last < 0 or not value or not opening:
            continue
        closing = block[last + len(value_end) :].strip()
        around = [(opening, closing)]
        around.append((opening.rpartition("\n")[2], closing.partition("\n")[0]))  # markers around all calls of a turn
        for call_open, call_end in around:
            yield TaggedCalls(
                opening=call_open,
                name_end=name_end,
                key_open=key_open,
                key_end=value[1].strip() or key_end,
                value_end=value_end,
                closing=call_end,
                trims_newlines=value[1].endswith("\n"),
            )
