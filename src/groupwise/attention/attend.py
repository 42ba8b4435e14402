"""What attention layers call back to while a decoder runs on a flat sequence of tokens."""

from contextvars import ContextVar
from typing import Protocol

from torch import Tensor


class Attend(Protocol):
    def __call__(self, layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scale: float) -> Tensor:
        """What each of N tokens gathers, [N, H, D]; K key-value heads serve H query heads."""
        ...


current_attend: ContextVar[Attend] = ContextVar("groupwise_attend")
