"""Running asynchronous samplers from synchronous code."""

import asyncio
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from groupwise.rollouts.base import Request, Sampler
from groupwise.types import Completion

Result = TypeVar("Result")


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
