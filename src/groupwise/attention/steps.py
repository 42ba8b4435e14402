"""Steps of generation of a few fixed sizes; on a GPU each is captured as a graph, so that a step costs the CPU one call."""

from collections.abc import Callable

import torch
from torch import Tensor

from groupwise.attention.plain import Placement

Step = Callable[[Tensor, Placement], Tensor]
"""(tokens_R, placement) -> hidden states [R, H], without waiting for the GPU."""


class FixedSteps:
    """A step, of which each size is captured when it first comes."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._captured: dict[tuple[int, ...], tuple[Tensor, Placement, Callable[[], None], Tensor]] = {}

    def __call__(self, tokens_R: Tensor, at: Placement) -> Tensor:
        """Hidden states [R, H], which the next step of this size overwrites."""
        size = len(tokens_R), len(at.lengths_P), at.width, at.window
        if size not in self._captured:
            written_R, prompt_R, place_R, lengths_P = (x.clone() for x in at.tensors())
            fixed = tokens_R.clone(), Placement(written_R, prompt_R, place_R, lengths_P, at.width, at.window)
            self._captured[size] = *fixed, *self._capture(*fixed)
        tokens, place, replay, hidden_RH = self._captured[size]
        for old, new in zip((tokens, *place.tensors()), (tokens_R, *at.tensors()), strict=True):
            old.copy_(new)
        replay()
        return hidden_RH

    def _capture(self, tokens_R: Tensor, at: Placement) -> tuple[Callable[[], None], Tensor]:
        """What runs the step again on whatever these tensors then hold, and what it writes.

        It runs here too, for a graph wants libraries to be warm; twice is as good as once, since it writes the same keys again.
        """
        hidden_RH = self._step(tokens_R, at)
        if tokens_R.device.type != "cuda":
            return lambda: _copy(hidden_RH, self._step(tokens_R, at)), hidden_RH
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            hidden_RH = self._step(tokens_R, at)
        return graph.replay, hidden_RH


def _copy(to: Tensor, new: Tensor) -> None:
    to.copy_(new)
