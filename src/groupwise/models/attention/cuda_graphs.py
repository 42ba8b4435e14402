"""Decoding steps of a few fixed sizes, each captured as a CUDA graph on a GPU, so that a step costs the CPU one launch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from groupwise.models.attention.decoding_torch import StepLayout

Step = Callable[[Tensor, StepLayout], Tensor]
"""(tokens_R, layout) -> hidden states [R, H], without a synchronisation with the GPU."""


class FixedSteps:
    """A decoding step, captured once for each size at which it is called."""

    def __init__(self) -> None:
        self._pool: Any = None
        """Memory shared by all graphs, which never run at the same time."""
        self._captured: dict[tuple[int, ...], tuple[Tensor, StepLayout, Callable[[Step], None], Tensor]] = {}

    def __call__(self, step: Step, tokens_R: Tensor, at: StepLayout) -> Tensor:
        """Hidden states [R, H], which the next step of this size overwrites. `step` is the same each time."""
        size = len(tokens_R), len(at.lengths_P), at.width, at.window
        if size not in self._captured:
            written_R, prompt_R, slot_R, lengths_P = (x.clone() for x in at.tensors())
            fixed = tokens_R.clone(), StepLayout(written_R, prompt_R, slot_R, lengths_P, at.width, at.window)
            self._captured[size] = *fixed, *self._capture(step, *fixed)
        tokens, layout, run, hidden_RH = self._captured[size]
        for old, new in zip((tokens, *layout.tensors()), (tokens_R, *at.tensors()), strict=True):
            old.copy_(new)
        run(step)
        return hidden_RH

    def _capture(self, step: Step, tokens_R: Tensor, at: StepLayout) -> tuple[Callable[[Step], None], Tensor]:
        """A function that runs the step again on what these tensors then hold, and the tensor that it writes.

        The step also runs here, since a capture needs initialised libraries; running it twice only writes the same keys again.
        """
        if tokens_R.device.type != "cuda":
            hidden_RH = step(tokens_R, at)
            return lambda step: _copy(hidden_RH, step(tokens_R, at)), hidden_RH
        with (
            _no_synchronisation()
        ):  # a failed capture leaves the device unusable, so a step that cannot be captured must fail before
            step(tokens_R, at)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as a reward model's, may use the device meanwhile; on failure the stream is restored.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            hidden_RH = step(tokens_R, at)
        self._pool = graph.pool()
        return lambda _: graph.replay(), hidden_RH


@contextmanager
def _no_synchronisation() -> Iterator[None]:
    """Within: whatever would synchronise with the GPU raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _copy(to: Tensor, new: Tensor) -> None:
    to.copy_(new)
