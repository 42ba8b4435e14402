"""A pool of worker processes, whose calls can be awaited in any event loop."""

import asyncio
import atexit
import contextlib
import functools
import threading
import weakref
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from groupwise.workers.target import Target
from groupwise.workers.worker import LOAD_LIMIT, Reply, Worker, WorkerError

Result = TypeVar("Result")

DROP_LIMIT = 5.0
"""Seconds in which a process must let go of its instances, or it is replaced."""
EXIT_LIMIT = 2.0
"""Seconds that the exit of this process waits for those of its workers."""


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all pools, in a thread of its own: the loops of those who call come and go, and may be held up."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="groupwise workers", daemon=True)
    thread.start()
    atexit.register(_stop, loop, thread)
    return loop


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """End all processes and all tasks of the loop before this process exits, so that nothing is left to complain."""
    if not thread.is_alive():  # in a forked process, where only the thread that forked goes on
        return
    with contextlib.suppress(TimeoutError):
        asyncio.run_coroutine_threadsafe(_finish(), loop).result(2 * EXIT_LIMIT)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(EXIT_LIMIT)


async def _finish() -> None:
    workers = [worker for pool in list(_pools) for worker in pool.workers]
    waiting = {task for worker in workers for task in worker.tasks}
    others = asyncio.all_tasks() - waiting - {asyncio.current_task()}
    for task in others:
        task.cancel()
    for worker in workers:
        worker.kill()
    if waiting | others:
        await asyncio.wait(waiting | others, timeout=EXIT_LIMIT)


async def elsewhere(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine in the pools' loop; cancelling the one who waits cancels it."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, _loop()))


def wait_elsewhere(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine in the pools' loop, and wait for its result, whether a loop runs here or not."""
    return asyncio.run_coroutine_threadsafe(coroutine, _loop()).result()


class Pool:
    """Worker processes, started when they are needed. They end with the pool, and with this process however it ends."""

    def __init__(self, size: int) -> None:
        """`size`: processes that run calls which are alone in theirs."""
        self.size = size
        self.workers: set[Worker] = set()
        """All that live."""
        self._free: list[Worker] = []
        self._shared: asyncio.Task[Worker] | None = None
        """The process in which asynchronous functions run together."""
        self._room = asyncio.Semaphore(size)
        self.close = weakref.finalize(self, _end, self.workers)
        """End every process."""
        _pools.add(self)

    async def describe(self, target: Target) -> Mapping[str, Any]:
        """A function's "parameters" (each with name, kind, required; None: unknown), and whether it is "awaited".

        Raises:
            WorkerError: it cannot be loaded.
        """
        return (await elsewhere(self._alone("describe", target, {}, limit=LOAD_LIMIT))).value  # type: ignore[no-any-return]

    async def call(
        self,
        target: Target,
        *args: Any,
        kwargs: Mapping[str, Any] | None = None,
        limit: float,
        shared: bool = False,
        logs: bool = False,
        cpu_limit: float = 0.0,
    ) -> Reply:
        """Call a function in a worker.

        Args:
            args, kwargs: pickled.
            limit: seconds, from when the worker begins with it; then its process is killed, and replaced for others.
            shared: it is an asynchronous function, any number of whose calls run at once in one process. If something blocks
                that process or ends it, its calls are repeated once, each alone in a process, so that only the culprit fails.
            logs: pass the function TRL's `log_extra` and `log_metric`.
            cpu_limit: seconds of computing after which it counts as timed out; 0: none.

        Raises:
            WorkerError: it has no result.
        """
        fields = {"args": args, "kwargs": dict(kwargs or {}), "handles": {}}
        run = self._together if shared else self._alone
        return await elsewhere(run("call", target, fields, limit=limit, logs=logs, cpu_limit=cpu_limit))

    @contextlib.asynccontextmanager
    async def lease(self) -> AsyncIterator["Lease"]:
        """A process of one's own, beyond the pool's size, which keeps instances between calls."""
        worker = await elsewhere(self._take())
        try:
            yield Lease(worker)
        finally:
            await asyncio.shield(elsewhere(self._take_back(worker)))

    # --- in the pools' loop

    async def _alone(self, operation: str, target: Target, fields: Mapping[str, Any], **options: Any) -> Reply:
        async with self._room:
            worker = await self._take()
            try:
                await worker.load(target)
                return await worker.request(operation, {"target": target.key, **fields}, clock="sent", **options)
            finally:
                self._give_back(worker)

    async def _together(self, operation: str, target: Target, fields: Mapping[str, Any], **options: Any) -> Reply:
        if self._shared is None or _has_ended(self._shared):
            self._shared = asyncio.ensure_future(self._take())
        worker = await asyncio.shield(self._shared)
        try:
            await worker.load(target)
            return await worker.request(operation, {"target": target.key, **fields}, clock="awaited", **options)
        except WorkerError as error:
            if worker.alive or error.kind not in ("died", "timeout"):
                raise
        return await self._alone(operation, target, fields, **options)

    async def _take(self) -> Worker:
        while self._free:
            worker = self._free.pop()
            if worker.alive:
                return worker
        self.workers.difference_update([worker for worker in self.workers if not worker.alive])
        worker = await Worker.start()
        self.workers.add(worker)
        return worker

    def _give_back(self, worker: Worker) -> None:
        if worker.alive and not worker.busy and len(self._free) < self.size:
            self._free.append(worker)
        else:
            worker.kill()

    async def _take_back(self, worker: Worker) -> None:
        with contextlib.suppress(WorkerError):
            await worker.request("drop", {"handle": None}, DROP_LIMIT, clock="sent")
        self._give_back(worker)


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
"""All that live."""


def _has_ended(starting: asyncio.Task[Worker]) -> bool:
    """Whether a worker could not be started, or lives no longer."""
    return starting.done() and (starting.exception() is not None or not starting.result().alive)


def _end(workers: set[Worker]) -> None:
    for worker in list(workers):
        worker.kill()


class Lease:
    """A worker process of one's own. Several calls may be under way: functions run one after the other, asynchronous ones at
    once. A function that exceeds its time limit costs the process, and all of its instances: later calls fail with "died"."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    @property
    def alive(self) -> bool:
        return self._worker.alive

    async def describe(self, target: Target) -> Mapping[str, Any]:
        """See `Pool.describe`."""
        return (await self._request("describe", target, {}, LOAD_LIMIT)).value  # type: ignore[no-any-return]

    async def new(self, target: Target, *args: Any, kwargs: Mapping[str, Any] | None = None, limit: float) -> int:
        """Call a class or factory, keep the instance, and return its handle."""
        fields = {"args": args, "kwargs": dict(kwargs or {})}
        return (await self._request("new", target, fields, limit)).value  # type: ignore[no-any-return]

    async def method(
        self,
        handle: int,
        name: str,
        *args: Any,
        kwargs: Mapping[str, Any] | None = None,
        limit: float,
        text: bool = False,
    ) -> Any:
        """Call a method of an instance.

        Args:
            text: return `str()` of the result.
        """
        fields = {"handle": handle, "name": name, "args": args, "kwargs": dict(kwargs or {})}
        return (await self._request("method", None, fields, limit, text=text)).value

    async def call(
        self,
        target: Target,
        *args: Any,
        kwargs: Mapping[str, Any] | None = None,
        handles: Mapping[str, Sequence[int]] | None = None,
        limit: float,
        logs: bool = False,
        text: bool = False,
    ) -> Reply:
        """Call a function.

        Args:
            handles: keyword arguments that are lists of instances.
            text: return `str()` of the result.
        """
        fields = {"args": args, "kwargs": dict(kwargs or {}), "handles": dict(handles or {})}
        return await self._request("call", target, fields, limit, logs=logs, text=text)

    async def drop(self, handle: int) -> None:
        """Forget an instance."""
        await self._request("drop", None, {"handle": handle}, LOAD_LIMIT)

    async def _request(
        self, operation: str, target: Target | None, fields: Mapping[str, Any], limit: float, **options: Any
    ) -> Reply:
        async def request() -> Reply:
            named = {}
            if target is not None:
                await self._worker.load(target)
                named = {"target": target.key}
            return await self._worker.request(operation, {**named, **fields}, limit, clock="called", **options)

        return await elsewhere(request())
