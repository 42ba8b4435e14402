"""Steps of generation of a few fixed sizes; on a GPU each is captured as a graph, so that a step costs the CPU one call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from groupwise.attention.plain import Placement

Step = Callable[[Tensor, Placement], Tensor]
"""(tokens_R, placement) -> hidden states [R, H], without waiting for the GPU."""


class FixedSteps:
    """Steps of some sizes, each captured when it first comes."""

    def __init__(self) -> None:
        self._pool: Any = None
        """Memory of all graphs, which never run at once."""
        self._captured: dict[tuple[int, ...], tuple[Tensor, Placement, Callable[[Step], None], Tensor]] = {}

    def __call__(self, step: Step, tokens_R: Tensor, at: Placement) -> Tensor:
        """Hidden states [R, H], which the next step of this size overwrites. `step` is the same each time."""
        size = len(tokens_R), len(at.lengths_P), at.width, at.window
        if size not in self._captured:
            written_R, prompt_R, place_R, lengths_P = (x.clone() for x in at.tensors())
            fixed = tokens_R.clone(), Placement(written_R, prompt_R, place_R, lengths_P, at.width, at.window)
            self._captured[size] = *fixed, *self._capture(step, *fixed)
        tokens, place, run, hidden_RH = self._captured[size]
        for old, new in zip((tokens, *place.tensors()), (tokens_R, *at.tensors()), strict=True):
            old.copy_(new)
        run(step)
        return hidden_RH

    def _capture(self, step: Step, tokens_R: Tensor, at: Placement) -> tuple[Callable[[Step], None], Tensor]:
        """What runs the step again on whatever these tensors then hold, and what it writes.

        It runs here too, for a graph wants libraries to be warm; twice is as good as once, since it writes the same keys again.
        """
        if tokens_R.device.type != "cuda":
            hidden_RH = step(tokens_R, at)
            return lambda step: _copy(hidden_RH, step(tokens_R, at)), hidden_RH
        with _no_waiting():  # a capture that fails leaves the device in disorder, so what cannot be captured fails here
            step(tokens_R, at)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile, as a reward does; and if this fails the stream is again what it was.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            hidden_RH = step(tokens_R, at)
        self._pool = graph.pool()
        return lambda _: graph.replay(), hidden_RH


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Within: whatever would wait for the GPU raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _copy(to: Tensor, new: Tensor) -> None:
    to.copy_(new)
