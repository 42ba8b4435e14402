"""What the training loop asks of a learner."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from groupwise.types import Batch, Metrics

TokenRecord = dict[str, Tensor]
"""Of rows that were run: rows_B, as in the batch, and logprob, low, high (bounds on the ratio), clipped, entropy [B, T]."""


class Learner(Protocol):
    @property
    def version(self) -> int:
        """Optimiser updates taken."""
        ...

    def annotate(self, batch: Batch) -> tuple[Batch, dict[str, float]]:
        """The batch with old_logprobs_BT, and ref_logprobs_BT and values_BT where the algorithm uses them; and metrics.

        At least one token must be trained on.
        """
        ...

    def update(self, minibatch: Batch, record: Callable[[TokenRecord], None] | None = None) -> Metrics:
        """One optimiser step on rows whose advantages are set. Returns metrics.

        `record` is called with what the loss made of the tokens of each part that is run.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights that an exact resume needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
