"""The native engine behind vLLM's routes: what `groupwise serve` runs. See `groupwise.rollouts.wire` for the bodies."""

import asyncio
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
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
from groupwise.rollouts.handling import Unavailable, explained, is_loopback, read_json, unless_gone
from groupwise.rollouts.native import NativeSampler
from groupwise.types import Batch, Completion

KEPT_OPEN, FAREWELL = 600, 2
"""Seconds for which a connection that says nothing is kept open, and for which requests are answered after a signal."""
MOST_SCORED = 32768
"""Tokens of a prompt whose log-probabilities may be asked for."""
FIRST = "0"
"""The id of the weights that a server starts with."""


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
        self._drain: asyncio.Task[Any] | None = None
        """While a pause waits for the requests under way: that they end."""
        self._ids = [FIRST]
        """Of the weights that were loaded, in order: the sampler's version is an index."""
        self._damage: str | None = None
        """Why the weights are no model's: reading them failed on the way."""
        self._at_weights = asyncio.Lock()
        """Held while weights change, and while log-probabilities are computed outside of the sampler."""
        self._scoring = ThreadPoolExecutor(1)  # one thread: PyTorch's own threads are made anew for each that calls it
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
        self.check(request)
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
                self._check_weights()
                raise wire.Aborted("the request was ended by /pause?mode=abort") from None
            raise
        finally:
            task.cancel()
            self._under_way.discard(task)
            self._aborted.discard(task)

    def check(self, request: Request) -> None:
        """
        Raises:
            UserError: the model cannot be given such a request.
        """
        config = self.sampler.model.config
        vocabulary, limit = config.vocab_size, getattr(config, "max_position_embeddings", None)
        for where, tokens in (("token_ids", request.prompt.tolist()), ("stop_token_ids", request.sampling.stop_tokens)):
            if tokens and (largest := max(tokens)) >= vocabulary:
                raise UserError(f"{where}: {largest} is no token: the vocabulary has {vocabulary}")
        if request.n > (rows := self.sampler.asked_rows):
            raise UserError(f"n: {request.n} completions are more than the rows generated at once, rollouts.max_rows = {rows}")
        length, most = len(request.prompt), request.sampling.max_tokens
        if limit is not None and length + most > limit:
            raise UserError(f"max_tokens: a prompt of {length} tokens and {most} more exceed the model's {limit} positions")
        self.sampler.model.decoder.check_length(length + most)

    def _check_weights(self) -> None:
        if self._damage is not None:
            raise Unavailable(f"no weights: {self._damage}")

    async def prompt_logprobs(self, tokens: Tensor) -> Tensor:
        """float32 [L - 1]: the log-probability of each of these tokens but the first, int64 [L], at the temperature 1.

        Raises:
            UserError: there are too many.
        """
        if len(tokens) > MOST_SCORED:
            raise UserError(f"prompt_logprobs: at most {MOST_SCORED} tokens are scored at once, not {len(tokens)}")
        if len(tokens) < 2:
            return torch.zeros(0)
        async with self._still():
            self._check_weights()
            return await asyncio.get_running_loop().run_in_executor(self._scoring, self._score, tokens)

    @torch.no_grad()
    def _score(self, tokens: Tensor) -> Tensor:
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
        logprobs_BT, _ = self.sampler.model.completion_logprobs(batch.to(self.sampler.model.device))
        return logprobs_BT[0].cpu()

    # --- weights and pauses

    async def load(self, directory: Path, name: str) -> None:
        """Sample from published weights from now on; requests in flight go on with them.

        Raises:
            UserError: they are another model's. Nothing has changed.
            RunError: they could not be read. There is nothing to sample with until others are loaded.
        """
        async with self._still():
            published = await asyncio.to_thread(Published, self.sampler.model, directory)
            try:
                await asyncio.to_thread(published.load)
            except UserError:
                raise
            except Exception as error:  # a disk, or a damaged file
                self._damage = f"{directory} could not be read: {first_line(error)}"
                self.abort()  # nothing may be sampled from weights of which some are new and some are not
                raise Unavailable(self._damage) from error
            self._damage = None
            self._ids.append(name)
            self.sampler.load(self.sampler.model, len(self._ids) - 1)

    @asynccontextmanager
    async def _still(self) -> AsyncIterator[None]:
        """Within: no decoding step runs, and weights change by nobody else."""
        async with self._at_weights:
            self.sampler.pause()
            try:
                yield
            finally:
                if not self.paused or self._drain is not None:
                    self.sampler.resume()

    async def pause(self, mode: str) -> None:
        """Run no decoding step from now on ("keep"), once all requests are done ("wait"), or end them all ("abort").

        A "wait" ends when another mode or `resume` takes its place.
        """
        self.paused = True
        self._open.clear()
        if mode == "wait" and self._under_way:
            drain = self._drain = self._drain or asyncio.ensure_future(asyncio.wait(self._under_way))
            self._go_on()  # an earlier pause may have kept them
            try:
                await asyncio.wait({drain})
            finally:
                if self._drain is drain:
                    self._drain = None
        else:
            self._end_drain()
        if mode == "abort":
            self.abort()
        if self.paused and self._drain is None:  # no /resume, nor another wait, came while it waited
            self.sampler.pause()

    def _end_drain(self) -> None:
        if self._drain is not None:
            self._drain.cancel()
            self._drain = None

    def abort(self) -> None:
        """End all requests under way."""
        self._aborted |= self._under_way
        for task in self._under_way:
            task.cancel()

    def resume(self) -> None:
        """Go on."""
        self.paused = False
        self._end_drain()
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


def make_app(served: Served, host: str) -> Starlette:
    """The routes; `host`: the address that is listened at."""

    async def generate(http: HttpRequest) -> Response:
        body = wire.parsed(wire.GenerateBody, await read_json(http))
        _check_name(served, body.model)
        request = body.request()
        served.check(request)
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

    handled = partial(explained, local=is_loopback(host))
    routes = {wire.GENERATE: generate, CHAT: chat, wire.LOAD: load, wire.PAUSE: pause, wire.RESUME: resume}
    return Starlette(
        routes=[
            *(Route(path, handled(handler), methods=["POST"]) for path, handler in routes.items()),
            Route(wire.HEALTH, handled(health)),
            Route("/v1/models", handled(models)),
        ]
    )


def _check_name(served: Served, name: str | None) -> None:
    if name is not None and name != served.name:
        raise UserError(f"model: {name!r} is not served here; {served.name!r} is")


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
