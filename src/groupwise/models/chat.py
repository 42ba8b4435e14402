"""Prompts as the model reads them: texts, or messages through the tokenizer's chat template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from groupwise.errors import UserError
from groupwise.types import Message


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
            UserError: a template is asked for, or needed, and there is none.
        """
        template = bool(tokenizer.chat_template) if chat is None else chat
        if template and not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template")
        if not template and (system_prompt or template_kwargs):
            name = "model.system_prompt" if system_prompt else "model.chat_template_kwargs"
            raise UserError(f"{name} needs a chat template, which is not used here")
        return cls(tokenizer=tokenizer, template=template, system_prompt=system_prompt, template_kwargs=template_kwargs or {})

    def messages(self, prompt: str | Sequence[Message]) -> list[dict[str, Any]]:
        """The prompt as messages, with the system prompt in front where it has no system message of its own."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]
        if self.system_prompt and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        return messages

    def encode(self, prompt: str | Sequence[Message]) -> Tensor:
        """int64 [L]: the prompt's tokens, the template's opening of the assistant's turn included.

        Raises:
            UserError: messages without a chat template.
        """
        if not self.template:
            if not isinstance(prompt, str):
                raise UserError("a prompt of messages needs a tokenizer with a chat template, and model.chat left out or true")
            return torch.tensor(self.tokenizer(prompt).input_ids, dtype=torch.long)
        text = self.tokenizer.apply_chat_template(
            self.messages(prompt), tokenize=False, add_generation_prompt=True, **self.template_kwargs
        )
        return torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)


def encode_prompt(tokenizer: Any, prompt: str | Sequence[Message], chat: bool | None = None) -> Tensor:
    """int64 [L]: the prompt's tokens, through the chat template if `chat`, or if it is None and there is one."""
    return Chat.build(tokenizer, chat).encode(prompt)
