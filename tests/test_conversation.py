"""Conversations: what follows a sampled turn, and what was called in it, on templates of many families."""

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from groupwise.errors import UserError
from groupwise.models import Call, Chat, Conversations, character_tokenizer
from groupwise.models.tool_calls import common_start
from tests import chat_templates
from tests.chat_templates import FAMILIES, HARMONY, TEXT, Family

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"What {name} does.",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string", "description": "A text."},
                    "limit": {"type": "integer", "description": "A number."},
                    "options": {"type": "object", "description": "More."},
                    "flags": {"type": "array", "items": {"type": "boolean"}, "description": "Many."},
                },
                "required": ["query"],
            },
        },
    }
    for name in ("search", "look_up")
]
WITH_TOOLS = [name for name, family in FAMILIES.items() if family.tools]
MARKERS = [
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "[TOOL_CALLS]",
    "<|im_end|>",
    "<|eot_id|>",
    "</s>",
    "<function=search>",
]
PIECES = [
    "Hello",
    " world",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "é",
    "東京",
    "🙂",
    "{",
    "}",
    '"',
    "\\",
    "42",
    "a.b",
    "'",
    "Привет",
    "\u00a0",
    "<",
    ">",
    "]",
]
"""Of random texts."""


def conversations(name: str, tools: bool | None = None, **settings: Any) -> Conversations:
    family = FAMILIES[name]
    tools = family.tools if tools is None else tools
    return Conversations(Chat.build(chat_templates.tokenizer(name), **settings), TOOLS if tools else ())


def text(chance: random.Random, markers: bool = False) -> str:
    pieces = [*PIECES, *MARKERS] if markers else PIECES
    return "".join(chance.choices(pieces, k=chance.randrange(8)))


def arguments(chance: random.Random) -> dict[str, Any]:
    drawn = {
        "query": text(chance),
        "limit": chance.randrange(-5, 100),
        "options": {"deep": [1, {"x": text(chance)}], "none": None},
        "flags": [True, False],
    }
    return {key: value for key, value in drawn.items() if key == "query" or chance.random() < 0.5}


def ids_of(talk: Conversations, value: str) -> list[int]:
    return talk.chat.ids(value)


def said_of(talk: Conversations, calls: list[Call], content: str) -> dict[str, Any]:
    if not calls:
        return {"role": "assistant", "content": content}
    assert talk.ends.form is not None
    return talk.ends.form.message(calls, content)


def canonical_turn(
    talk: Conversations, start: list[Any], said: dict[str, Any], replies: list[Any]
) -> tuple[list[int], list[int]]:
    """The ids of a turn as the template itself writes it, and of what stands before it (its opening, if not rewritten)."""
    opened = ids_of(talk, talk.chat.render(start, talk.tools))
    whole = ids_of(talk, talk.chat.render([*start, said, *replies], talk.tools))
    after = talk.ends.tail(replies).rest
    assert whole[len(whole) - len(after) :] == after
    shared = common_start(opened, whole)
    return whole[:shared], whole[shared : len(whole) - len(after)]


def random_calls(talk: Conversations, chance: random.Random) -> list[Call]:
    form = talk.ends.form
    if form is None or chance.random() < 0.4:
        return []
    count = chance.randrange(1, 4 if form.several else 2)
    return [Call(chance.choice(("search", "look_up")), arguments(chance), f"{i:09d}") for i in range(count)]


def random_replies(calls: list[Call], chance: random.Random) -> list[dict[str, Any]]:
    if not calls:
        return [{"role": "user", "content": text(chance, markers=True)}]
    return [{"role": "tool", "name": call.name, "tool_call_id": call.id, "content": text(chance, markers=True)} for call in calls]


def known(calls: Sequence[Call]) -> list[tuple[str, dict[str, Any]]]:
    return [(call.name, call.arguments) for call in calls]


@pytest.mark.parametrize("name", FAMILIES)
def test_random_conversations(name: str) -> None:
    """Each grows by its prefix, keeps each sampled id, and equals the template's own rendering where turns are in its form."""
    talk = conversations(name)
    chance = random.Random(name)
    exact = turns = 0
    for _ in range(70):
        messages: list[dict[str, Any]] = [{"role": "user", "content": text(chance, markers=True)}]
        if FAMILIES[name].system and chance.random() < 0.5:
            messages.insert(0, {"role": "system", "content": "Be brief." + text(chance)})
        S = talk.prompt(messages).tolist()
        assert ids_of(talk, talk.chat.render(messages, talk.tools)) == S
        canonical, mask, sampled = True, [False] * len(S), []
        for _turn in range(chance.randrange(1, 4)):
            calls, turns = random_calls(talk, chance), turns + 1
            content = "" if name == "llama3" and calls else chance.choice(["", "Well", "So be it.", text(chance)])
            said, replies = said_of(talk, calls, content), random_replies(calls, chance)
            before, turn = canonical_turn(talk, messages, said, replies)
            canonical = canonical and before == S
            truncated = chance.random() < 0.15
            if truncated:
                turn, canonical = turn[: len(turn) // 2], False
            read = talk.parse(torch.tensor(turn, dtype=torch.long), torch.tensor(before))
            assert read.closed == (not truncated)
            if not truncated:
                assert known(read.calls) == known(calls) and read.problem is None
                assert read.message["content"] == content.strip()
            suffix = talk.after(torch.tensor(turn, dtype=torch.long), replies)
            if talk.ends.closing or not read.closed:
                assert suffix.tolist() == talk.suffix(replies, closed=read.closed).tolist()
            grown = [*S, *turn, *suffix.tolist()]
            assert grown[: len(S)] == S
            S, sampled, mask = grown, sampled + turn, mask + [True] * len(turn) + [False] * len(suffix)
            messages = [*messages, said, *replies]
            if canonical:
                exact += 1
                assert ids_of(talk, talk.chat.render(messages, talk.tools)) == S
        assert [token for token, trained in zip(S, mask, strict=True) if trained] == sampled
    assert exact > 0.5 * turns or name == "deepseek", "most turns are compared with the template's own rendering"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_truncated_turn_gets_its_end_and_it_is_not_trained_on(name: str) -> None:
    talk = conversations(name)
    replies = [{"role": "user", "content": "Go on."}]
    words = torch.tensor(ids_of(talk, "I was about to say"))
    closed, opened = talk.ends.tail(replies).rest, talk.suffix(replies, closed=False).tolist()
    assert opened == [*opened[: len(opened) - len(closed)], *closed] and len(opened) == len(closed) + 1
    assert opened[0] in talk.stop_tokens
    assert not talk.parse(words).closed and talk.after(words, replies).tolist() == opened
    ended = torch.cat([words, torch.tensor(opened[:1])])
    assert talk.parse(ended).closed and talk.after(ended, replies).tolist() == closed
    if (
        talk.chat.tokenizer.eos_token_id not in talk.stop_tokens
    ):  # the model may also end the whole text: that is kept as it was said
        ended = torch.cat([words, torch.tensor([talk.chat.tokenizer.eos_token_id])])
        said = talk.parse(ended)
        assert not said.closed and said.message["content"] == "I was about to say"
        assert talk.after(ended, replies).tolist() == opened


def test_a_turn_that_ends_with_the_opening_of_another_message_keeps_it() -> None:
    """GLM's turns end with <|user|> or <|observation|>. What was sampled stays, and the message gets its own opening."""
    talk = conversations("glm")
    user, observation = (ids_of(talk, name) for name in ("<|user|>", "<|observation|>"))
    assert set(talk.stop_tokens) == {*user, *observation}
    result = [{"role": "tool", "name": "search", "tool_call_id": "000000000", "content": "rain"}]
    whole = talk.suffix(result, closed=False).tolist()
    assert whole[:1] == observation
    assert talk.after(torch.tensor(observation), result).tolist() == whole[1:]
    assert talk.after(torch.tensor(user), result).tolist() == whole


def turn_with(talk: Conversations, calls: list[Call]) -> tuple[list[int], list[int]]:
    """(before, turn) of these calls after a question."""
    replies = [{"role": "tool", "name": call.name, "tool_call_id": call.id, "content": "found"} for call in calls]
    return canonical_turn(talk, [{"role": "user", "content": "a question"}], said_of(talk, calls, ""), replies)


CALL = Call("search", {"query": "rain"}, "000000000")


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_calls_inside_of_reasoning_are_thoughts(name: str) -> None:
    talk = conversations(name)
    before, turn = turn_with(talk, [CALL])
    think, end = ids_of(talk, "<think>"), ids_of(talk, "</think>")
    body, stop = [token for token in turn[:-1] if [token] not in (think, end)], turn[-1:]
    answer = ids_of(talk, "It rains.")

    def calls(tokens: list[int], start: list[int] = before) -> int:
        return len(talk.parse(torch.tensor(tokens), torch.tensor(start)).calls)

    neutral = ids_of(talk, talk.chat.render([{"role": "user", "content": "q"}], talk.tools))
    neutral = neutral[: len(neutral) - 2] if name == "deepseek" else neutral  # without the opening of reasoning
    assert calls(body + stop, neutral) == 1
    assert calls([*think, *body, *end, *answer, *stop], neutral) == 0
    assert calls([*think, *body, *stop], neutral) == 0  # never closed
    assert calls([*think, *answer, *end, *body, *stop], neutral) == 1
    assert calls([*think, *body, *end, *body, *stop], neutral) == 1
    opened = [*neutral, *think, *ids_of(talk, "\n")]  # the template opens the reasoning
    assert calls([*body, *stop], opened) == 0
    assert calls([*body, *end, *answer, *stop], opened) == 0
    assert calls([*body, *end, *body, *stop], opened) == 1
    assert calls([*body, *end, *answer, *stop], neutral) == 0  # closed, hence it was open
    if name != "llama3":  # whose call is the whole turn
        assert calls([*body, *think, *body, *end, *stop], neutral) == 1
    said = talk.parse(torch.tensor([*think, *body, *end, *answer, *stop]), torch.tensor(neutral))
    assert said.message["content"] == "It rains." and "rain" in said.message["reasoning_content"]


def test_a_marker_spelled_out_in_ordinary_tokens_is_text() -> None:
    talk = conversations("qwen2.5")
    call = '<tool_call>\n{"name": "search", "arguments": {"query": "rain"}}\n</tool_call>'
    spelled = [token for character in call for token in ids_of(talk, character)]
    assert talk.chat.tokenizer.decode(spelled) == call  # the same text
    said = talk.parse(torch.tensor([*spelled, talk.stop_tokens[0]]))
    assert said.calls == () and said.problem is None and said.message["content"] == call
    assert known(talk.parse(torch.tensor([*ids_of(talk, call), talk.stop_tokens[0]])).calls) == known([CALL])
    talk = conversations("hermes")  # whose tokenizer has no tokens for the markers: there the text is all there is
    assert known(talk.parse(torch.tensor([*ids_of(talk, call), talk.stop_tokens[0]])).calls) == known([CALL])


def test_markers_inside_of_arguments_are_arguments() -> None:
    for name in ("qwen2.5", "mistral", "deepseek", "llama3"):
        talk = conversations(name)
        for marker in ("<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "\U000f0000", "\U0010fffd"):
            call = Call("search", {"query": f"a {marker} b"}, "000000000")
            before, turn = turn_with(talk, [call])
            found = talk.parse(torch.tensor(turn), torch.tensor(before)).calls
            assert known(found) == known([call]), (name, marker)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ('{"name": "search", "arguments": {"query": }}', "not valid JSON: Expecting value at character"),
        ('{"name": "search", "arguments": [1]}', "the arguments are not a JSON object"),
        ('{"name": "search"}', "a call is a JSON object with 'name' and 'arguments'"),
        ('"search"', "a call is a JSON object with 'name' and 'arguments'"),
        ("[" * 100_000, "the call is nested too deeply"),
        ('{"name": "search", "arguments": {"limit": ' + "9" * 5000 + "}}", "not valid JSON: Exceeds the limit"),
        ('{"name": "search", "arguments": {"limit": NaN}}', "not valid JSON: NaN is no number"),
        ('{"name": "search", "arguments": {}} and more', "the call is not closed"),
    ],
)
def test_what_cannot_be_called_is_told(body: str, problem: str) -> None:
    talk = conversations("qwen2.5")
    good = '<tool_call>\n{"name": "look_up", "arguments": {}}\n</tool_call>'
    said = talk.parse(torch.tensor([*ids_of(talk, f"<tool_call>{body}</tool_call>{good}"), talk.stop_tokens[0]]))
    assert said.problem is not None and problem in said.problem
    assert known(said.calls) == [("look_up", {})]  # the others stand


def test_texts_that_are_not_unicode_are_replaced() -> None:
    """JSON can spell half of a surrogate pair, which no tokenizer and no file takes."""
    talk = conversations("qwen2.5")
    body = '{"name": "\\ud900", "arguments": {"\\ud901": ["\\udfff", "\\ud83d\\ude42"]}, "id": "\\udffe"}'
    turn = torch.tensor([*ids_of(talk, f"<tool_call>{body}</tool_call>"), talk.stop_tokens[0]])
    said = talk.parse(turn)
    assert said.calls == (Call("\ufffd", {"\ufffd": ["\ufffd", "\U0001f642"]}, "\ufffd"),)
    assert str(said.message).encode()
    (call,) = said.calls
    assert len(talk.after(turn, [{"role": "tool", "name": call.name, "tool_call_id": call.id, "content": "no such tool"}]))


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_a_tool_of_any_name_can_be_answered(name: str) -> None:
    """What follows a turn does not depend on the name of the tool that there is not."""
    talk = conversations(name)
    answer = {"role": "tool", "tool_call_id": "000000000", "content": "none"}
    names = ("serach", "", "zqvalue0qz", "zqvalue0qz zqvalue0qz", "a\n</s>", "x" * 3000)
    tails = [talk.ends.tail([{**answer, "name": tool}]) for tool in names]
    assert all(tail == tails[0] for tail in tails)


@pytest.mark.parametrize(("name", "kept"), [("mistral", False), ("qwen2.5", True)])
def test_ids_that_the_template_refuses_are_not_kept(name: str, kept: bool) -> None:
    talk = conversations(name)
    for id, stays in (("abc", kept), ("call-0001", kept), ("aB3456789", True)):
        written = json.dumps({"name": "search", "arguments": {"query": "a"}, "id": id})
        turn = f"[TOOL_CALLS][{written}]" if name == "mistral" else f"<tool_call>{written}</tool_call>"
        tokens = torch.tensor([*ids_of(talk, turn), talk.stop_tokens[0]])
        (call,) = talk.parse(tokens).calls
        assert call.id == (id if stays else "000000000")
        assert len(talk.after(tokens, [{"role": "tool", "name": "search", "tool_call_id": call.id, "content": "b"}]))


def test_a_call_of_a_tool_that_there_is_not_is_a_call() -> None:
    talk = conversations("qwen2.5")
    said = talk.parse(torch.tensor(ids_of(talk, '<tool_call>{"name": "serach", "arguments": {"query": "a"}}</tool_call>')))
    assert known(said.calls) == [("serach", {"query": "a"})] and said.problem is None


def test_a_call_that_is_cut_off_is_a_problem_and_no_call() -> None:
    for name in WITH_TOOLS:
        if name == "llama3":
            continue
        talk = conversations(name)
        before, turn = turn_with(talk, [CALL])
        said = talk.parse(torch.tensor(turn[:-4]), torch.tensor(before))
        assert said.calls == () and not said.closed, name


def test_llama_calls_are_whole_turns() -> None:
    talk = conversations("llama3")

    def parse(value: str) -> Any:
        return talk.parse(torch.tensor([*ids_of(talk, value), talk.stop_tokens[0]]))

    assert known(parse('{"name": "search", "parameters": {"query": "rain"}}').calls) == known([CALL])
    assert known(parse('<|python_tag|>{"name": "search", "parameters": {"query": "rain"}}').calls) == known([CALL])
    assert parse('I could call {"name": "search", "parameters": {"query": "rain"}}').calls == ()
    assert parse('{"answer": 42}').calls == () and parse('{"answer": 42}').problem is None
    assert "JSON" in parse('{"name": "search", "parameters": {').problem


def test_typed_arguments_follow_the_schema() -> None:
    """In tags there is no JSON: a text stays a text, what is no text is read as JSON."""
    for name in ("coder", "glm"):
        talk = conversations(name)
        for value in ("42", "true", '{"a": 1}', "two\nlines", " spaces ", "", "None", "</parameter>", "1e5"):
            call = Call("search", {"query": value, "limit": 42, "flags": [True], "options": {"a": [1, {"b": "c"}]}}, "000000000")
            before, turn = turn_with(talk, [call])
            assert known(talk.parse(torch.tensor(turn), torch.tensor(before)).calls) == known([call]), (name, value)


@pytest.mark.parametrize("name", FAMILIES)
def test_check_passes_and_remarks_on_rewriting(name: str) -> None:
    remarks = " ".join(conversations(name).check())
    assert ("drops the reasoning" in remarks) == (name in ("qwen3", "glm", "deepseek"))
    assert ("in another way than it opened it" in remarks) == (name == "deepseek")


def custom(template: str, *special: str, tools: bool = False, eos: str = "<|im_end|>", **settings: Any) -> Conversations:
    FAMILIES["custom"] = Family(template, (*chat_templates.QWEN_ADDED, *special), eos)
    chat_templates.tokenizer.cache_clear()
    try:
        return Conversations(Chat.build(chat_templates.tokenizer("custom"), **settings), TOOLS if tools else ())
    finally:
        del FAMILIES["custom"]


def test_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match="has no support for tools"):
        conversations("gemma", tools=True)
    with pytest.raises(UserError, match="has no support for tools"):
        conversations("phi", tools=True)
    with pytest.raises(UserError, match="with text rather than with a token"):
        custom(TEXT)
    with pytest.raises(UserError, match="several messages of a turn"):
        custom(HARMONY, "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", eos="<|return|>")
    shouting = chat_templates.QWEN25.replace("""'<tool_call>\\n{"name": "' + """, "")
    shouting = shouting.replace("""'", "arguments": ' + (call.function.arguments | tojson) + '}\\n</tool_call>'""", SHOUTED)
    with pytest.raises(UserError, match=r"in a way that groupwise cannot read.*search!zqkeyqz=0"):
        custom(shouting, tools=True)
    silent = chat_templates.CODER.replace("for call in m.tool_calls or []", "for call in []")
    with pytest.raises(UserError, match=r"the model's chat template writes no tool calls \(docs/conversations.md\)$"):
        custom(silent, tools=True)
    with pytest.raises(UserError, match="needs a tokenizer with a chat template"):
        Conversations(Chat.build(chat_templates.tokenizer("qwen3"), chat=False))
    with pytest.raises(UserError, match="two tools have the name 'search'"):
        Conversations(Chat.build(chat_templates.tokenizer("qwen3")), [TOOLS[0], TOOLS[0]])


SHOUTED = "'!' ~ (call.function.arguments | items | map('join', '=') | join('&'))"


def test_check_names_the_first_differing_token() -> None:
    """A template that counts its tool messages writes later ones in another way."""
    counting = chat_templates.CODER.replace(
        "'<|im_start|>user\\n<tool_response>\\n'", "'<|im_start|>user\\n' ~ loop.index ~ '<tool_response>\\n'"
    )
    assert counting != chat_templates.CODER
    with pytest.raises(
        UserError, match=r"later messages in another way than early ones: token \d+ is '5' in one and '3' in the other"
    ):
        custom(counting, tools=True).check()


def test_system_messages_and_template_arguments() -> None:
    with pytest.raises(UserError, match=r"System role not supported; if it takes no system message, leave model\.system_prompt"):
        Chat.build(chat_templates.tokenizer("gemma"), system_prompt="Be brief.")
    silent = chat_templates.PHI.replace("m.role == 'system' and m.content", "false")
    with pytest.raises(UserError, match="leaves system messages out"):
        custom(silent, system_prompt="Be brief.")
    with pytest.raises(UserError, match=r"never reads 'enable_thinkin'; did you mean 'enable_thinking'"):
        conversations("qwen3", template_kwargs={"enable_thinkin": False})
    talk = conversations("qwen3", system_prompt="Be brief.", template_kwargs={"enable_thinking": False})
    rendered = talk.chat.tokenizer.decode(talk.prompt("Hello"))
    assert rendered.startswith("<|im_start|>system\nBe brief.\n\n# Tools") and rendered.endswith("<think>\n\n</think>\n\n")
    own = talk.chat.tokenizer.decode(
        talk.prompt([{"role": "system", "content": "Be long."}, {"role": "user", "content": "Hello"}])
    )
    assert "Be brief." not in own and own.startswith("<|im_start|>system\nBe long.")
    assert talk.suffix([{"role": "user", "content": "More"}], closed=True).tolist()[-4:] == talk.prompt("Hello").tolist()[-4:]


def test_templates_cannot_leave_their_sandbox() -> None:
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(UserError, match="refuses messages"):
        custom(escape)


def test_a_tokenizer_of_few_characters() -> None:
    """The synthetic conversations need no letters of the tokenizer: only what is rendered in earnest must be in it."""
    tokenizer = character_tokenizer('0123456789+-*/=.,:?{}[]"_ \nabcdefgimnrtuso')
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<tool>", "<call>"]})
    tokenizer.chat_template = (
        "{{ tools | map(attribute='function.name') | join(',') if tools }}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{{ m.content }}{% for call in m.tool_calls or [] %}"
        "{{ '<call>' + call.function.name + ':' + (call.function.arguments | tojson) }}{% endfor %}<end>"
        "{% else %}{{ '<' + m.role + '>' + m.content + '\n' }}{% endif %}{% endfor %}"
    )
    tool = {"type": "function", "function": {"name": "sum", "parameters": {"properties": {"a": {}, "b": {}}}}}
    talk = Conversations(Chat.build(tokenizer), [tool])
    assert "lacks letters" in " ".join(talk.check())
    turn = torch.tensor(tokenizer('<call>sum:{"a": 1, "b": 2}<end>').input_ids)
    said = talk.parse(turn)
    assert known(said.calls) == [("sum", {"a": 1, "b": 2})] and said.closed
    assert tokenizer.decode(talk.after(turn, [{"role": "tool", "content": "3"}])) == "<tool>3\n"
    assert tokenizer.decode(talk.after(turn[:-1], [{"role": "user", "content": "4+4="}])) == "<end><user>4+4=\n"


def test_messages_of_the_wrong_order_are_refused() -> None:
    talk = conversations("qwen3")
    for messages in (
        [],
        [{"role": "assistant", "content": ""}],
        [{"role": "user", "content": ""}, {"role": "tool", "content": ""}],
    ):
        with pytest.raises(ValueError, match="messages of tools, then of others"):
            talk.suffix(messages, closed=True)
    with pytest.raises(ValueError, match=r"use Conversations\.after"):
        conversations("glm").suffix([{"role": "user", "content": ""}], closed=True)
    with pytest.raises(ValueError, match="need tools"):
        conversations("gemma").suffix([{"role": "tool", "content": ""}], closed=True)
