"""PPO's critic: a second copy of the model whose head says what reward to expect from here."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from groupwise.config import LearnerSection
from groupwise.learner.logprobs import completion_hidden, inside_rows, running
from groupwise.learner.optimiser import Optimiser
from groupwise.types import Batch


class Critic:
    """Values of the states in which completion tokens are chosen, trained on their returns."""

    def __init__(
        self, model: Any, *, updates: int, learning_rate: float, warmup_steps: int, max_grad_norm: float, value_clip: float
    ) -> None:
        """`model`: a causal language model of its own, whose decoder is used. The head starts at 0, so every value does."""
        self.model = model
        decoder = model.base_model
        head = nn.Linear(decoder.config.get_text_config().hidden_size, 1, device=model.device, dtype=model.dtype)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.network = nn.ModuleDict({"decoder": decoder, "head": head})
        self.value_clip = value_clip
        self.optimiser = Optimiser(
            self.network,
            learning_rate=learning_rate,
            updates=updates,
            warmup_steps=warmup_steps,
            max_grad_norm=max_grad_norm,
        )

    def values(self, batch: Batch, settings: LearnerSection) -> Tensor:
        """float32 [B, T]: the value of the state before each token; 0 after a row's end."""
        with running(self.model, settings):
            hidden_NH = completion_hidden(self.model, batch, settings.share_prompts)
            values_N = self.network["head"](hidden_NH)[:, 0].float()
        zeros_BT = torch.zeros(batch.tokens_BT.shape, device=values_N.device)
        return zeros_BT.masked_scatter(inside_rows(batch), values_N)

    def update(self, parts: Iterator[Batch], tokens: int, settings: LearnerSection) -> dict[str, float]:
        """One optimiser step on the parts of a minibatch that has `tokens` trained tokens."""
        total = 0.0
        for part in parts:
            assert part.values_BT is not None and part.returns_BT is not None
            losses_BT = value_losses(self.values(part, settings), part.values_BT, part.returns_BT, self.value_clip)
            loss = torch.where(part.mask_BT, losses_BT, 0).sum() / tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        step = self.optimiser.step(total)
        return {"critic/loss": total, "critic/grad_norm": step["grad_norm"]}

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])


def value_losses(values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, clip: float) -> Tensor:
    """Half the larger of two squared errors: of the value, and of the value held within `clip` of the old one [B, T]."""
    held_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
    return 0.5 * torch.maximum((values_BT - returns_BT) ** 2, (held_BT - returns_BT) ** 2)
