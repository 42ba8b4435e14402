"""Which sampler a recipe's `rollouts.sampler` means."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from groupwise.config import RolloutsSection, Source
from groupwise.errors import RunError, UserError
from groupwise.guard import Watch, failure, passes, user_code, user_code_at_start
from groupwise.models import LanguageModel
from groupwise.plugins import UserFunction, is_reference, load_function
from groupwise.rollouts.base import LocalSampler, Request
from groupwise.rollouts.native import NativeSampler
from groupwise.types import Completion


def native(settings: RolloutsSection, model: LanguageModel, tokenizer: Any) -> LocalSampler:
    """The engine in this process."""
    dtype, cache_dtype = (getattr(torch, name) if name else None for name in (settings.dtype, settings.cache_dtype))
    return NativeSampler(model, tokenizer, dtype=dtype, cache_dtype=cache_dtype, max_rows=settings.max_rows)


SAMPLERS: dict[str, Callable[[RolloutsSection, LanguageModel, Any], LocalSampler]] = {"native": native}
"""Name -> a function of ([rollouts], the policy, its tokenizer). To add one: a module with such a function, and one line here."""


def _made(own: UserFunction, settings: RolloutsSection, model: LanguageModel, tokenizer: Any) -> LocalSampler:
    """A sampler of the user's own.

    Raises:
        UserError: it cannot be made, or is no sampler.
    """
    place = f"rollouts.sampler = {own.reference!r}"
    with user_code_at_start(place):
        sampler = own.function(settings, model, tokenizer)
    if not all(callable(getattr(sampler, name, None)) for name in ("generate", "load")):
        raise UserError(f"{place}: gives {type(sampler).__name__}, which has no generate() and load()")
    return GuardedSampler(sampler, place)


class GuardedSampler:
    """A sampler of the user's own: what it raises, or changes for the whole process, is an error that names it, and what it
    returns is checked."""

    def __init__(self, sampler: Any, place: str) -> None:
        self._sampler, self._place = sampler, place
        self._under_way = 0
        self._watch = Watch()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def load(self, weights: LanguageModel, version: int) -> None:
        with user_code(f"{self._place}: load()"):
            self._sampler.load(weights, version)

    async def generate(self, request: Request) -> tuple[Completion, ...]:
        """
        Raises:
            RunError: there are no completions.
        """
        self._begin()
        try:
            found = await self._sampler.generate(request)
        except BaseException as error:  # the user's sampler may raise anything
            if passes(error, self._watch):
                raise
            raise failure(f"{self._place}: generate()", error) from error
        finally:
            self._end()
        if (problem := completions_problem(found, request.n)) is not None:
            raise RunError(f"{self._place}: generate() {problem}")
        return tuple(found)

    def _begin(self) -> None:
        """Requests are under way at once, so that the first of them begins to watch, and the last looks what was changed."""
        if self._under_way == 0:
            self._watch = Watch()
            self._watch.begin()
        self._under_way += 1

    def _end(self) -> None:
        self._under_way -= 1
        if self._under_way == 0 and (changed := self._watch.end()) is not None:
            raise RunError(f"{self._place}: generate() changed {changed}, for the whole process")


def completions_problem(found: Any, n: int) -> str | None:
    """What is wrong with that as the completions of a request for n."""
    if not isinstance(found, tuple | list) or not all(isinstance(item, Completion) for item in found):
        return f"returned {type(found).__name__}; expected a tuple of {n} groupwise.types.Completion"
    if len(found) != n:
        return f"returned {len(found)} completions for a request of {n}"
    for item in found:
        shapes = [getattr(tensor, "shape", None) for tensor in (item.tokens, item.logprobs, item.mask)]
        if len(set(shapes)) > 1 or shapes[0] is None or len(shapes[0]) != 1 or not len(item.tokens):
            return f"returned tokens, logprobs and mask of shapes {shapes}; expected [T] of all three, T at least 1"
        if item.stop not in ("stop", "length"):
            return f"returned a completion whose stop is {item.stop!r}"
    return None


def find_sampler(settings: RolloutsSection, source: Source) -> Callable[[RolloutsSection, LanguageModel, Any], LocalSampler]:
    """The function that makes the sampler of this process: the user's "file.py:name", a named one, or else the native one, which
    stands in for samplers of other processes where a recipe's model is to be tried here.

    Raises:
        UserError: there is no such function.
    """
    name = settings.sampler
    if isinstance(name, str) and is_reference(name):
        try:
            own = load_function(name, Path(source.path).parent)
        except UserError as error:
            raise source.error("rollouts.sampler", str(error)) from error
        return functools.partial(_made, own)
    return SAMPLERS.get(name, native) if isinstance(name, str) else native
