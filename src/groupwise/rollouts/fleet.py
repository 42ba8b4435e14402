"""Samplers in other processes as one: requests are spread over them, and what one of them loses another does again."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from groupwise.descriptors import allow_many
from groupwise.errors import RunError
from groupwise.rollouts.attending import LONG, Attendant, Limits, Restarts
from groupwise.rollouts.base import Request
from groupwise.rollouts.dispatch import Dispatcher
from groupwise.rollouts.member import Member
from groupwise.rollouts.probe import Probe
from groupwise.rollouts.servers import Dialect, Published
from groupwise.types import Completion, Metrics

Result = TypeVar("Result")
PATIENCE = 2 * LONG
"""How many times the time limit requests wait while no sampler does any."""


class Fleet:
    """A `Sampler` of several servers, used as a context.

    It lives in a thread with an event loop of its own, so that `generate` may be awaited in any event loop, and servers are
    watched while nothing is generated. Nothing is generated before the first `load`.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        connect: Callable[[str], Dialect],
        *,
        limits: Limits,
        restarts: Restarts | None = None,
        partial: bool = True,
        most_rows: int = 1024,
        tell: Callable[[str], None],
    ) -> None:
        """
        Args:
            addresses: of servers that answer, or will.
            connect: the dialect for a server's address.
            restarts: starts a server again; None: nobody does, and it is waited for.
            partial: whether completions under way go on when new weights are loaded; otherwise a server finishes them before
                it loads, and is given no others.
            most_rows: completions under way at one server, after which it gets no other request.
            tell: is told of each fault, in the fleet's thread.

        Raises:
            UserError: an address is none.
        """
        allow_many()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="samplers", daemon=True)
        members = [Member(index, connect(address)) for index, address in enumerate(addresses)]
        self._dispatcher = Dispatcher(members, most_rows=most_rows)
        self._attendant = Attendant(self._dispatcher, connect, limits=limits, restarts=restarts, partial=partial, tell=tell)
        self._limits = limits
        self._tasks: list[asyncio.Task[None]] = []
        self._reported = 0, 0

    # --- its thread

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._begin())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run it in the fleet's thread, and wait."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _begin(self) -> None:
        self._tasks = [asyncio.create_task(self._guarded(self._attendant.attend(member))) for member in self._dispatcher.members]
        self._tasks.append(asyncio.create_task(self._guarded(self._wait_for_samplers())))

    async def _end(self) -> None:
        self._dispatcher.end(RunError("the samplers are being stopped"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for member in self._dispatcher.members:
            self._dispatcher.drop(member)
            await member.dialect.close()

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        """What goes wrong in the background goes wrong for everybody who waits."""
        try:
            await work
        except Exception as error:  # whatever it is
            self._dispatcher.end(error)

    async def _wait_for_samplers(self) -> None:
        """
        Raises:
            RunError: they have done no requests for too long.
        """
        dispatcher, seen = self._dispatcher, time.monotonic()
        patience = PATIENCE * self._limits.timeout
        while True:
            if not dispatcher.waiting or any(member.is_new or self._is_of_use(member) for member in dispatcher.members):
                seen = time.monotonic()
            elif time.monotonic() - seen > patience:
                raise RunError(f"no sampler was ready for {patience:g} s; the last fault: {self._attendant.last_fault}")
            await asyncio.sleep(self._limits.heartbeat)

    def _is_of_use(self, member: Member) -> bool:
        """Whether it takes requests, or finishes some before it loads new weights."""
        return member.is_ready(self._dispatcher.newest) or (member.answers and bool(member.tickets))

    # --- the contract

    async def generate(self, request: Request) -> tuple[Completion, ...]:
        """See `Sampler.generate`. Waits while no sampler has the newest weights.

        Raises:
            RunError: a sampler refuses the request, or nothing can be generated any more.
        """
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._dispatcher.generate(request), self._loop))

    def health(self) -> dict[str, float]:
        dispatcher = self._dispatcher
        return {
            "version": float(-1 if dispatcher.newest is None else dispatcher.newest.version),
            "waiting": float(len(dispatcher.waiting)),
            "rows": float(sum(member.rows for member in dispatcher.members)),
            "samplers": float(sum(member.is_ready(dispatcher.newest) for member in dispatcher.members)),
        }

    def load(self, published: Published, probe: Probe | None = None) -> None:
        """Sample from these weights from now on. Comes back when every server that answers, or is new, has loaded them, or
        finishes what is under way first; those that fail are started again and load them then.

        Args:
            probe: what the weights make of a text; None: nobody checks that they are the right ones.

        Raises:
            RunError: they cannot be loaded, a sampler has others, or nothing can be generated any more.
        """
        self._call(self._load(published, probe))

    async def _load(self, published: Published, probe: Probe | None) -> None:
        dispatcher = self._dispatcher
        dispatcher.newest, self._attendant.probe = published, probe

        def is_done(member: Member) -> bool:
            finishes = not self._attendant.partial and bool(member.tickets)
            if member.is_new:
                return False
            return not member.answers or member.weights == published or (finishes and not member.is_loading)

        dispatcher.changes.tell()
        await dispatcher.changes.until(lambda: dispatcher.error is not None or all(map(is_done, dispatcher.members)))
        dispatcher.check()

    def metrics(self) -> Metrics:
        """Since the last call: restarts, requests done again, and the share of the time in which each server had nothing to do;
        now: requests waiting, and under way."""
        return self._call(self._metrics())

    async def _metrics(self) -> Metrics:
        dispatcher, restarted = self._dispatcher, self._attendant.restarted
        members = dispatcher.members
        (before, reissued), self._reported = self._reported, (restarted, dispatcher.reissued)
        attempts, dispatcher.most_attempts = dispatcher.most_attempts, 0
        idle = {f"cluster/idle/sampler_{member.index}": member.idle_share() for member in members}
        return {
            "cluster/samplers": float(sum(member.is_ready(dispatcher.newest) for member in members)),
            "cluster/waiting": float(len(dispatcher.waiting)),
            "cluster/under_way": float(sum(len(member.tickets) for member in members)),
            "cluster/sampler_restarts": float(restarted - before),
            "cluster/reissued": float(dispatcher.reissued - reissued),
            "cluster/most_attempts": float(attempts),
            "cluster/idle": sum(idle.values()) / len(idle),
            **idle,
        }
