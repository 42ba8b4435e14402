"""The native engine behind vLLM's routes: what `groupwise serve` runs. See `groupwise.rollouts.wire` for the bodies."""

import asyncio
import json
import signal
import socket
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from groupwise.errors import RunError, UserError, first_line
from groupwise.models import Chat
from groupwise.models.published import Published
from groupwise.rollouts import wire
from groupwise.rollouts.base import Request, Sampling
from groupwise.rollouts.chatting import CHAT, ChatBody, ChatCompletions
from groupwise.rollouts.native import NativeSampler
from groupwise.types import Batch, Completion

Result = TypeVar("Result")
Handler = Callable[[HttpRequest], Awaitable[Response]]
KEPT_OPEN, FAREWELL = 600, 2
"""Seconds for which a connection that says nothing is kept open, and for which requests are answered after a signal."""
FIRST = "0"
"""The id of the weights that a server starts with."""


class Unavailable(RunError):
    """There is nothing to sample with until other weights are loaded."""


class Served:
    """A native sampler, and which weights it has."""

    def __init__(self, sampler: NativeSampler, chat: Chat, default: Sampling, name: str) -> None:
        """
        Args:
            default: of chat completions, what a request does not say.
            name: what the model is called.
        """
        self.sampler, self.name = sampler, name
        self.chat = ChatCompletions(chat, default, self.generate, self.id_of)
        self.paused = False
        self._draining = False
        """Whether a pause waits for the requests under way."""
        self._ids = [FIRST]
        """Of the weights that were loaded, in order: the sampler's version is an index."""
        self._damage: str | None = None
        """Why the weights are no model's: reading them failed on the way."""
        self._at_weights = asyncio.Lock()
        """Held while weights change, and while log-probabilities are computed outside of the sampler."""
        self._open = asyncio.Event()
        """Set while requests are taken up."""
        self._open.set()
        self._under_way: set[asyncio.Task[Any]] = set()
        self._held = 0
        """Requests that wait to be taken up."""
        self._aborted: set[asyncio.Task[Any]] = set()
        self._began = time.monotonic()

    def id_of(self, version: int) -> str:
        """The id of the weights that the sampler knows by this version."""
        return self._ids[version]

    # --- requests

    async def generate(self, request: Request) -> tuple[Completion, ...]:
        """The request's completions.

        Raises:
            UserError: the model cannot be given such a request.
            Aborted: `pause` ended it.
            RunError: sampling failed.
        """
        self._check(request)
        self._held += 1
        try:
            await self._open.wait()
        finally:
            self._held -= 1
        self._check_weights()
        task = asyncio.ensure_future(self.sampler.generate(request))
        self._under_way.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if task in self._aborted:
                raise wire.Aborted("the request was ended by /pause?mode=abort") from None
            raise
        finally:
            task.cancel()
            self._under_way.discard(task)
            self._aborted.discard(task)

    def _check(self, request: Request) -> None:
        config = self.sampler.model.config
        vocabulary, limit = config.vocab_size, getattr(config, "max_position_embeddings", None)
        for where, tokens in (("token_ids", request.prompt.tolist()), ("stop_token_ids", request.sampling.stop_tokens)):
            if tokens and (largest := max(tokens)) >= vocabulary:
                raise UserError(f"{where}: {largest} is no token: the vocabulary has {vocabulary}")
        length, most = len(request.prompt), request.sampling.max_tokens
        if limit is not None and length + most > limit:
            raise UserError(f"max_tokens: a prompt of {length} tokens and {most} more exceed the model's {limit} positions")
        self.sampler.model.decoder.check_length(length + most)

    def _check_weights(self) -> None:
        if self._damage is not None:
            raise Unavailable(f"no weights: {self._damage}")

    async def prompt_logprobs(self, tokens: Tensor) -> Tensor:
        """float32 [L - 1]: the log-probability of each of these tokens but the first, int64 [L], at the temperature 1."""
        if len(tokens) < 2:
            return torch.zeros(0)
        rest, one = tokens[1:], torch.zeros(1, dtype=torch.long)
        batch = Batch(
            prompts=(tokens[:1],),
            group_ids_B=one,
            rows_B=one,
            lengths_B=torch.tensor([len(rest)]),
            tokens_BT=rest[None],
            mask_BT=torch.ones(1, len(rest), dtype=torch.bool),
            rollout_logprobs_BT=torch.zeros(1, len(rest)),
        )
        async with self._at_weights:
            self._check_weights()
            with torch.no_grad():
                logprobs_BT, _ = self.sampler.model.completion_logprobs(batch.to(self.sampler.model.device))
        return logprobs_BT[0].cpu()

    # --- weights and pauses

    async def load(self, directory: Path, name: str) -> None:
        """Sample from published weights from now on; requests in flight go on with them.

        Raises:
            UserError: they are another model's. Nothing has changed.
            RunError: they could not be read. There is nothing to sample with until others are loaded.
        """
        async with self._at_weights:
            self.sampler.pause()
            try:
                published = await asyncio.to_thread(Published, self.sampler.model, directory)
                try:
                    await asyncio.to_thread(published.load)
                except UserError:
                    raise
                except Exception as error:  # a disk, or a damaged file
                    self._damage = f"{directory} could not be read: {first_line(error)}"
                    raise Unavailable(self._damage) from error
                self._damage = None
                self._ids.append(name)
                self.sampler.load(self.sampler.model, len(self._ids) - 1)
            finally:
                if not self.paused or self._draining:
                    self.sampler.resume()

    async def pause(self, mode: str) -> None:
        """Run no decoding step from now on ("keep"), once all requests are done ("wait"), or end them all ("abort")."""
        self.paused = True
        self._open.clear()
        if mode == "abort":
            self.abort()
        elif mode == "wait" and self._under_way:
            self._draining = True
            self._go_on()  # an earlier pause may have kept them
            await asyncio.wait(self._under_way)
            self._draining = False
        if self.paused:  # no /resume came while it waited
            self.sampler.pause()

    def abort(self) -> None:
        """End all requests under way."""
        self._aborted |= self._under_way
        for task in self._under_way:
            task.cancel()

    def resume(self) -> None:
        """Go on."""
        self.paused = False
        self._open.set()
        self._go_on()

    def _go_on(self) -> None:
        """Let decoding steps run; while weights change, `load` does."""
        if not self._at_weights.locked():
            self.sampler.resume()

    def health(self) -> dict[str, Any]:
        """What `wire.HEALTH` says."""
        found = self.sampler.health()
        return {
            "status": "ok" if self._damage is None else self._damage,
            "id": self._ids[-1],
            "model": self.name,
            "waiting": int(found["waiting"]) + self._held,
            "rows": int(found["rows"]),
            "kept": int(found["kept"]),
            "steps": int(found["steps"]),
            "paused": self.paused,
            "seconds": time.monotonic() - self._began,
        }


# --- routes


def make_app(served: Served) -> Starlette:
    """The routes."""

    async def generate(http: HttpRequest) -> Response:
        body = wire.parsed(wire.GenerateBody, await read_json(http))
        _check_name(served, body.model)
        request = body.request()
        scored = body.sampling_params.prompt_logprobs is not None
        prompt_logprobs = await served.prompt_logprobs(request.prompt) if scored else None
        try:
            answer = wire.Answer(await unless_gone(http, served.generate(request)), prompt_logprobs=prompt_logprobs)
        except wire.Aborted:
            answer = wire.Answer([], aborted=request.n)
        names = {"request_id": body.request_id or uuid4().hex, "model": served.name, "created": int(time.time())}
        return JSONResponse(names | wire.encode_answer(body, answer, served.id_of))

    async def chat(http: HttpRequest) -> Response:
        body = wire.parsed(ChatBody, await read_json(http))
        _check_name(served, body.model)
        return JSONResponse(await unless_gone(http, served.chat.answer(body, served.name)))

    async def load(http: HttpRequest) -> Response:
        body = wire.parsed(wire.LoadBody, await read_json(http))
        await served.load(Path(body.directory), body.id)
        return JSONResponse({"id": body.id})

    async def pause(http: HttpRequest) -> Response:
        mode = http.query_params.get("mode", "abort")
        if mode not in ("keep", "wait", "abort"):
            raise UserError(f"mode: {mode!r} is not one of 'keep', 'wait', 'abort'")
        await served.pause(mode)
        return JSONResponse({"status": "paused"})

    async def resume(_: HttpRequest) -> Response:
        served.resume()
        return JSONResponse({"status": "resumed"})

    async def health(_: HttpRequest) -> Response:
        return JSONResponse(served.health())

    async def models(_: HttpRequest) -> Response:
        model = {"id": served.name, "object": "model", "owned_by": "groupwise", "weight_version": served.health()["id"]}
        return JSONResponse({"object": "list", "data": [model]})

    routes = {wire.GENERATE: generate, CHAT: chat, wire.LOAD: load, wire.PAUSE: pause, wire.RESUME: resume}
    return Starlette(
        routes=[
            *(Route(path, explained(handler), methods=["POST"]) for path, handler in routes.items()),
            Route(wire.HEALTH, explained(health)),
            Route("/v1/models", explained(models)),
        ]
    )


def _check_name(served: Served, name: str | None) -> None:
    if name is not None and name != served.name:
        raise UserError(f"model: {name!r} is not served here; {served.name!r} is")


async def read_json(http: HttpRequest) -> Any:
    """The body of a request.

    Raises:
        UserError: it is no JSON.
    """
    if not http.headers.get("content-type", "").startswith("application/json"):  # else any web page could send it
        raise UserError("the header Content-Type must be application/json")
    try:
        return json.loads(await http.body())
    except (ValueError, RecursionError) as error:
        raise UserError(f"the body is no JSON: {first_line(error)}") from error


async def unless_gone(http: HttpRequest, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of some work, which is cancelled when the client closes the connection."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ConnectionResetError("the client has gone")
        return task.result()
    finally:
        task.cancel()
        watch.cancel()


def explained(handler: Handler) -> Handler:
    """A handler whose errors become JSON, as {"error": {"message", "type", "code"}}."""

    async def handle(http: HttpRequest) -> Response:
        try:
            return await handler(http)
        except UserError as error:
            return _error(400, "invalid_request", str(error))
        except ConnectionResetError as error:
            return _error(499, "client_closed_request", str(error))
        except (wire.Aborted, Unavailable) as error:
            return _error(503, "unavailable", str(error))
        except RunError as error:
            return _error(500, "failed", str(error))
        except Exception as error:  # a bug must not end the server, and its traceback is no business of the client's
            traceback.print_exception(error, file=sys.stderr)
            return _error(500, "failed", f"{type(error).__name__}: {first_line(error)}")

    return handle


def _error(code: int, kind: str, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": kind, "code": code}}, status_code=code)


# --- the process


class _Quiet(uvicorn.Server):
    """Leaves signals to whoever runs it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def run(
    app: Starlette, served: Served, host: str, port: int, stops: Sequence[signal.Signals], ready: Callable[[str], None]
) -> int:
    """Serve until one of the signals `stops` comes; returns it.

    Args:
        ready: called with the address as soon as requests are taken.

    Raises:
        UserError: nobody can listen there.
    """
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048)
    except OSError as error:
        raise UserError(f"--host, --port: cannot listen at {host} port {port}: {error.strerror or error}") from error
    settings = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_keep_alive=KEPT_OPEN, timeout_graceful_shutdown=FAREWELL, loop="none"
    )
    server, stopped = _Quiet(settings), asyncio.get_running_loop().create_future()

    def stop(number: int) -> None:
        server.should_exit = True
        served.abort()  # clients are told, and need not wait for their time limit
        if not stopped.done():
            stopped.set_result(number)

    for number in stops:
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    host, port = listening.getsockname()[:2]
    ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    await server.serve(sockets=[listening])
    if not stopped.done():
        raise RunError("the server ended by itself")
    result: int = stopped.result()
    return result
