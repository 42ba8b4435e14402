"""Running asynchronous samplers from synchronous code."""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from groupwise.rollouts.base import Request, Sampler
from groupwise.types import Completion

Result = TypeVar("Result")
CLOSE_LIMIT = 10.0
"""Seconds that the end of a loop in a thread waits for what runs there to be cancelled."""


def wait_for(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end; in a thread of its own where an event loop runs already, as in a notebook."""
    found: list[Result] = []

    async def keep_result() -> None:
        # Not as the task's own result: asyncio.run formats the task as text, which takes a tenth of a second for many tensors.
        found.append(await coroutine)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(keep_result())
    else:
        with ThreadPoolExecutor(max_workers=1) as thread:
            thread.submit(asyncio.run, keep_result()).result()
    return found[0]


class LoopThread:
    """An event loop in a thread of its own, where coroutines go on while this thread computes. It ends with `close`, and with
    the process."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        stopped = False
        while not stopped:
            try:
                self.loop.run_forever()
                stopped = True
            except (SystemExit, KeyboardInterrupt):  # raised in a task, whose result it is; the loop goes on for the others
                continue

    def wait_for(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine there to its end. What interrupts the waiting cancels it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what runs there, and end the thread."""
        if self.loop.is_closed():
            return
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(_cancel_others(), self.loop).result(2 * CLOSE_LIMIT)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(CLOSE_LIMIT)
        if not self._thread.is_alive():  # else something there holds it up; it ends with the process
            self.loop.close()


async def _cancel_others() -> None:
    """Cancel every other task of the loop, and wait until they have ended."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=CLOSE_LIMIT)
    await asyncio.get_running_loop().shutdown_asyncgens()


async def gather(*coroutines: Coroutine[Any, Any, Result]) -> list[Result]:
    """The results in order. If one fails the others are cancelled, and it is raised as it is."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


def generate_all(sampler: Sampler, requests: Sequence[Request]) -> list[tuple[Completion, ...]]:
    """The completions of each request, in order."""
    return wait_for(gather(*(sampler.generate(request) for request in requests)))
