"""Prompts as the model reads them: texts, or messages through the tokenizer's chat template."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from groupwise.errors import UserError, nearest
from groupwise.models import templates
from groupwise.text import shortened
from groupwise.types import Message

Tool = Mapping[str, Any]
"""The JSON schema of a tool, as transformers' `apply_chat_template` takes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """How prompts become tokens: a tokenizer, whether its chat template is used, and with what."""

    tokenizer: Any
    template: bool
    """Whether prompts go through the chat template."""
    system_prompt: str = ""
    """The system message of conversations that have none; empty: none."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the template, such as enable_thinking."""

    @classmethod
    def build(
        cls, tokenizer: Any, chat: bool | None = None, system_prompt: str = "", template_kwargs: Mapping[str, Any] | None = None
    ) -> "Chat":
        """`chat` None: through the template wherever there is one.

        Raises:
            UserError: a template is asked for, or needed, and there is none; or it ignores the system prompt or an argument.
        """
        template = bool(tokenizer.chat_template) if chat is None else chat
        if template and not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template")
        if not template and (system_prompt or template_kwargs):
            name = "model.system_prompt" if system_prompt else "model.chat_template_kwargs"
            raise UserError(f"{name} needs a chat template, which is not used here")
        built = cls(tokenizer=tokenizer, template=template, system_prompt=system_prompt, template_kwargs=template_kwargs or {})
        built._check_arguments()
        if system_prompt and system_prompt.strip() not in built.render("a question"):
            raise UserError("model.system_prompt: the chat template leaves system messages out; put the text in the prompts")
        return built

    def _check_arguments(self) -> None:
        for key in self.template_kwargs:
            if not re.search(rf"\b{re.escape(key)}\b", templates.source_of(self.tokenizer)):
                read = templates.variables(self.tokenizer)
                known = sorted(read - {"messages", "tools", "documents", "add_generation_prompt", "raise_exception"})
                raise UserError(f"model.chat_template_kwargs: the chat template never reads {key!r}{nearest(key, known)}")

    def messages(self, prompt: str | Sequence[Message]) -> list[dict[str, Any]]:
        """The prompt as messages, with the system prompt in front where it has no system message of its own."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]
        if self.system_prompt and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return messages

    def render(self, prompt: str | Sequence[Message], tools: Sequence[Tool] = (), generation: bool = True) -> str:
        """The text that the chat template makes of a conversation, run in transformers' sandbox, with limits.

        Args:
            tools: what the model may call.
            generation: whether the opening of the assistant's turn follows.

        Raises:
            UserError: the template refuses the messages, or reaches a limit.
        """
        messages = self.messages(prompt)
        try:
            schemas = [dict(tool) for tool in tools] or None
            return templates.render(
                self.tokenizer, messages, tools=schemas, add_generation_prompt=generation, **self.template_kwargs
            )
        except UserError:
            raise
        except Exception as error:  # a template is the model's own program, and raises what it likes
            roles = ", ".join(str(message.get("role")) for message in messages)
            hint = ""
            if self.system_prompt and messages[0]["role"] == "system":
                hint = "; if it takes no system message, leave model.system_prompt empty and put the text in the prompts"
            reason = shortened(str(error), 500)
            raise UserError(f"the model's chat template refuses messages of the roles {roles}: {reason}{hint}") from error

    def ids(self, text: str) -> list[int]:
        """The tokens of a rendered text."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def encode(self, prompt: str | Sequence[Message], tools: Sequence[Tool] = ()) -> Tensor:
        """int64 [L]: the prompt's tokens, the template's opening of the assistant's turn included.

        Raises:
            UserError: messages without a chat template.
        """
        if not self.template:
            if not isinstance(prompt, str):
                raise UserError("a prompt of messages needs a tokenizer with a chat template, and model.chat left out or true")
            return torch.tensor(self.tokenizer(prompt).input_ids, dtype=torch.long)
        return torch.tensor(self.ids(self.render(prompt, tools)), dtype=torch.long)


def encode_prompt(tokenizer: Any, prompt: str | Sequence[Message], chat: bool | None = None) -> Tensor:
    """int64 [L]: the prompt's tokens, through the chat template if `chat`, or if it is None and there is one."""
    return Chat.build(tokenizer, chat).encode(prompt)
