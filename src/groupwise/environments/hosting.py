"""Where environments live: the user's in worker processes, all instances of a group in one, so that they can neither hold up nor
end the run; the shipped ones in this process."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from groupwise.environments.instance import (
    Answer,
    EnvironmentFailed,
    Instance,
    LocalInstance,
    ToolResult,
    as_answer,
    as_observation,
    as_reward,
    error_text,
)
from groupwise.environments.kinds import Kind
from groupwise.types import Message
from groupwise.workers import Lease, Pool, Reply, Target, WorkerError

MOST = 32
"""Groups of user environments at once, each in a process of its own."""
ENVIRONMENTS = "environments"
"""The argument of a function that is called with the instances of a group, as in TRL."""


class Host:
    """Makes the instances of groups."""

    def __init__(self, time_limit: float) -> None:
        """`time_limit`: seconds for each call."""
        self._limit = time_limit
        self._pool: Pool | None = None
        self._places: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None

    @asynccontextmanager
    async def instances(self, kind: Kind, n: int) -> AsyncIterator[list[Instance]]:
        """n instances, not reset yet."""
        if not kind.targets:
            yield [LocalInstance(kind) for _ in range(n)]
            return
        self._pool = self._pool or Pool(MOST)
        async with self._room(), self._pool.lease() as lease:
            yield [WorkerInstance(lease, kind, self._limit) for _ in range(n)]

    def _room(self) -> asyncio.Semaphore:
        """Limits the groups at once, in each event loop anew."""
        loop = asyncio.get_running_loop()
        if self._places is None or self._places[0] is not loop:
            self._places = loop, asyncio.Semaphore(MOST)
        return self._places[1]


@dataclass(frozen=True, slots=True)
class Lent:
    """Instances of a group that functions can be called with, in the worker process where they live."""

    lease: Lease
    handles: Sequence[int]

    @classmethod
    def of(cls, instances: Sequence[Instance]) -> "Lent | None":
        """None: they are no instances of a class in a worker process."""
        made = [(item.lease, item.handle) for item in instances if isinstance(item, WorkerInstance) and item.handle is not None]
        if not made or len(made) != len(instances):
            return None
        return cls(made[0][0], [handle for _, handle in made])

    async def call(self, target: Target, *args: Any, kwargs: Mapping[str, Any], limit: float, logs: bool) -> Reply:
        """Call a function with the instances as its argument `environments`.

        Raises:
            WorkerError: it has no result.
        """
        handles = {ENVIRONMENTS: self.handles}
        return await self.lease.call(target, *args, kwargs=kwargs, handles=handles, limit=limit, logs=logs)


class WorkerInstance:
    """An instance in a worker process."""

    def __init__(self, lease: Lease, kind: Kind, time_limit: float) -> None:
        self.lease, self._kind, self._limit = lease, kind, time_limit
        self._made, *functions = kind.targets
        self._functions = dict(zip(kind.names, functions, strict=True))
        self.handle: int | None = None
        """None: not made yet, or there is no class."""

    async def reset(self, row: Mapping[str, Any]) -> str | None:
        if self._made is None:
            return None
        try:
            self.handle = await self.lease.new(self._made, limit=self._limit)
        except WorkerError as error:
            raise EnvironmentFailed(error.kind, f"{self._made.name}(): {error.detail}") from error
        return as_observation(await self._guarded("reset", kwargs=row))

    async def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        try:
            if (target := self._functions.get(name)) is not None:
                reply = await self.lease.call(target, kwargs=arguments, limit=self._limit, text=True)
                return ToolResult(reply.value)
            assert self.handle is not None
            return ToolResult(await self.lease.method(self.handle, name, kwargs=arguments, limit=self._limit, text=True))
        except WorkerError as error:
            if error.kind == "raised":
                return ToolResult(error_text(error.text), error=True)
            raise EnvironmentFailed(error.kind, f"{name}(): {error.detail}") from error

    async def step(self, message: Message) -> Answer:
        return as_answer(await self._guarded("step", message), bool(self._kind.schemas))

    async def turn_reward(self) -> float | None:
        if not self._kind.rewards_turns:
            return None
        reward = await self._guarded("__getattribute__", "turn_reward")
        if reward is None:
            return None
        await self._guarded("__setattr__", "turn_reward", None)
        return as_reward("turn_reward", reward)

    async def get_reward(self) -> float:
        return as_reward("get_reward()", await self._guarded("get_reward"))

    async def _guarded(self, name: str, *arguments: Any, kwargs: Mapping[str, Any] | None = None) -> Any:
        assert self.handle is not None
        try:
            return await self.lease.method(self.handle, name, *arguments, kwargs=kwargs, limit=self._limit)
        except WorkerError as error:
            raise EnvironmentFailed(error.kind, f"{name}(): {error.detail}") from error
