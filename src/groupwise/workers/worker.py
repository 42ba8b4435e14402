"""One worker process as the pool sees it: requests, replies, time limits, its end. Everything here runs in the pool's loop."""

import asyncio
import codecs
import contextlib
import itertools
import json
import os
import pickle
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from groupwise.text import visible
from groupwise.workers import child
from groupwise.workers.target import Target

Clock = Literal["sent", "called", "awaited"]
"""When a time limit begins. "sent": with the request, for a call that is alone in its worker. "called": when the worker calls the
function. "awaited": when its event loop begins with what the function returned."""
Failure = Literal["raised", "timeout", "died", "too large", "bad result"]

LOAD_LIMIT = 300.0
"""Seconds in which a user's file must be loaded, with everything that it imports."""
PING_LIMIT = 2.0
"""Seconds in which the event loop of a worker must answer, or something blocks it."""
END_LIMIT = 5.0
"""Seconds in which a keeper must have ended everything."""
KILL_LIMIT = 1.0
"""Seconds in which a keeper that was killed must have ended; after that, something that it started holds its pipes."""
KEEPER = Path(__file__).with_name("keeper.py")
"""The program that starts `child.py`."""
MOST_SHOWN = 2**20
"""Bytes of what a worker prints that are passed on to standard error."""


class WorkerError(Exception):
    """A call that has no result."""

    def __init__(self, kind: Failure, detail: str, *, text: str = "", known: list[str] | None = None) -> None:
        """
        Args:
            kind: "raised": the user's code raised. "timeout": it took too long. "died": its process ended. "too large": it
                returned more than is passed on. "bad result": what it returned cannot be read.
            detail: what a person should read; of an exception its type, text and line.
            text: the exception's text alone.
            known: the names that a file has, where the one asked for is missing.
        """
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail, self.text, self.known = kind, detail, text, known


@dataclass(frozen=True, slots=True)
class Other:
    """Stands for a value that was not passed on: it is neither a number, a text, a list nor a mapping."""

    type_name: str


@dataclass(slots=True)
class _Call:
    """A request under way."""

    reply: "asyncio.Future[Reply]"
    begun: "asyncio.Future[None]"
    stage: str = "waiting"
    """Then a `Clock`: what the worker said last."""

    def come_to(self, stage: str) -> None:
        self.stage = stage
        if not self.begun.done():
            self.begun.set_result(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a call returned, and what it logged."""

    value: Any
    """Numbers, texts, None, lists and mappings of these; `Other` for anything else."""
    extra: Mapping[str, list[Any]] = field(default_factory=dict)
    """Of `log_extra`: column -> values."""
    metrics: Mapping[str, list[Any]] = field(default_factory=dict)
    """Of `log_metric`: name -> values."""


class Worker:
    """A process that runs `child.py`."""

    def __init__(self, process: Process) -> None:
        """`process`: its keeper."""
        self.process = process
        self.loaded: dict[str, asyncio.Task[Any]] = {}
        """The targets that it has, or is loading."""
        self.alive = True
        self._numbers = itertools.count(1)
        self._calls: dict[int, _Call] = {}
        self._printed = b""
        self._showing = asyncio.create_task(self._show())
        self.tasks = [self._showing, asyncio.create_task(self._read()), asyncio.create_task(self._end())]
        """Are done when the process has ended."""

    @classmethod
    async def start(cls) -> "Worker":
        """A process in a session of its own, which gets no Ctrl-C, and whose keeper ends it with everything that it started."""
        paths = json.dumps([item for item in sys.path if isinstance(item, str)])
        arguments = (sys.executable, "-P", str(KEEPER), child.__file__, str(os.getpid()), paths)
        try:
            process = await asyncio.create_subprocess_exec(
                *arguments, stdin=PIPE, stdout=PIPE, stderr=PIPE, start_new_session=True
            )
        except OSError as error:
            raise WorkerError("died", f"no process can be started for it: {error}") from error
        return cls(process)

    def kill(self) -> None:
        """End the process and all that it started; safe from any thread, at any time."""
        if self.alive:
            self.alive = False
            self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        """To the keeper."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self.process.pid, number)

    @property
    def busy(self) -> bool:
        return bool(self._calls)

    async def load(self, target: Target) -> None:
        """Have a target loaded, once.

        Raises:
            WorkerError: its file does not run or does not have it.
        """
        if target.key not in self.loaded:
            fields = {"key": target.key, "file": target.file, "name": target.name, "value": target.value}
            request = self.request("load", fields, LOAD_LIMIT, clock="sent")
            self.loaded[target.key] = asyncio.ensure_future(request)
        await asyncio.shield(self.loaded[target.key])

    async def request(
        self,
        operation: str,
        fields: Mapping[str, Any],
        limit: float,
        *,
        clock: Clock,
        logs: bool = False,
        text: bool = False,
        cpu_limit: float = 0.0,
    ) -> Reply:
        """Send a request and wait for what comes of it.

        Args:
            limit: seconds.
            clock: when they begin.
            logs: pass the function `log_extra` and `log_metric`.
            text: return `str()` of the result.
            cpu_limit: seconds of computing after which it counts as timed out; 0: none. Waiting for a core does not count.

        Raises:
            WorkerError: it has no result.
        """
        message = {"operation": operation, "clock": clock, "logs": logs, "text": text, "cpu_limit": cpu_limit, **fields}
        try:
            payload = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:  # columns of a dataset may hold anything
            raise WorkerError("raised", f"the arguments cannot be pickled: {type(error).__name__}: {error}") from error
        with self._send(payload) as (number, call):
            if clock == "sent":
                call.come_to("sent")
            try:
                return await self._wait(number, call, limit)
            except asyncio.CancelledError:
                self._give_up(number, call)
                raise

    @contextlib.contextmanager
    def _send(self, payload: bytes) -> Iterator[tuple[int, _Call]]:
        """A call, as long as somebody waits for it."""
        loop = asyncio.get_running_loop()
        number, call = next(self._numbers), _Call(loop.create_future(), loop.create_future())
        self._calls[number] = call
        if not self._write(number, payload):
            call.reply.set_exception(WorkerError("died", "its process has ended"))
        try:
            yield number, call
        finally:
            del self._calls[number]

    def _write(self, number: int, payload: bytes) -> bool:
        """Whether the process is there to be written to."""
        stdin = self.process.stdin
        if not self.alive or stdin is None or stdin.is_closing():
            return False
        stdin.write(child.HEADER.pack(number, len(payload)) + payload)
        return True

    async def _wait(self, number: int, call: _Call, limit: float) -> Reply:
        await asyncio.wait((call.reply, call.begun), return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait((call.reply,), timeout=limit)
        blocked = not call.reply.done() and call.stage == "awaited" and not await self.responds()
        if not call.reply.done():
            self.kill() if blocked else self._give_up(number, call)
            raise WorkerError("timeout", f"no result within {limit:g} s" + (BLOCKED if blocked else ""))
        return call.reply.result()

    async def responds(self) -> bool:
        """Whether the worker's event loop turns: nothing in it blocks."""
        with self._send(child.PING) as (_, call):
            done, _ = await asyncio.wait((call.reply,), timeout=PING_LIMIT)
            return bool(done) and call.reply.exception() is None

    def _give_up(self, number: int, call: _Call) -> None:
        """Nobody waits for a call any longer: cancel what is awaited in the worker's event loop, end a worker that computes."""
        if call.stage in ("sent", "called"):
            self.kill()
        else:
            self._write(number, child.CANCEL)

    async def _read(self) -> None:
        """Hand replies to those who wait for them, until the process ends."""
        assert self.process.stdout is not None
        reason = ""
        try:
            while True:
                (length,) = child.LENGTH.unpack(await self.process.stdout.readexactly(child.LENGTH.size))
                if length > 16 * child.LARGEST:
                    raise ValueError("a reply too large")
                self._take(json.loads(await self.process.stdout.readexactly(length)))
        except asyncio.IncompleteReadError:
            pass
        except Exception as error:  # the user's code may have written them
            reason = f"its replies cannot be read: {type(error).__name__}: {str(error)[:200]}; "
        end = WorkerError("died", f"{reason}its process ended")
        try:
            self.kill()
            code = await self._ended()
            await asyncio.wait({self._showing}, timeout=1.0)  # for its last words
            end = self._how_it_ended(code, reason)
        finally:  # those who wait for a reply do so without a limit until their call has begun
            for call in self._calls.values():
                if not call.reply.done():
                    call.reply.set_exception(end)

    def _take(self, found: Any) -> None:
        """Hand a reply to the one who waits for it; any exception says that it has not the form of a reply."""
        call = self._calls.get(int(found["id"]))
        if "began" in found:
            if call is not None:
                call.come_to(str(found["began"]))
            return
        reply = _read_reply(found)
        if call is None or call.reply.done():
            return
        if isinstance(reply, Reply):
            call.reply.set_result(reply)
        else:
            call.reply.set_exception(reply)

    async def _ended(self) -> int:
        """The exit code of the process, which is told to end."""
        for limit in (END_LIMIT, KILL_LIMIT):
            try:
                return await asyncio.wait_for(asyncio.shield(self.process.wait()), limit)
            except TimeoutError:  # its keeper was stopped
                if self.process.returncode is None:
                    self._signal(signal.SIGKILL)
        # asyncio also waits for the pipes, which a process may hold that the keeper had no time to end.
        return -signal.SIGKILL if self.process.returncode is None else self.process.returncode

    async def _end(self) -> None:
        await self.process.wait()
        self.alive = False

    def _how_it_ended(self, code: int, reason: str) -> WorkerError:
        if code == -signal.SIGVTALRM:
            return WorkerError("timeout", "it computed for longer than it may")
        names = {number.value: number.name for number in signal.Signals}
        how = f"with exit code {code}" if code >= 0 else f"by {names.get(-code, f'signal {-code}')}"
        lines = self._printed.decode(errors="replace").strip().splitlines()
        return WorkerError("died", f"{reason}its process ended {how}" + (f": {lines[-1][:500]}" if lines else ""))

    async def _show(self) -> None:
        """Pass on what the user's code prints, and keep the end of it."""
        assert self.process.stderr is not None
        shown, decoder = 0, codecs.getincrementaldecoder("utf-8")(errors="replace")
        while part := await self.process.stderr.read(2**16):
            self._printed = (self._printed + part)[-2000:]
            if shown < MOST_SHOWN:
                with contextlib.suppress(ValueError, OSError):  # standard error may be closed
                    sys.stderr.write(visible(decoder.decode(part), lines=True))
                    sys.stderr.flush()
            shown += len(part)


def _read_reply(found: Any) -> Reply | WorkerError:
    if "failure" not in found:
        value, extra, metrics = (child.decode(found[name], Other) for name in ("value", "extra", "metrics"))
        if not all(isinstance(values, list) for logged in (extra, metrics) for values in logged.values()):
            raise ValueError("what was logged is no list")
        return Reply(value=value, extra=extra, metrics=metrics)
    kind, detail, text, known = (found[name] for name in ("failure", "detail", "text", "known"))
    if kind not in ("raised", "too large", "bad result"):
        raise ValueError("there is no such failure")
    return WorkerError(kind, str(detail), text=str(text), known=None if known is None else list(map(str, known)))


BLOCKED = "; something blocks the event loop that asynchronous functions share"
