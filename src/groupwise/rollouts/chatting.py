"""`POST /v1/chat/completions`, for agents that speak to OpenAI's API: their turns are recorded as token ids.

A conversation's tokens grow only: what was sampled is never decoded and encoded again. So the server remembers the tokens of each
conversation that it has taken part in, by its messages; the next request of that conversation is answered after these tokens and
those of the messages that are new.
"""

import hashlib
import json
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal
from uuid import uuid4

import torch
from pydantic import Field
from torch import Tensor

from groupwise.errors import UserError
from groupwise.models import Chat, Conversations
from groupwise.rollouts.base import Request, Sampling
from groupwise.rollouts.wire import Body, Count, Seed, Stop, Token, TopK, Zero, encode_versions
from groupwise.types import Completion, Message

CHAT = "/v1/chat/completions"
MOST = 4096
"""Conversations that are remembered, the latest ones."""
MOST_TOOLS = 64
"""Sets of tools whose way to be called is remembered."""
ROLES = ("system", "developer", "user", "assistant", "tool")
ALWAYS = ("role", "content", "name")
"""Fields of every message. Whether a name is written is up to the chat template."""
OF_ROLE = {"assistant": ("tool_calls", "reasoning_content"), "tool": ("tool_call_id",)}
"""Further ones; reasoning comes back with turns that were sampled here, whose tokens hold it."""


class ChatBody(Body):
    """A request. What is left out of the sampling parameters is as the recipe has it."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    model: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    n: Count | None = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: TopK | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Seed | None = None
    stop: Stop | list[Stop] | None = None
    stop_token_ids: list[Token] | None = None
    logprobs: bool | None = None
    top_logprobs: Literal[0] | None = None
    return_token_ids: bool | None = None
    """As of vLLM: `prompt_token_ids` in the response, `token_ids` in choices."""
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    stream: Literal[False] | None = None
    user: str | None = None
    """Without effect."""

    def sampling(self, default: Sampling, ends: Sequence[int]) -> Sampling:
        """How to draw; `ends`: further tokens that end a turn."""
        given = {
            "max_tokens": self.max_completion_tokens or self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "min_p": self.min_p,
            "stop": None if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
        }
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        tokens = default.stop_tokens if self.stop_token_ids is None else self.stop_token_ids
        return replace(default, **changes, stop_tokens=tuple(sorted({*tokens, *ends}))).greedy_as_limit()


@dataclass(frozen=True, slots=True)
class Remembered:
    """A conversation that ends with a turn that was sampled here."""

    prompt: Tensor
    """int64 [L], what it was sampled after."""
    said: Completion


class ChatCompletions:
    """Answers requests, and remembers the tokens of conversations."""

    def __init__(
        self,
        chat: Chat,
        default: Sampling,
        generate: Callable[[Request], Coroutine[Any, Any, tuple[Completion, ...]]],
        id_of: Callable[[int], str],
    ) -> None:
        """
        Args:
            default: what a request does not say.
            generate: gives the completions of a request.
            id_of: the id of the weights that a version of `Completion.versions` stands for.
        """
        self._chat, self._default, self._generate, self._id_of = chat, default, generate, id_of
        self._conversations: OrderedDict[str, Conversations] = OrderedDict()
        self._remembered: OrderedDict[bytes, Remembered] = OrderedDict()

    async def answer(self, body: ChatBody, name: str) -> dict[str, Any]:
        """The response; `name` is the model's.

        Raises:
            UserError: the messages or tools cannot be read, or the chat template refuses them.
        """
        tools = (body.tools or []) if body.tool_choice != "none" else []
        _check_tools(tools)
        conversation, messages = self._conversation(tools), [_read(i, message) for i, message in enumerate(body.messages)]
        prompt, handle = self._prompt(conversation, messages, tools)
        request = Request(
            prompt=prompt,
            sampling=body.sampling(self._default, conversation.stop_tokens),
            seed=secrets.randbits(56) if body.seed is None else body.seed,
            n=body.n or 1,
            keep=True,
            continues=handle,
        )
        completions = await self._generate(request)
        choices = []
        for index, said in enumerate(completions):
            choice, message = self._choice(index, said, conversation, prompt, body)
            choices.append(choice)
            self._remember([*messages, _read(len(messages), message)], tools, Remembered(prompt, said))
        sampled = sum(len(said.tokens) for said in completions)
        return {
            "id": f"chatcmpl-{uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": name,
            "choices": choices,
            "usage": {
                "prompt_tokens": len(prompt),
                "completion_tokens": sampled,
                "total_tokens": len(prompt) + sampled,
            },
            **({"prompt_token_ids": prompt.tolist()} if body.return_token_ids else {}),
        }

    def _conversation(self, tools: Sequence[dict[str, Any]]) -> Conversations:
        key = json.dumps(tools, sort_keys=True)
        if key not in self._conversations:
            self._conversations[key] = Conversations(self._chat, tools)
        self._conversations.move_to_end(key)
        if len(self._conversations) > MOST_TOOLS:
            self._conversations.popitem(last=False)
        return self._conversations[key]

    def _prompt(
        self, conversation: Conversations, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]]
    ) -> tuple[Tensor, int | None]:
        """The tokens of a conversation, and what they continue: as they were sampled where it was held here, else as the chat
        template writes its messages."""
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
        known = self._remembered.get(_key(messages[: last + 1], tools)) if 0 <= last < len(messages) - 1 else None
        if known is not None:
            try:
                suffix = conversation.after(known.said.tokens, messages[last + 1 :])
            except ValueError as error:
                raise UserError(f"messages: {error}") from error
            return torch.cat([known.prompt, known.said.tokens, suffix]), known.said.handle
        return conversation.prompt([_for_template(message, conversation) for message in messages]), None

    def _remember(self, messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]], what: Remembered) -> None:
        key = _key(messages, tools)
        self._remembered[key] = what
        self._remembered.move_to_end(key)
        if len(self._remembered) > MOST:
            self._remembered.popitem(last=False)

    def _choice(
        self, index: int, said: Completion, conversation: Conversations, prompt: Tensor, body: ChatBody
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        turn = conversation.parse(said.tokens, prompt)
        message = {**turn.message}
        if turn.calls:
            message |= {"content": message["content"] or None, "tool_calls": [call.as_message(text=True) for call in turn.calls]}
        choice: dict[str, Any] = {
            "index": index,
            "message": message,
            "finish_reason": "tool_calls" if turn.calls and said.stop == "stop" else said.stop,
            "logprobs": {"content": self._logprobs(said)} if body.logprobs else None,
            "weight_versions": encode_versions(said, self._id_of),
        }
        return (choice | {"token_ids": said.tokens.tolist()} if body.return_token_ids else choice), message

    def _logprobs(self, said: Completion) -> list[dict[str, Any]]:
        pairs = zip(said.tokens.tolist(), said.logprobs.tolist(), strict=True)
        texts = [(self._chat.tokenizer.decode([token]), logprob) for token, logprob in pairs]
        return [
            {"token": text, "logprob": logprob, "bytes": list(text.encode(errors="replace")), "top_logprobs": []}
            for text, logprob in texts
        ]


# --- messages and tools


def _check_tools(tools: Sequence[dict[str, Any]]) -> None:
    """
    Raises:
        UserError: a part of a schema that is read here, or by every chat template, is no JSON object.
    """
    for i, tool in enumerate(tools):
        function = tool.get("function", tool)
        parameters = function.get("parameters", {}) if isinstance(function, dict) else {}
        properties = parameters.get("properties", {}) if isinstance(parameters, dict) else {}
        of_each = properties.items() if isinstance(properties, dict) else ()
        parts = {"": function, ".parameters": parameters, ".parameters.properties": properties}
        parts |= {f".parameters.properties.{name}": schema for name, schema in of_each}
        for place, part in parts.items():
            if not isinstance(part, dict):
                raise UserError(f"tools.{i}{'.function' if 'function' in tool else ''}{place}: must be an object")


def _read(i: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with what counts in it, written in one way: clients send arguments as text or not, and fields that are empty.

    Raises:
        UserError: it is none that can be read.
    """
    role = message.get("role")
    if role not in ROLES:
        raise UserError(f"messages.{i}.role: {role!r} is not one of {', '.join(ROLES)}")
    for key, value in message.items():
        if key not in (*ALWAYS, *OF_ROLE.get(role, ())) and value:
            raise UserError(f"messages.{i}.{key}: is unknown or unsupported in a message of the role {role!r}")
    for key in ("name", "tool_call_id"):
        if not isinstance(message.get(key), str | None):
            raise UserError(f"messages.{i}.{key}: must be a text")
    content, calls = message.get("content"), message.get("tool_calls") or []
    if isinstance(content, list):
        if not all(_is_text(part) for part in content):
            raise UserError(
                f"messages.{i}.content: only parts of the type 'text' are supported, with a field 'text' and no other"
            )
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str | None):
        raise UserError(f"messages.{i}.content: must be a text, or parts of the type 'text'")
    if not isinstance(calls, list):
        raise UserError(f"messages.{i}.tool_calls: must be a list")
    read: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": content or ""}
    read |= {key: message[key] for key in ("name", "tool_call_id") if message.get(key)}
    if calls:
        read["tool_calls"] = [_read_call(f"messages.{i}.tool_calls.{j}", call) for j, call in enumerate(calls)]
    return read


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text" and isinstance(part["text"], str)


def _read_call(place: str, call: Any) -> dict[str, Any]:
    try:
        function = call["function"]
        arguments = function["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(arguments, dict):
            raise TypeError("arguments have names")
        read = {"name": str(function["name"]), "arguments": arguments}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{place}: is no call of a function with arguments in JSON") from error
    return {"type": "function", "id": str(call.get("id", "")), "function": read}


def _for_template(message: dict[str, Any], conversation: Conversations) -> dict[str, Any]:
    """A message as the chat template takes it: the arguments of calls as JSON text, or as they are."""
    form = conversation.ends.form
    if "tool_calls" not in message or form is None or not form.arguments_as_text:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _key(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> bytes:
    """What a conversation is remembered by."""
    return hashlib.sha256(json.dumps([messages, tools], sort_keys=True).encode()).digest()
