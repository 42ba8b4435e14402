"""Which server of a fleet does which request. Everything here runs in one event loop."""

import asyncio
import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from groupwise.errors import RunError
from groupwise.rollouts.base import Request
from groupwise.rollouts.member import Changes, Member, Ticket
from groupwise.rollouts.servers import Published, Unavailable
from groupwise.types import Completion

MOST_ERRORS = 3
"""A request that servers answered with so many errors of their own is taken to be the reason."""
MOST_ATTEMPTS = 30
"""So often is a request sent whose connections break, or whose servers are given up."""


class Dispatcher:
    """Requests wait here until a server that has the newest weights has room for them."""

    def __init__(self, members: Sequence[Member], *, most_rows: int) -> None:
        """`most_rows`: completions under way at one server, after which it gets no other request."""
        self.members, self.most_rows = members, most_rows
        self.newest: Published | None = None
        """The weights to sample from; None: none yet."""
        self.changes = Changes()
        """Of anything here, and of the members."""
        self.waiting: deque[Ticket] = deque()
        self.reissued = 0
        """How many attempts were not a request's first."""
        self.most_attempts = 0
        """Of one request."""
        self.error: Exception | None = None
        """Why nothing can be generated any more."""
        self._tickets: set[Ticket] = set()
        self._numbers = itertools.count()

    async def generate(self, request: Request) -> tuple[Completion, ...]:
        """See `Sampler.generate`.

        Raises:
            RunError: the request is wrong, or nothing can be generated any more.
        """
        self.check()
        ticket = Ticket(next(self._numbers), request, asyncio.get_running_loop().create_future())
        self._tickets.add(ticket)
        self.waiting.append(ticket)
        self.dispatch()
        try:
            found = await ticket.future
            return found if ticket.attempts == 1 else tuple(replace(one, attempts=ticket.attempts) for one in found)
        finally:
            self._forget(ticket)

    def check(self) -> None:
        """
        Raises:
            RunError: nothing can be generated any more.
        """
        if self.error is not None:
            raise RunError(str(self.error)) from self.error

    def end(self, error: Exception) -> None:
        """Nothing can be generated any more."""
        self.error = self.error or error
        for ticket in self._tickets:
            ticket.fail(RunError(str(error)))
        self.changes.tell()

    def dispatch(self) -> None:
        """Send what waits to servers, the oldest first."""
        ready = [member for member in self.members if member.is_ready(self.newest)]
        left: list[Ticket] = []
        while self.waiting and any(member.rows < self.most_rows for member in ready):
            ticket = self.waiting.popleft()
            member = self._choose(ticket, ready)
            if member is None:
                left.append(ticket)
            else:
                self._begin(ticket, member)
        self.waiting.extendleft(reversed(left))

    def withdraw(self, member: Member, fault: str) -> None:
        """Let others do what a server was asked for that does not answer. It may still be first with the result, until `drop`."""
        for ticket in sorted(member.tickets, key=lambda ticket: -ticket.number):
            ticket.fault = f"sampler {member.index}: {fault}"
            self._requeue(ticket)
        self.dispatch()

    def drop(self, member: Member) -> None:
        """Ask a server for nothing any more."""
        for ticket in sorted(member.tickets, key=lambda ticket: -ticket.number):
            ticket.at.pop(member).cancel()
            member.give_up(ticket)
            self._requeue(ticket)

    def _requeue(self, ticket: Ticket) -> None:
        """Another attempt is due, unless one is under way at a server that answers."""
        if not ticket.future.done() and ticket not in self.waiting and not any(member.answers for member in ticket.at):
            self.waiting.appendleft(ticket)

    def _choose(self, ticket: Ticket, ready: Sequence[Member]) -> Member | None:
        """The server that keeps what the request continues; else that with the fewest tokens to do."""
        home = self._home(ticket.request)
        if home is not None and home in ready and home not in ticket.at:
            return home
        free = [member for member in ready if member.rows < self.most_rows and member not in ticket.at]
        return min(free, key=lambda member: member.tokens, default=None)

    def _home(self, request: Request) -> Member | None:
        return None if request.continues is None else self.members[request.continues % len(self.members)]

    def _begin(self, ticket: Ticket, member: Member) -> None:
        if ticket.attempts >= MOST_ATTEMPTS:
            ticket.fail(RunError(f"a request was sent {ticket.attempts} times and never completed; the last time {ticket.fault}"))
            return
        ticket.attempts += 1
        self.reissued += ticket.attempts > 1
        self.most_attempts = max(self.most_attempts, ticket.attempts)
        member.take(ticket)
        ticket.at[member] = asyncio.create_task(self._attempt(ticket, member))

    async def _attempt(self, ticket: Ticket, member: Member) -> None:
        request, count = ticket.request, len(self.members)
        continues = request.continues // count if request.continues is not None and self._home(request) is member else None
        try:
            found = await member.dialect.generate(replace(request, continues=continues))
        except Unavailable as error:
            self._failed(ticket, member, error)
        except Exception as error:  # whatever it is, somebody waits for it
            ticket.fail(error)
        else:
            ticket.deliver(tuple(self._with_handle(completion, member) for completion in found))
        finally:
            if ticket.at.get(member) is asyncio.current_task():
                del ticket.at[member]
                member.give_up(ticket)
                self._requeue(ticket)
                self.dispatch()
                self.changes.tell()

    def _with_handle(self, completion: Completion, member: Member) -> Completion:
        """Handles of the fleet say which server keeps it."""
        if completion.handle is None:
            return completion
        return replace(completion, handle=completion.handle * len(self.members) + member.index)

    def _failed(self, ticket: Ticket, member: Member, error: Unavailable) -> None:
        """An attempt gave nothing."""
        member.is_suspect = True
        member.look.set()
        ticket.errors += error.answered
        ticket.fault = f"sampler {member.index}: {error}"
        if ticket.errors >= MOST_ERRORS:
            ticket.fail(RunError(f"samplers failed {ticket.errors} times at the same request; the last time: {error}"))

    def _forget(self, ticket: Ticket) -> None:
        """Nobody waits for it any more."""
        self._tickets.discard(ticket)
        if ticket in self.waiting:
            self.waiting.remove(ticket)
        for member, task in ticket.at.items():
            task.cancel()
            member.give_up(ticket)
        ticket.at.clear()
        self.dispatch()
        self.changes.tell()
