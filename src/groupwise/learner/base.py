"""What the training loop asks of a learner."""

from typing import Any, Protocol

from groupwise.types import Batch


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

    def update(self, minibatch: Batch) -> dict[str, float]:
        """One optimiser step on rows whose advantages are set. Returns metrics."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights that an exact resume needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
