"""Recurrent layers (linear attention, state space models, short convolutions) over packed sequences.

Such a layer is given rows instead of the packed sequence, each with the states after the tokens before it: a prompt begins with
none, and each of its completions with those that the prompt ends with. The layer's own forward runs, which takes and returns its
states through the methods of transformers' `Cache`; `States` has these methods and keeps the tensors, with their graph.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from groupwise.models.attention.attend import current_attend
from groupwise.models.attention.training_padded import by_length, ragged
from groupwise.models.patches import has_own_forward

Forward = Callable[[Tensor, "States"], Tensor]
"""(hidden states [R, T, H], the states before them, which it replaces) -> output [R, T, H]."""


class States:
    """The states of one recurrent layer for R rows, with the methods of transformers' `Cache` that such a layer calls."""

    def __init__(self) -> None:
        self.conv: dict[int, Tensor] = {}
        """The last inputs of its convolutions, [R, channels, width]."""
        self.recurrent: dict[int, Tensor] = {}
        """Its recurrent states, [R, ...]."""

    def select(self, index: Tensor) -> "States":
        """Copies of these rows' states."""
        chosen = States()
        chosen.conv = {i: state.index_select(0, index) for i, state in self.conv.items()}
        chosen.recurrent = {i: state.index_select(0, index) for i, state in self.recurrent.items()}
        return chosen

    @staticmethod
    def cat(parts: "list[States]") -> "States":
        """The states of the rows of all parts."""
        joined = States()
        joined.conv = {i: torch.cat([part.conv[i] for part in parts]) for i in parts[0].conv}
        joined.recurrent = {i: torch.cat([part.recurrent[i] for part in parts]) for i in parts[0].recurrent}
        return joined

    # --- what transformers' layers call

    def get_conv_state(self, layer_idx: int | None = None, state_idx: int = 0) -> Tensor | None:
        return self.conv.get(state_idx)

    def get_recurrent_state(self, layer_idx: int | None = None, state_idx: int = 0) -> Tensor | None:
        return self.recurrent.get(state_idx)

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int | None = None, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """Append inputs [R, channels, T]; returns the earlier ones and these, at least as many as the kernel is wide."""
        before = self.conv.get(state_idx)
        width = conv_kernel_size or (conv_states if before is None else before).shape[-1]
        every = conv_states if before is None else torch.cat([before, conv_states], -1)
        every = torch.nn.functional.pad(every, (max(0, width - every.shape[-1]), 0))
        self.conv[state_idx] = every[..., -width:]
        return every

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int | None = None, state_idx: int = 0, **_: Any
    ) -> Tensor:
        self.recurrent[state_idx] = recurrent_states
        return recurrent_states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return bool(self.conv or self.recurrent)

    def is_recording_past(self, layer_idx: int | None = None) -> bool:
        return False


def recurrent_layers(decoder: Any) -> list[tuple[Any, partial[Any]]]:
    """The decoder's recurrent layers, and for each the forward to patch in while packed sequences run."""
    found = {module: name for module in decoder.modules() if (name := _cache_argument(module))}
    # A decoder layer takes the cache only to hand it on to the layer inside.
    inner = [module for module in found if not any(other in found for other in module.modules() if other is not module)]
    return [(module, partial(_mix, module, found[module])) for module in inner]


def _cache_argument(module: Any) -> str | None:
    """The name under which a recurrent layer takes its states; None for other modules."""
    if not hasattr(module, "layer_idx") or has_own_forward(module):
        return None
    parameters = inspect.signature(module.forward).parameters
    if "cache_params" in parameters:
        return "cache_params"
    convolves = any(isinstance(child, torch.nn.Conv1d) for child in module.children())
    return "past_key_values" if convolves and "past_key_values" in parameters else None


def _mix(module: Any, argument: str, hidden_states: Tensor, **_: Any) -> Tensor:
    def forward(rows_RTH: Tensor, states: States) -> Tensor:
        output: Tensor = type(module).forward(module, rows_RTH, **{argument: states})
        return output

    return current_attend.get().mix(module, forward, hidden_states[0])[None]


class RecurrentRows:
    """Prompts and their completions, packed, as rows without padding on their left."""

    def __init__(self, prompt_lengths: Tensor, prompts_R: Tensor, lengths_R: Tensor, device: Any) -> None:
        """`prompts_R`: the prompt of each completion; `lengths_R`: its tokens. They follow the prompts in the packed sequence."""
        self._of_prompts: list[Tensor] = []
        index_PL, index_RT = ragged(prompt_lengths, 0), ragged(lengths_R, int(prompt_lengths.sum()))
        tokens = []
        # A state runs on through padding, so prompts of one length are run together.
        for length in sorted(set(prompt_lengths.tolist())):
            self._of_prompts.append((prompt_lengths == length).nonzero()[:, 0].to(device))
            tokens.append(index_PL[prompt_lengths == length, :length])
        self._prompt_order = torch.cat(self._of_prompts).argsort()
        self._starts: list[Tensor] = []
        for rows in by_length(lengths_R):
            # Layers take a single token for a step of generation, which writes to its states in place.
            longest = max(2, int(lengths_R[rows].max()))
            index = torch.nn.functional.pad(index_RT[rows], (0, 2), value=-1)[:, :longest]
            self._starts.append(prompts_R[rows].to(device))
            tokens.append(index)
        self._shapes = [tuple(index.shape) for index in tokens]
        flat = torch.cat([index.flatten() for index in tokens])
        self._gather = [index.clamp(min=0).flatten().to(device) for index in tokens]
        kept = (flat >= 0).nonzero()[:, 0]
        self._back = kept[flat[kept].argsort()].to(device)

    def run(self, forward: Forward, hidden_NH: Tensor) -> tuple[Tensor, States]:
        """The layer's output [N, H] for the packed tokens, and its states after each prompt."""
        outputs: list[Tensor] = []
        inputs = [
            hidden_NH.index_select(0, gather).view(*shape, -1) for gather, shape in zip(self._gather, self._shapes, strict=True)
        ]
        after: list[States] = []
        for rows_RTH in inputs[: len(self._of_prompts)]:
            after.append(States())
            outputs.append(forward(rows_RTH, after[-1]))
        states = States.cat(after).select(self._prompt_order)
        for rows_RTH, prompts in zip(inputs[len(self._of_prompts) :], self._starts, strict=True):
            outputs.append(forward(rows_RTH, states.select(prompts)))
        return torch.cat([output.flatten(0, 1) for output in outputs]).index_select(0, self._back), states
