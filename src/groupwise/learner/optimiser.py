"""AdamW with warm-up and a schedule, and an update that refuses what is not finite."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import get_scheduler

from groupwise.errors import Diverged, RunError, is_out_of_memory
from groupwise.models.sharding import full


@dataclass(frozen=True, slots=True)
class Step:
    """What an update reports."""

    grad_norm: float
    """Before clipping."""
    learning_rate: float
    skipped: int
    """Updates skipped so far."""


class Optimiser:
    """Applies the gradient that the parameters hold, one update at a time."""

    def __init__(
        self,
        parameters: Iterable[Any],
        *,
        learning_rate: float,
        updates: int,
        warmup_steps: int = 0,
        schedule: Literal["constant", "linear", "cosine"] = "constant",
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        max_bad_updates: int = 5,
    ) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.adam = torch.optim.AdamW(self.parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True)
        name = "constant_with_warmup" if schedule == "constant" else schedule
        self.scheduler = get_scheduler(name, self.adam, num_warmup_steps=warmup_steps, num_training_steps=updates)
        self.max_grad_norm, self.max_bad_updates = max_grad_norm, max_bad_updates
        self.version = 0
        """Updates taken."""
        self.skipped = 0
        """Updates skipped, since the start."""
        self._bad_in_a_row = 0
        self._begun = 0
        """Updates begun: an error on the way leaves it unknown which weights were changed."""

    @property
    def position(self) -> tuple[int, int, int, int]:
        """Where it is, to come `back_to`."""
        return self._begun, self.version, self.skipped, self._bad_in_a_row

    def back_to(self, position: tuple[int, int, int, int]) -> bool:
        """Be as before the gradients that were computed since; False if one of them may have changed a weight."""
        self.clear()
        if self._begun != position[0]:
            return False
        _, self.version, self.skipped, self._bad_in_a_row = position
        return True

    def clear(self) -> None:
        """Forget the gradient."""
        self.adam.zero_grad(set_to_none=True)

    def step(self, loss: float) -> Step:
        """Clip the gradient and apply it; skip it when it or `loss` is not finite. Clears the gradient either way.

        Raises:
            Diverged: too many updates in a row were not finite.
            RunError: memory does not suffice.
        """
        try:
            return self._step(loss)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            mib = sum(2 * parameter.numel() * parameter.element_size() for parameter in self.parameters) / 2**20
            raise RunError(
                f"out of memory in the optimiser's step: AdamW keeps two moments of each trained weight, {mib:,.0f} MiB in all. "
                "[model.lora] trains few weights, and model.dtype = 'bfloat16' halves the size of each"
            ) from error

    def _step(self, loss: float) -> Step:
        norm: Tensor = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        grad_norm = float(full(norm))
        learning_rate = float(self.scheduler.get_last_lr()[0])
        if torch.isfinite(torch.tensor([loss, grad_norm])).all():
            self._begun += 1
            self._bad_in_a_row = 0
            self.adam.step()
            self.scheduler.step()
            self.version += 1
        else:
            self._bad_in_a_row += 1
            self.skipped += 1
            if self._bad_in_a_row >= self.max_bad_updates:
                raise Diverged(
                    f"{self._bad_in_a_row} updates in a row had a loss or a gradient that is not finite "
                    f"(the last: loss {loss}, gradient norm {grad_norm}); the weights are as before them. "
                    f"A lower learning rate than {learning_rate:g} or more warm-up may help."
                )
        self.clear()
        return Step(grad_norm, learning_rate, self.skipped)

    def state_dict(self) -> dict[str, Any]:
        return {
            "adam": self.adam.state_dict(),
            "scheduled": self.scheduler.last_epoch,
            "counts": (self.version, self.skipped, self._bad_in_a_row),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Moments and counts; learning rate, schedule, betas and weight decay stay those of this optimiser's settings.

        Raises:
            ValueError: the moments are of other parameters.
        """
        of_parameters: dict[int, dict[str, Any]] = state["adam"]["state"]
        for index, moments in of_parameters.items():
            shapes = {tuple(value.shape) for name, value in moments.items() if name != "step"}
            if index >= len(self.parameters) or shapes != {tuple(self.parameters[index].shape)}:
                raise ValueError(f"the optimiser's moments are of other parameters: number {index} has the shape {shapes}")
        settings = [{key: value for key, value in group.items() if key != "params"} for group in self.adam.param_groups]
        self.adam.load_state_dict(state["adam"])
        self.scheduler.last_epoch = state["scheduled"]
        for group, mine in zip(self.adam.param_groups, settings, strict=True):
            group.update(mine)
        for group, learning_rate in zip(self.adam.param_groups, self.scheduler.get_lr(), strict=True):
            group["lr"] = learning_rate
        self.scheduler._last_lr = [group["lr"] for group in self.adam.param_groups]
        self.version, self.skipped, self._bad_in_a_row = state["counts"]
