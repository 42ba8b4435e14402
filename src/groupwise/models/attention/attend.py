"""What attention layers call while a decoder runs on packed sequences."""

from contextvars import ContextVar
from typing import Protocol

from torch import Tensor


class Attend(Protocol):
    """An attention over N packed tokens: H query heads share K key-value heads, of size D."""

    def __call__(self, layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scale: float) -> Tensor:
        """The attention output of each token, [N, H, D]."""
        ...


current_attend: ContextVar[Attend] = ContextVar("groupwise_attend")
"""The attention of the forward pass under way."""
