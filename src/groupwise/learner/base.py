"""What the training loop asks of a learner."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from groupwise.files import Digest
from groupwise.learner.updates import Update
from groupwise.types import Batch, LogprobBatch, TrainingBatch

TokenRecord = dict[str, Tensor]
"""Of rows that were run: rows_B, as in the batch, and logprob, low, high (bounds on the ratio), clipped, entropy [B, T]."""


class Learner(Protocol):
    """Policy, reference, critic and optimisers: everything that has weights."""

    @property
    def version(self) -> int:
        """Optimiser updates taken."""
        ...

    def begin_step(self) -> None:
        """A training step begins: what it does until a weight changes can be taken back."""
        ...

    def take_back(self) -> bool:
        """Be as before the step; False if that cannot be, since a weight may have changed."""
        ...

    def compute_logprobs(self, batch: Batch) -> tuple[LogprobBatch, dict[str, float]]:
        """The batch with the policy's log-probabilities before the first update, and metrics; where the algorithm uses them, also
        with the reference's log-probabilities and the critic's values. At least one token must be trained on."""
        ...

    def update(self, minibatch: TrainingBatch, record: Callable[[TokenRecord], None] | None = None) -> Update:
        """One optimiser step. `record` is called with what the loss made of the tokens of each part that is run."""
        ...

    def publish(self, directory: Path) -> None:
        """Write the policy as it is now for samplers of other processes: a Hugging Face model directory with safetensors, without
        a tokenizer, adapters merged, in the dtype of the weights. The directory must not exist; once it does, it is complete."""
        ...

    def probe(self, tokens: Tensor) -> Tensor:
        """float32 [L - 1]: the policy's log-probability of each of the tokens (int64 [L], at least two) but the first, at the
        temperature 1. Samplers show by it that they have these weights."""
        ...

    def save(self, directory: Path) -> Mapping[str, Digest]:
        """Write everything that an exact resume needs; returns what each file holds, by its name."""
        ...

    def load(self, directory: Path) -> None:
        """Continue from what `save` wrote.

        Raises:
            ValueError: it is of another model.
            Exception: whatever reading damaged files raises.
        """
        ...

    def export(self, directory: Path, tokenizer: Any) -> dict[str, float]:
        """Write the policy as a Hugging Face model directory or adapter; returns metrics of it (`LanguageModel.export`)."""
        ...
