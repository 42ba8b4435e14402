"""What the training loop asks of a sampler."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from groupwise.types import Completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to draw completions."""

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
    """Token ids that end a completion, beside the end-of-sequence token."""
    max_rows: int = 1024
    """Completions generated at once."""


class Sampler(Protocol):
    def generate(
        self, prompts: Sequence[Tensor], group_size: int, sampling: Sampling, *, seed: int
    ) -> Iterator[tuple[int, tuple[Completion, ...]]]:
        """Draw `group_size` completions for each prompt (int64 [L]).

        Yields (index of the prompt, its completions) as groups finish, in no promised order. The same arguments and
        weights give the same completions.
        """
        ...

    def load(self, model: Any, version: int) -> None:
        """Sample from these weights from now on; `version` counts the optimiser updates that made them."""
        ...
