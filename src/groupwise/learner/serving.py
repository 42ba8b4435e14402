"""A learner behind HTTP, for the process that trains: one call after the other, while it says what it is doing.

    POST /calls/NAME    a call, its arguments as the body: 200 with what it returned or raised, or 202 with its number
    GET /calls/NUMBER   the same, of a call that was begun
    GET /health         what the learner does, and for how long: answered whatever it does

A request waits for its call for a few seconds at most, so that silence always means that something is wrong, however long calls
take. Bodies are messages of `state.to_bytes`. Whoever calls must know a secret.
"""

import asyncio
import hmac
import itertools
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from groupwise.learner import wire
from groupwise.learner.base import Learner, TokenRecord
from groupwise.state import from_bytes, to_bytes
from groupwise.types import Batch, TrainingBatch

LONGEST_WAIT = 10.0
"""Seconds that a request waits for its call, whatever it asks for."""
KEPT_ALIVE = 24 * 3600
"""Seconds for which an idle connection stays open. The other side closes it far earlier, and so never writes to one that this
side is just closing."""


@dataclass(frozen=True, slots=True)
class Call:
    """Something that the learner is asked for."""

    number: int
    name: str
    body: bytes
    """Its arguments."""
    answer: Future[bytes] = field(default_factory=Future)
    """What it returned or raised, as a message. Never an exception."""


# --- what can be called


def _compute_logprobs(learner: Learner, arguments: Mapping[str, Any]) -> dict[str, Any]:
    found, metrics = learner.compute_logprobs(wire.batch_of(Batch, arguments["batch"]))
    tensors = {"old_logprobs_BT": found.old_logprobs_BT, "ref_logprobs_BT": found.ref_logprobs_BT, "values_BT": found.values_BT}
    return {"tensors": tensors, "metrics": metrics}


def _update(learner: Learner, arguments: Mapping[str, Any]) -> dict[str, Any]:
    records: list[TokenRecord] = []
    minibatch = wire.batch_of(TrainingBatch, arguments["minibatch"])
    update = learner.update(minibatch, records.append if arguments["recorded"] else None)
    return {"update": wire.update_tree(update), "records": records}


CALLS: Mapping[str, Callable[[Learner, Mapping[str, Any]], Any]] = {
    "version": lambda learner, _: learner.version,
    "begin_step": lambda learner, _: learner.begin_step(),
    "take_back": lambda learner, _: learner.take_back(),
    "compute_logprobs": _compute_logprobs,
    "update": _update,
    "publish": lambda learner, arguments: learner.publish(Path(arguments["directory"])),
    "probe": lambda learner, arguments: learner.probe(arguments["tokens"]),
    "save": lambda learner, arguments: wire.digest_trees(learner.save(Path(arguments["directory"]))),
    "load": lambda learner, arguments: learner.load(Path(arguments["directory"])),
}
"""The methods of a `Learner` that need nothing else."""


class Server:
    """Takes calls from the network in a thread of its own, and runs them in the thread that calls `run`.

    That is one thread for all of the learner's work: PyTorch's threads belong to the one that uses them.
    """

    def __init__(self, host: str, port: int, token: str) -> None:
        """`token`: the secret that whoever calls must know."""
        self.host, self.port, self.token = host, port, token
        self._waiting: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._calls: dict[int, Call] = {}
        self._numbers = itertools.count(1)
        self._busy: tuple[str, float] | None = ("loading", time.monotonic())
        """What the learner does, and since when."""
        self._done = 0

    def run(self, make: Callable[[], tuple[Learner, Any]]) -> None:
        """Make the learner and its tokenizer, then run its calls, for ever. What making it raises is the answer to every call."""
        threading.Thread(target=self._serve, name="learner server", daemon=True).start()
        made: tuple[Learner, Any] | Exception
        try:
            made = make()
        except Exception as error:  # whatever a model's or a user's files lead to; whoever calls is told
            made = error
        while True:
            self._busy = None
            call = self._waiting.get()
            self._busy = call.name, time.monotonic()
            call.answer.set_result(self._answer(call, made))
            self._done += 1

    def _answer(self, call: Call, made: tuple[Learner, Any] | Exception) -> bytes:
        try:
            if isinstance(made, Exception):
                raise made
            learner, tokenizer = made
            arguments = from_bytes(call.body)
            if call.name == "export":
                result: Any = learner.export(Path(arguments["directory"]), tokenizer)
            else:
                result = CALLS[call.name](learner, arguments)
            return to_bytes({"version": learner.version, "result": result})
        except Exception as error:  # of whatever kind, it is for the process that trains
            return to_bytes({"error": wire.error_tree(error)})

    # --- the network's side

    def _serve(self) -> None:
        app = Starlette(
            routes=[
                Route("/calls/{name:str}", self._begin, methods=["POST"]),
                Route("/calls/{number:int}", self._take, methods=["GET"]),
                Route("/health", self._health, methods=["GET"]),
            ]
        )
        settings: Any = {"log_level": "warning", "access_log": False, "timeout_keep_alive": KEPT_ALIVE}
        server = uvicorn.Server(uvicorn.Config(app, host=self.host, port=self.port, lifespan="off", **settings))
        try:
            server.run()
        finally:  # a learner that nobody can reach is of no use
            print(f"the learner's server at {self.host}:{self.port} has ended", file=sys.stderr, flush=True)
            os._exit(1)

    async def _begin(self, request: Request) -> Response:
        name = request.path_params["name"]
        if not self._knows(request):
            return Response(status_code=401)
        if name not in CALLS and name != "export":
            return Response(status_code=404)
        call = Call(next(self._numbers), name, await request.body())
        self._calls[call.number] = call
        self._waiting.put(call)
        return await self._wait(call, request)

    async def _take(self, request: Request) -> Response:
        if not self._knows(request):
            return Response(status_code=401)
        call = self._calls.get(request.path_params["number"])
        return Response(status_code=404) if call is None else await self._wait(call, request)

    async def _wait(self, call: Call, request: Request) -> Response:
        wait = min(float(request.query_params.get("wait", 0)), LONGEST_WAIT)
        done, _ = await asyncio.wait([asyncio.wrap_future(call.answer)], timeout=wait)
        if not done:
            return JSONResponse({"call": call.number, **self._state()}, status_code=202)
        self._calls.pop(call.number, None)
        return Response(call.answer.result(), media_type="application/octet-stream")

    async def _health(self, request: Request) -> Response:
        return JSONResponse(self._state())

    def _state(self) -> dict[str, Any]:
        name, since = self._busy or (None, time.monotonic())
        return {"busy_with": name, "seconds": time.monotonic() - since, "calls_done": self._done, "pid": os.getpid()}

    def _knows(self, request: Request) -> bool:
        return hmac.compare_digest(request.headers.get("authorization", "").encode(), f"Bearer {self.token}".encode())
