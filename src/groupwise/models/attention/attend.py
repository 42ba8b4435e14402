"""What attention layers and recurrent layers call while a decoder runs on packed sequences."""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionForm:
    """What a layer's attention adds to plain causal attention."""

    window: int = 0
    """Sliding window: a token sees the last `window` tokens of its sequence, itself included; 0: all."""
    softcap: float = 0.0
    """Soft cap c of the scores, c tanh(score / c), applied after scaling; 0: none."""
    sinks_H: Tensor | None = None
    """Attention sinks: for each query head a logit that takes part in the softmax and has no value."""

    @property
    def plain(self) -> bool:
        return not (self.window or self.softcap) and self.sinks_H is None


PLAIN = AttentionForm()


class Attend(Protocol):
    """A forward pass over N packed tokens, as far as tokens of a sequence depend on each other."""

    def __call__(
        self, layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scale: float, form: AttentionForm = PLAIN
    ) -> Tensor:
        """The attention output of each token, [N, H, D]: H query heads share K key-value heads, of size D."""
        ...

    def mix(self, layer: Any, forward: Any, hidden_NH: Tensor) -> Tensor:
        """The output [N, H] of a recurrent layer (linear attention, state space model, convolution).

        Args:
            layer: what its states are kept under.
            forward: how it runs, a `models.recurrent.RecurrentForward`.
            hidden_NH: the layer's input.
        """
        ...


current_attend: ContextVar[Attend] = ContextVar("groupwise_attend")
"""The attention of the forward pass under way."""
