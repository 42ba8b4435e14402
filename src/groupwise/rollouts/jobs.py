"""What the native engine knows of each request, and what it keeps of finished ones."""

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from groupwise.memory import total_memory
from groupwise.rollouts.base import Request
from groupwise.rollouts.drawing import Drawing
from groupwise.rollouts.rows import RowTable
from groupwise.types import Completion, VersionSpan

TOKENS_AT_ONCE = 65536
"""At most so many tokens go through the model at once when keys and values of rows under way are computed anew."""
KEPT_SHARE = 4
"""Keys and values of finished completions take at most this part of all memory."""


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


class KeptCompletions:
    """What is kept of finished completions, by handle; of too many the oldest are dropped."""

    def __init__(self, device: torch.device) -> None:
        self._most_bytes, self._bytes = total_memory(device) // KEPT_SHARE, 0
        self._kept: OrderedDict[int, Kept] = OrderedDict()
        self._handles = itertools.count(1)

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, kept: Kept, most: int) -> int:
        """Keep one more, and at most so many; returns its handle."""
        handle = next(self._handles)
        self._kept[handle] = kept
        self._bytes += kept.prefix.nbytes
        while self._kept and (len(self._kept) > most or self._bytes > self._most_bytes):
            self._pop(next(iter(self._kept)))
        return handle

    def _pop(self, handle: int) -> Kept:
        kept = self._kept.pop(handle)
        self._bytes -= kept.prefix.nbytes
        return kept

    def take(self, request: Request) -> Kept | None:
        """What was kept under the handle that the request continues, if its prompt really begins with it."""
        kept = None if request.continues is None else self._kept.get(request.continues)
        tokens = request.prompt.tolist()
        if kept is None or len(tokens) <= len(kept.tokens) or tokens[: len(kept.tokens)] != kept.tokens:
            return None
        assert request.continues is not None
        return self._pop(request.continues)

    def drop(self, handles: Iterable[int]) -> None:
        for handle in self._kept.keys() & set(handles):
            self._pop(handle)

    def clear(self) -> None:
        self._kept.clear()
        self._bytes = 0


def at_once(jobs: list[Job], running: Container[int], table: RowTable, most: int) -> list[list[tuple[Job, list[int]]]]:
    """Jobs under way, each with its rows that are running, in parts of at most so many tokens, or of one row. A job may be cut:
    then its prompt is in each of the parts."""
    parts: list[list[tuple[Job, list[int]]]] = []
    left = 0
    for job in jobs:
        for slot in (slot for slot in job.slots if slot in running):
            row, prompt = int(table.lengths_B[slot]), len(job.request.prompt)
            begun = bool(parts) and parts[-1][-1][0] is job
            if not parts or row + (0 if begun else prompt) > left:
                parts.append([])
                left, begun = most, False
            if not begun:
                parts[-1].append((job, []))
                left -= prompt
            parts[-1][-1][1].append(slot)
            left -= row
    return parts


def completions(job: Job, table: RowTable, tokenizer: Any) -> tuple[Completion, ...]:
    """What the rows of a finished job hold."""
    index = torch.tensor(job.slots, device=table.tokens_BT.device)
    lengths, stopped = table.lengths_B[index].tolist(), table.stopped_B[index].tolist()
    with torch.inference_mode(False):  # tensors of inference mode could not be trained on
        tokens_nT, logprobs_nT = table.tokens_BT[index].cpu().clone(), table.logprobs_BT[index].cpu().clone()
    rows = zip(tokens_nT.tolist(), lengths, strict=True)
    texts = tokenizer.batch_decode([row[:length] for row, length in rows], skip_special_tokens=True)  # lists: tensors take longer
    return tuple(
        Completion(
            text=text,
            tokens=tokens_nT[i, :length],
            logprobs=logprobs_nT[i, :length],
            mask=torch.ones(length, dtype=torch.bool),
            stop="stop" if stopped[i] else "length",
            versions=spans(job.versions, i, length),
            kept=table.kept.of(job.slots[i]),
            handle=job.handles.get(job.slots[i]),
        )
        for i, (length, text) in enumerate(zip(lengths, texts, strict=True))
    )


def spans(versions: list[tuple[int, Tensor]], row: int, length: int) -> tuple[VersionSpan, ...]:
    """Which version of the weights made which tokens of a row. `versions`: of its job."""
    starts = [*(int(lengths[row]) for _, lengths in versions), length]
    parts = zip(versions, itertools.pairwise(starts), strict=True)
    return tuple(VersionSpan(start, end, version) for (version, _), (start, end) in parts if end > start)
