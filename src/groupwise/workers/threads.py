"""A function that no other process can be given, called in a thread of this one as a worker process would call it."""

import asyncio
import threading
from collections.abc import Callable, Mapping
from typing import Any

from groupwise.workers import child
from groupwise.workers.worker import Other, Reply, WorkerError


class Threads:
    """Threads for calls that cannot run in a worker process. One that exceeds its time limit cannot be ended: it goes on, and
    nobody waits for it."""

    def __init__(self, size: int) -> None:
        """`size`: calls at once."""
        self.size = size
        self._free = threading.BoundedSemaphore(size)

    def call(self, function: Callable[..., Any], *args: Any, kwargs: Mapping[str, Any], limit: float, logs: bool) -> Reply:
        """Call a function and wait for its result, from a thread that may wait.

        Raises:
            WorkerError: it raised, took too long, or returned too much.
        """
        found: list[Reply | WorkerError] = []

        def run() -> None:
            logged = child.Logs()
            more = {"log_extra": logged.extra, "log_metric": logged.metric} if logs else {}
            try:
                value = function(*args, **kwargs, **more)
                found.append(_reply(asyncio.run(_awaited(value)) if hasattr(value, "__await__") else value, logged))
            except child.TooLarge as error:
                found.append(WorkerError("too large", str(error)))
            except BaseException as error:  # the user's function may raise anything
                found.append(WorkerError("raised", child.describe_error(error), text=child.text_of(error)))

        with self._free:
            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            thread.join(limit)
        if not found:
            raise WorkerError("timeout", f"no result within {limit:g} s")
        if isinstance(found[0], WorkerError):
            raise found[0]
        return found[0]


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def _reply(value: Any, logged: child.Logs) -> Reply:
    encoder = child.Encoder()
    result, extra, metrics = (child.decode(encoder.encode(item), Other) for item in (value, logged.columns, logged.values))
    return Reply(value=result, extra=extra, metrics=metrics)
