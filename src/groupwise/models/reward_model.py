"""Reward models: sequence classifiers with one output, as TRL uses them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from groupwise.models.chat import Chat
from groupwise.models.loading import load_classifier, load_tokenizer

ROWS = 16
"""Texts that go through the model at once."""


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A sequence classifier with one output, and its tokenizer."""

    module: Any
    tokenizer: Any

    @classmethod
    def load(cls, path: str) -> "RewardModel":
        """The reward model in a local directory or of a Hugging Face id, on a GPU where there is one.

        Raises:
            UserError: there is none, or its file holds no head.
        """
        tokenizer, module = load_tokenizer(path), load_classifier(path)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        module.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(module.to(device), tokenizer)

    @torch.inference_mode()
    def rewards(self, prompt: Any, completions: Sequence[Any]) -> list[float]:
        """The model's output for a prompt with each completion: texts, or lists of messages, which its chat template writes.

        Raises:
            UserError: the template refuses them, or reaches a limit.
        """
        if isinstance(prompt, str):
            texts = [prompt + completion for completion in completions]
        else:
            texts = [
                Chat.build(self.tokenizer, True).render([*prompt, *completion], generation=False) for completion in completions
            ]
        found: list[float] = []
        for start in range(0, len(texts), ROWS):
            inputs = self.tokenizer(
                text=texts[start : start + ROWS],
                return_tensors="pt",
                padding=True,
                padding_side="right",
                add_special_tokens=False,
            )
            logits_B1 = self.module(**{key: value.to(self.module.device) for key, value in inputs.items()}).logits
            found += logits_B1[:, 0].float().tolist()
        return found
