"""The life of a server in a fleet: started, given the newest weights, watched, and started again when it fails."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from groupwise.errors import RunError, first_line
from groupwise.rollouts.dispatch import Dispatcher
from groupwise.rollouts.member import Member
from groupwise.rollouts.probe import Probe
from groupwise.rollouts.servers import Dialect, Health, Published, Refused, Unavailable

LONG = 10
"""How many times the time limit starting and loading may take."""
LONGEST_PAUSE = 30.0
"""Seconds before the next try at a server that fails each time."""


class Restarts(Protocol):
    """What can start a server again. Called in the fleet's event loop, which must not be blocked."""

    async def restart(self, index: int, reason: str) -> str:
        """End what is left of the server with that number and start it again; `reason`: what was wrong.

        Returns:
            Its address, where it may not answer yet.

        Raises:
            Unavailable: it cannot be started now; it is tried again.
            RunError: the run cannot go on.
        """
        ...

    def ended(self, index: int) -> str | None:
        """How its process ended; None: it runs, or nobody knows."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When a server counts as dead."""

    timeout: float
    """Seconds without an answer, or without progress while it has something to do."""
    max_restarts: int
    """Of all servers together."""

    @property
    def heartbeat(self) -> float:
        """Seconds between two questions for its health."""
        return min(1.0, self.timeout / 4)


class Attendant:
    """Looks after the servers of a fleet."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        connect: Callable[[str], Dialect],
        *,
        limits: Limits,
        restarts: Restarts | None,
        partial: bool,
        tell: Callable[[str], None],
    ) -> None:
        """
        Args:
            connect: the dialect for a server's address.
            restarts: None: nobody starts a server again; it is waited for.
            partial: whether completions under way go on when new weights are loaded; otherwise they are finished first.
            tell: is told of each fault, in the fleet's thread.
        """
        self.dispatcher, self.connect, self.limits = dispatcher, connect, limits
        self.restarts, self.partial, self.tell = restarts, partial, tell
        self.probe: Probe | None = None
        """Of the newest weights."""
        self.restarted = 0
        """Servers that were started again."""
        self.last_fault = ""

    async def attend(self, member: Member) -> None:
        """A server's life, without end.

        Raises:
            RunError: the run cannot go on.
        """
        fault = None
        while True:
            try:
                if fault is not None:
                    await self._start_again(member, fault)
                await self._reach(member)
                await _together(self._watch(member), self._renew(member))
            except Unavailable as error:
                fault = str(error)
                member.answers, member.is_new, member.weights = False, False, None
                member.faults += 1
                self.last_fault = f"sampler {member.index}: {fault}"
                self.tell(self.last_fault)
                self.dispatcher.withdraw(member, fault)
                self.dispatcher.changes.tell()

    async def _start_again(self, member: Member, fault: str) -> None:
        pause = min(2 ** (member.faults - 1) - 1, LONGEST_PAUSE)
        if self.restarts is None:
            await asyncio.sleep(pause)
            return
        self.dispatcher.drop(member)
        if self.restarted == self.limits.max_restarts:
            raise RunError(f"samplers were restarted {self.restarted} times (cluster.max_restarts); the last: {self.last_fault}")
        self.restarted += 1
        await asyncio.sleep(pause)
        address = await self.restarts.restart(member.index, fault)
        await member.dialect.close()
        member.dialect = self.connect(address)

    async def _reach(self, member: Member) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + LONG * self.limits.timeout
        while True:
            try:
                await self._health(member)
                break
            except Unavailable as error:
                if self.restarts is not None and self.restarts.ended(member.index) is not None:
                    raise
                if time.monotonic() > deadline:
                    raise Unavailable(f"it has not answered for {LONG * self.limits.timeout:g} s: {error}") from error
            await asyncio.sleep(self.limits.heartbeat / 4)
        self.dispatcher.drop(member)  # what it may still do is of older weights, perhaps
        member.answers, member.is_new, member.is_suspect = True, False, False
        self.dispatcher.changes.tell()

    async def _health(self, member: Member) -> Health:
        """
        Raises:
            Unavailable: there is no answer in time.
        """
        try:
            async with asyncio.timeout(self.limits.timeout):
                return await member.dialect.health()
        except TimeoutError as error:
            raise Unavailable(f"no answer for {self.limits.timeout:g} s") from error
        except Refused as error:  # the address is that of another program, or of a proxy whose server is away
            raise Unavailable(first_line(error)) from error

    async def _watch(self, member: Member) -> None:
        """Ask again and again, until a fault.

        Raises:
            Unavailable: the fault.
        """
        progress = -1.0
        while True:
            weights = member.weights
            member.look.clear()
            health = await self._health(member)
            now = time.monotonic()
            if (
                weights is not None
                and not member.is_loading
                and weights is member.weights
                and health.id not in (None, weights.id)
            ):
                raise Unavailable(
                    f"it has other weights than it was given, {health.id!r:.80}: it was started again, or another run uses it"
                )
            if health.progress != progress or not member.tickets or member.is_loading:
                member.moved, progress = now, health.progress
            elif now - member.moved > self.limits.timeout:
                raise Unavailable(f"it answers, but has done nothing for {self.limits.timeout:g} s while requests are under way")
            if member.is_suspect:
                member.is_suspect = False
                self.dispatcher.dispatch()
            await member.looked_for(self.limits.heartbeat)

    async def _renew(self, member: Member) -> None:
        """Load the newest weights, again and again, whenever there are any.

        Raises:
            Unavailable: it cannot.
            RunError: no server can.
        """
        dispatcher = self.dispatcher

        def is_due() -> bool:
            return member.weights != dispatcher.newest and (self.partial or not member.tickets)

        while True:
            await dispatcher.changes.until(is_due)
            published = dispatcher.newest
            assert published is not None
            member.is_loading = True
            try:
                async with asyncio.timeout(LONG * self.limits.timeout):
                    await self._load(member, published, self.probe)
                member.weights, member.faults = published, 0
            except TimeoutError as error:
                raise Unavailable(f"it has not loaded weights within {LONG * self.limits.timeout:g} s") from error
            except Refused as error:
                if published == dispatcher.newest:
                    raise RunError(f"sampler {member.index} cannot load {published.directory}: {error}") from error
            finally:
                member.is_loading, member.moved = False, time.monotonic()
            dispatcher.changes.tell()
            dispatcher.dispatch()

    async def _load(self, member: Member, published: Published, probe: Probe | None) -> None:
        """Load weights and see that it has them; once more, if it has not.

        Raises:
            RunError: it has others.
        """
        problem = None
        for _ in range(2):
            await member.dialect.load(published)
            problem = None if probe is None else probe.problem(await member.dialect.probe(probe.tokens))
            if problem is None:
                return
            self.tell(f"sampler {member.index}: after loading {published.id} {problem}")
        raise RunError(f"sampler {member.index} has loaded {published.directory} twice and has other weights: {problem}")


async def _together(*works: Coroutine[Any, Any, None]) -> None:
    """Run them until one fails, which is raised when all have ended."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
