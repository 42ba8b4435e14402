"""PPO's critic: values of states, trained on their returns."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from groupwise.learner.optimiser import Optimiser
from groupwise.learner.ranks import ONE_RANK, Ranks
from groupwise.models import LanguageModel
from groupwise.models.value import ValueModel
from groupwise.types import Batch, TrainingBatch

if TYPE_CHECKING:
    from groupwise.config import CriticSection, LearnerSection


class Critic:
    """A value model with an optimiser of its own."""

    def __init__(
        self,
        model: LanguageModel,
        settings: "CriticSection",
        learner: "LearnerSection",
        *,
        updates: int,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        """`model`: a language model of its own. `learner`: how it is run. `updates`: how many the schedule spans. `ranks`: the
        processes that it is sharded over."""
        self.values_of = ValueModel(model)
        self.settings, self.learner, self.ranks = settings, learner, ranks
        self._run = ranks.shard(model, self.values_of.network, learner.precision)
        self.optimiser = Optimiser(
            self.values_of.network.parameters(),
            learning_rate=settings.learning_rate,
            updates=updates,
            warmup_steps=settings.warmup_steps,
            max_grad_norm=settings.max_grad_norm,
        )

    @property
    def model(self) -> LanguageModel:
        return self.values_of.model

    def values(self, batch: Batch) -> Tensor:
        """float32 [B, T]: the value of the state before each token; 0 after a row's end."""
        learner = self.learner
        return self._run(
            self.values_of.values,
            batch,
            share_prompts=learner.share_prompts,
            precision=learner.precision,
            checkpointing=learner.checkpointing,
        )

    def update(self, parts: Iterator[TrainingBatch], tokens: int) -> dict[str, float]:
        """One optimiser step on the parts of a minibatch that has `tokens` trained tokens.

        Raises:
            ValueError: a part has no old values or returns.
        """
        total = 0.0
        for part in parts:
            if part.values_BT is None or part.returns_BT is None:
                raise ValueError("a critic learns from values and returns, and this batch has none")
            losses_BT = value_losses(self.values(part), part.values_BT, part.returns_BT, self.settings.value_clip)
            loss = torch.where(part.mask_BT, losses_BT, 0).sum() / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        total = sum(self.ranks.gather(total))
        self.ranks.settle(self.values_of.network)
        step = self.optimiser.step(total)
        return {"critic/loss": total, "critic/grad_norm": step.grad_norm}

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.values_of.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values_of.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])


def value_losses(values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, clip: float) -> Tensor:
    """Half the larger of two squared errors: of the value, and of the value clipped to within `clip` of the old one [B, T]."""
    clipped_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
    return 0.5 * torch.maximum((values_BT - returns_BT) ** 2, (clipped_BT - returns_BT) ** 2)
