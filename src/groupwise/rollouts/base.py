"""What the training loop asks of a sampler."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from groupwise.models import LanguageModel
from groupwise.types import Completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to draw a completion."""

    max_tokens: int
    """Completion tokens, the end-of-sequence token included; a completion that reaches it unended is truncated."""
    temperature: float = 1.0
    top_p: float = 1.0
    """1: no limit."""
    top_k: int = 0
    """0: no limit."""
    min_p: float = 0.0
    """0: no limit."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; they stay part of it."""
    stop_tokens: tuple[int, ...] = ()
    """Token ids that end a completion, in addition to the end-of-sequence token."""

    @property
    def is_limited(self) -> bool:
        """Whether it may leave tokens of the vocabulary out; completions then need `Completion.kept`."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    def greedy_as_limit(self) -> "Sampling":
        """The same, where a temperature of 0 means the likeliest token, as in other engines: here that is `top_k` = 1."""
        return self if self.temperature else replace(self, temperature=1.0, top_k=1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One completion of a prompt, or a group of them."""

    prompt: Tensor
    """int64 [L], at least one token: everything before the completion, earlier turns of a conversation included."""
    sampling: Sampling
    seed: int
    """The same request to the same weights gives the same completions."""
    offset: int = 0
    """Random numbers of the seed to pass over: requests that share a seed draw from consecutive ranges of it."""
    n: int = 1
    """Completions."""
    keep: bool = False
    """Whether the sampler should keep the keys and values of the completions for requests that continue them."""
    continues: int | None = None
    """`Completion.handle` of the completion that `prompt` begins with, so that only the tokens after it need prefill. A sampler
    that has nothing kept under it computes the whole prompt: the result is the same."""


class Sampler(Protocol):
    """An inference engine and its copy, or view, of the weights."""

    async def generate(self, request: Request) -> tuple[Completion, ...]:
        """The request's completions, in order. Any number of requests may be under way at once; cancelling one frees its rows."""
        ...

    def health(self) -> dict[str, float]:
        """Numbers about the engine: the version of its weights, requests waiting, rows being generated, rows kept."""
        ...


class LocalSampler(Sampler, Protocol):
    """One in this process."""

    def load(self, weights: LanguageModel, version: int) -> None:
        """Sample from these weights from now on; `version` counts the optimiser updates that made them."""
        ...


def requests(prompts: Sequence[Tensor], n: int | Sequence[int], sampling: Sampling, seed: int) -> list[Request]:
    """A request for each prompt, with random numbers of its own from one seed; `n`: of every prompt, or of each."""
    sizes = [n] * len(prompts) if isinstance(n, int) else n
    offsets = itertools.accumulate(sizes, initial=0)
    return [
        Request(prompt=prompt, n=size, sampling=sampling, seed=seed, offset=before * sampling.max_tokens)
        for prompt, size, before in zip(prompts, sizes, list(offsets)[:-1], strict=True)
    ]
