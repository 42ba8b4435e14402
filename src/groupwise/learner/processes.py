"""The processes that torchrun has started, as a learner sees them."""

import os
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from groupwise.learner.liveness import watch
from groupwise.learner.ranks import Item, Run
from groupwise.models import LanguageModel, checkpoint, sharding

LIMIT = timedelta(minutes=10)
"""For each exchange between processes that are at work: the longest that one may let the others wait, while it runs."""
SILENCE = 600.0
"""Seconds for which a process may stand still, unless the recipe says so (`cluster.timeout`)."""
IDLE = timedelta(days=365)
"""The same while the others wait for process 0 to ask for something, or for files; they see at once when it ends."""
FAILED = "groupwise/failed"
"""Where in the store a process that fails says why."""


class ManyRanks:
    """This process and the others; see `Ranks`."""

    def __init__(self, store: Store, silence: float = SILENCE) -> None:
        """`store`: of texts, which all processes see. `silence`: seconds for which a process may stand still."""
        self._store = store
        self._roots: dict[Any, sharding.Root] = {}
        self._identities: dict[LanguageModel, dict[str, str]] = {}
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        # Objects go over the CPU, also where weights go from GPU to GPU.
        self._objects = distributed.new_group(backend="gloo", timeout=LIMIT)
        self._patient = distributed.new_group(backend="gloo", timeout=IDLE)
        self._left = watch(store, self.rank, self.size, silence)

    @classmethod
    def join(cls, silence: float = SILENCE) -> "ManyRanks":
        """Meet the other processes, and take this one's GPU where there are any."""
        store, rank, size = next(iter(rendezvous("env://", timeout=LIMIT)))
        distributed.init_process_group(_take_device(), store=store, rank=rank, world_size=size, timeout=LIMIT)
        return cls(store, silence)

    def mesh(self, device: torch.device) -> DeviceMesh:
        return init_device_mesh(device.type, (self.size,))

    def shard(self, model: LanguageModel, network: Any, precision: str) -> Run:
        if network not in self._roots:
            if network is model.module:
                self._identities[model] = checkpoint.identity(network)
            self._roots[network] = sharding.shard(model, network, self.mesh(model.device), precision)
        return partial(sharding.run, self._roots[network])

    def settle(self, network: Any) -> None:
        self._roots[network].settle(self.total)

    def identity(self, model: LanguageModel) -> dict[str, str]:
        """See `checkpoint.identity`: of a model's whole weights, before they were sharded."""
        return self._identities[model]

    def gather(self, item: Item, *, patient: bool = False) -> list[Item]:
        """See `Ranks.gather`. `patient`: one of them may read or write large files meanwhile."""
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, item, group=self._patient if patient else self._objects)
        return found

    def collect(self, item: Item) -> list[Item]:
        found: list[Any] = [None] * self.size
        distributed.gather_object(item, found if self.rank == 0 else None, group=self._objects)
        return found if self.rank == 0 else []

    def total(self, tensor: Tensor) -> Tensor:
        distributed.all_reduce(tensor, group=self._objects)
        return tensor

    # --- leading

    def order(self, item: Any = None) -> Any:
        """What process 0 gives, for all. A number: they are to exit with it."""
        found = [item]
        distributed.broadcast_object_list(found, src=0, group=self._patient)
        return found[0]

    def say_failed(self, text: str) -> None:
        """Leave word of why this process ends."""
        with suppress(RuntimeError):  # whoever keeps the store has ended
            self._store.set(FAILED, f"process {self.rank} of the learner: {text}")

    def failure(self, patience: float = 5.0) -> str | None:
        """Why a process has ended, if one says so; `patience`: seconds to wait for its word."""
        limit = time.monotonic() + patience
        with suppress(RuntimeError):  # whoever keeps the store has ended
            while time.monotonic() < limit:
                if self._store.check([FAILED]):
                    return str(self._store.get(FAILED), "utf-8")
                time.sleep(0.05)
        return None

    def end(self, code: int) -> None:
        """On process 0: have the others exit with a code."""
        if distributed.is_initialized():
            with suppress(RuntimeError):  # those that have ended
                self.order(code)
        self.leave()

    def leave(self) -> None:
        """Close the connections, so that no process waits for this one any more."""
        self._left.set()
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _take_device() -> str:
    """Make this process's GPU its current device, where there are any; returns the backends. Runs on one GPU per process."""
    if not torch.cuda.is_available():
        return "gloo"
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return "cpu:gloo,cuda:nccl"
