"""Language models: loading, the one owner of a Hugging Face module, and how it runs here."""

from groupwise.models.adapters import FULL_TRAINING_RATE
from groupwise.models.backend import BACKENDS, Backend
from groupwise.models.chat import Chat, encode_prompt
from groupwise.models.conversation import Conversations, Said
from groupwise.models.language_model import LanguageModel
from groupwise.models.loading import (
    character_tokenizer,
    load_config,
    load_module,
    load_tokenizer,
    new_module,
)
from groupwise.models.tool_calls import Call

__all__ = [
    "BACKENDS",
    "FULL_TRAINING_RATE",
    "Backend",
    "Call",
    "Chat",
    "Conversations",
    "LanguageModel",
    "Said",
    "character_tokenizer",
    "encode_prompt",
    "load_config",
    "load_module",
    "load_tokenizer",
    "new_module",
]
