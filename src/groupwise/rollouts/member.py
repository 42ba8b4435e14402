"""One server of a fleet, and the requests on their way through it."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from groupwise.rollouts.base import Request
from groupwise.rollouts.servers import Dialect, Published
from groupwise.types import Completion


@dataclass(slots=True, eq=False)
class Ticket:
    """A request that somebody waits for."""

    number: int
    """How many came before."""
    request: Request
    future: "asyncio.Future[tuple[Completion, ...]]"
    attempts: int = 0
    errors: int = 0
    """Attempts that a server answered with an error of its own."""
    fault: str = ""
    """Where the last attempt gave nothing, and why."""
    at: "dict[Member, asyncio.Task[None]]" = field(default_factory=dict)
    """Attempts under way; more than one where a server fell silent."""

    @property
    def rows(self) -> int:
        return self.request.n

    @property
    def tokens(self) -> int:
        """The most that it may take."""
        return len(self.request.prompt) + self.request.n * self.request.sampling.max_tokens

    def deliver(self, completions: tuple[Completion, ...]) -> None:
        """The first result wins."""
        if not self.future.done():
            self.future.set_result(completions)

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class Member:
    """A server as the fleet sees it."""

    def __init__(self, index: int, dialect: Dialect) -> None:
        self.index, self.dialect = index, dialect
        self.answers = False
        """Whether it answered when it was last asked."""
        self.is_new = True
        """Whether it has neither answered nor failed yet."""
        self.is_suspect = False
        """Whether a request failed since: it gets no other before it has answered again."""
        self.weights: Published | None = None
        """What it was made to load, and was seen to have loaded; None: nothing yet."""
        self.is_loading = False
        self.look = asyncio.Event()
        """Set to have it asked for its health at once."""
        self.faults = 0
        """In a row, since it was last of use."""
        self.tickets: set[Ticket] = set()
        """Requests under way there."""
        self.rows = self.tokens = 0
        """Of these requests; tokens as the most that they may take."""
        self.moved = time.monotonic()
        """When it last did something for a request, or had none, or loaded weights."""
        self._busy_since: float | None = None
        self._busy = 0.0
        self._measured = time.monotonic()

    def is_ready(self, newest: Published | None) -> bool:
        """Whether it takes requests."""
        return self.answers and not self.is_suspect and not self.is_loading and newest is not None and self.weights == newest

    def take(self, ticket: Ticket) -> None:
        if not self.tickets:
            self.moved = self._busy_since = time.monotonic()
        self.tickets.add(ticket)
        self.rows, self.tokens = self.rows + ticket.rows, self.tokens + ticket.tokens

    def give_up(self, ticket: Ticket) -> None:
        self.tickets.remove(ticket)
        self.rows, self.tokens = self.rows - ticket.rows, self.tokens - ticket.tokens
        if not self.tickets and self._busy_since is not None:
            self._busy += time.monotonic() - self._busy_since
            self._busy_since = None

    async def looked_for(self, seconds: float) -> None:
        """Wait so long, or until it is to be asked at once."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.look.wait()

    def idle_share(self) -> float:
        """Of the time since the last call, how much it had nothing to do."""
        now = time.monotonic()
        if self._busy_since is not None:
            self._busy += now - self._busy_since
            self._busy_since = now
        share = 1 - self._busy / max(now - self._measured, 1e-9)
        self._busy, self._measured = 0.0, now
        return max(0.0, share)


class Changes:
    """Lets coroutines wait until something is true that others change."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []

    def tell(self) -> None:
        """Something has changed."""
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
        self._waiting.clear()

    async def until(self, is_true: Callable[[], bool]) -> None:
        while not is_true():
            future = asyncio.get_running_loop().create_future()
            self._waiting.append(future)
            await future
