"""What the native engine knows of each request, and what it keeps of finished ones."""

import asyncio
import itertools
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from groupwise.rollouts.base import Request
from groupwise.rollouts.drawing import Drawing
from groupwise.types import Completion, VersionSpan


@dataclass(slots=True, eq=False)
class Job:
    """A request under way."""

    request: Request
    future: "asyncio.Future[tuple[Completion, ...]]"
    arrived: int
    """The decoding step at which it came."""
    drawing: Drawing
    uniforms: Tensor
    """float64 [n, T], the random numbers of its tokens."""
    slots: list[int] = field(default_factory=list)
    """Its rows in the table, in order."""
    left: int = 0
    """Rows that are not finished."""
    versions: list[tuple[int, Tensor]] = field(default_factory=list)
    """(version of the weights, length of each row when they were loaded)."""
    handles: dict[int, int] = field(default_factory=dict)
    """Slot -> handle of the row's kept keys and values."""


@dataclass(slots=True)
class Kept:
    """The KV cache of a finished completion, kept so that a later request can continue it."""

    tokens: list[int]
    """Those whose keys and values are cached: the prompt's, and all but the last sampled one."""
    prefix: Any
    """Their keys and values, as the cache returned them."""


def spans(versions: list[tuple[int, Tensor]], row: int, length: int) -> tuple[VersionSpan, ...]:
    """Which version of the weights made which tokens of a row. `versions`: of its job."""
    starts = [*(int(lengths[row]) for _, lengths in versions), length]
    parts = zip(versions, itertools.pairwise(starts), strict=True)
    return tuple(VersionSpan(start, end, version) for (version, _), (start, end) in parts if end > start)
