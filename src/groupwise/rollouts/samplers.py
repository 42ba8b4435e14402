"""Which sampler a recipe's `rollouts.sampler` means."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from groupwise.config import RolloutsSection, Source
from groupwise.errors import UserError, nearest
from groupwise.models import LanguageModel
from groupwise.plugins import is_reference, load_function
from groupwise.rollouts.base import Sampler
from groupwise.rollouts.native import NativeSampler


def native(settings: RolloutsSection, model: LanguageModel, tokenizer: Any) -> Sampler:
    """The engine in this process."""
    dtype, cache_dtype = (getattr(torch, name) if name else None for name in (settings.dtype, settings.cache_dtype))
    return NativeSampler(model, tokenizer, dtype=dtype, cache_dtype=cache_dtype, max_rows=settings.max_rows)


SAMPLERS: dict[str, Callable[[RolloutsSection, LanguageModel, Any], Sampler]] = {"native": native}
"""Name -> a function of ([rollouts], the policy, its tokenizer). To add one: a module with such a function, and one line here."""


def find_sampler(settings: RolloutsSection, source: Source) -> Callable[[RolloutsSection, LanguageModel, Any], Sampler]:
    """The function that makes the sampler: a named one, or the user's "file.py:name".

    Raises:
        UserError: there is none of that name.
    """
    if is_reference(settings.sampler):
        try:
            return load_function(settings.sampler, Path(source.path).parent).function
        except UserError as error:
            raise source.error("rollouts.sampler", str(error)) from error
    if settings.sampler not in SAMPLERS:
        raise source.error("rollouts.sampler", f"there is no sampler {settings.sampler!r}{nearest(settings.sampler, SAMPLERS)}")
    return SAMPLERS[settings.sampler]
