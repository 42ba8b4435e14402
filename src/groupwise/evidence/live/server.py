"""The server of the live page. It answers whoever has the token, sends what the page shows, and reads nothing but runs.

A web page of another origin cannot reach it: it does not know the token, which is part of every path; a name that an attacker has
led to this machine (DNS rebinding) is no host that is answered; nothing allows other origins to read; and a request that changes
something must come from the page itself.
"""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import re
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args
from urllib.parse import urlsplit

import uvicorn
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from groupwise.errors import RunError, UserError
from groupwise.evidence.completions import Source, step_to_read
from groupwise.evidence.live.hub import Hub
from groupwise.evidence.runs_page import live_page
from groupwise.evidence.shapes import StepToRead
from groupwise.text import json_line, visible

LONGEST_BODY = 8192
"""Bytes of a request's body, which is a path."""
FAREWELL = 2
"""Seconds that connections have to end."""
MOST_CONNECTIONS = 500
PATIENCE = 10.0
"""Seconds that a connection may take to its first request."""
SCRIPT = '<script type="module">'
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def policy(page: str) -> str:
    """The Content-Security-Policy of a page: its own script runs, it asks its own server, and nothing else is loaded or sent."""
    script = page[page.index(SCRIPT) + len(SCRIPT) : page.rindex("</script>")]
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{known}'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def make_app(hub: Hub, token: str, host: str, title: str) -> ASGIApp:
    """The page and what it asks for, under /TOKEN/.

    Args:
        host: where the server listens.
    """
    html = live_page(title)

    async def page(_: Request) -> Response:
        return HTMLResponse(html)

    async def follow(request: Request) -> Response:
        return StreamingResponse(hub.messages(request.query_params.get("since", "")), media_type="application/x-ndjson")

    async def step(request: Request) -> Response:
        return await answered(partial(asyncio.to_thread, read_step, hub, request.query_params))

    async def add(request: Request) -> Response:
        body = await _body(request)
        return await answered(lambda: hub.add(checked_path(body)))

    async def remove(request: Request) -> Response:
        body = await _body(request)
        return await answered(lambda: hub.remove(body))

    routes = [
        Route("/", page),
        Route("/follow", follow),
        Route("/step", step),
        Route("/runs/add", add, methods=["POST"]),
        Route("/runs/remove", remove, methods=["POST"]),
    ]
    return Guard(Router(routes), token, host, policy(html))


async def answered(work: Callable[[], Awaitable[Any]]) -> Response:
    """What some work gives, as JSON, or what is wrong with what it was asked for."""
    try:
        found = await work()
    except UserError as error:
        return JSONResponse({"error": visible(str(error))}, 400)
    return Response(json_line(found, (",", ":")), media_type="application/json")


def read_step(hub: Hub, wanted: Mapping[str, str]) -> StepToRead:
    """Completions of a step of a run that is followed.

    Raises:
        UserError: there are none.
    """
    run, source = hub.run(wanted.get("run", "")), wanted.get("source", "")
    numbers = [wanted.get(name, "0") for name in ("step", "first")]
    if (
        run is None
        or source not in get_args(Source)
        or not all(re.fullmatch(r"\d{1,12}", number, re.ASCII) for number in numbers)
    ):
        raise UserError("the run is not followed (any more), or has no such completions")
    step, first = map(int, numbers)
    return step_to_read(run, step, cast(Source, source), first)


class Guard:
    """Lets requests through to an application that have the token, and tells browsers what a page of this server may do."""

    def __init__(self, app: ASGIApp, token: str, host: str, policy: str) -> None:
        self.app, self.token, self.host = app, token, host
        self.headers = {**HEADERS, "Content-Security-Policy": policy}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        if scope["type"] == "http":
            await (self.refused(Request(scope)) or self.app)(self.inner(scope), receive, answer)

    def refused(self, request: Request) -> Response | None:
        """The answer to a request that is not let through."""
        if not known_host(request.headers.get("host", ""), self.host):
            return PlainTextResponse("this server is asked by its address", 421)
        given = request.url.path.split("/", 2)[1].encode("utf-8", "replace")
        if not hmac.compare_digest(given, self.token.encode()) or request.url.path.count("/") < 2:
            return PlainTextResponse("not the token of the address that groupwise watch printed", 404)
        return None if own_origin(request) else PlainTextResponse("another page asks", 403)

    def inner(self, scope: Scope) -> Scope:
        """The request with its path after the token."""
        return {**scope, "path": "/" + scope["path"].split("/", 2)[-1]}


def known_host(header: str, listening: str) -> bool:
    """Whether a Host header is how this server is asked: by the address or name it was told to listen at, by this machine's loopback
    address or, where it listens on every network, by any address or its name. Other names could be led here by their owner."""
    try:
        name = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return False
    everywhere = listening in ("0.0.0.0", "::")
    if name in ("localhost", listening.lower(), *([socket.gethostname().lower()] if everywhere else [])):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback or everywhere
    except ValueError:
        return False


def own_origin(request: Request) -> bool:
    """Whether a request comes from the page itself or is typed in, as far as its browser tells."""
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return request.method == "GET" and request.headers.get("sec-fetch-mode") == "navigate"  # a link that was followed
    origin = request.headers.get("origin")
    try:
        return origin is None or urlsplit(origin).netloc == request.headers.get("host")
    except ValueError:
        return False


def checked_path(text: str) -> Path:
    """A path that a user typed.

    Raises:
        UserError: it is none.
    """
    text = text.strip()
    if not text or "\0" in text or len(text) > 4096:
        raise UserError("type the path of a run's directory")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text}: {error}") from error


async def _body(request: Request) -> str:
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > LONGEST_BODY:
            return ""
    return content.decode("utf-8", "replace")


# --- the process


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        UserError: nobody can.
    """
    try:
        family, both = (socket.AF_INET6 if ":" in host else socket.AF_INET), host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server((host, port), family=family, dualstack_ipv6=both)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"--host, --port: cannot listen at {host} port {port}: {reason}") from error


def address(listening: socket.socket, token: str) -> str:
    """The page's address."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/{token}/"


class _Connection(H11Protocol):
    """Ends a connection that asks for nothing: so many of them would shut the page out."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.loop.call_later(PATIENCE, self._end_unused)

    def _end_unused(self) -> None:
        if self.cycle is None:
            self.transport.close()


class _Server(uvicorn.Server):
    """Leaves signals to whoever runs it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(
    hub: Hub, app: ASGIApp, listening: socket.socket, stops: Sequence[signal.Signals], ready: Callable[[], Any]
) -> int:
    """Serve until one of the signals `stops` comes; returns it.

    Args:
        ready: called as soon as requests are taken.

    Raises:
        RunError: the server ended by itself.
    """
    settings = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        lifespan="off",
        server_header=False,
        loop="none",
        http=_Connection,
        ws="none",
        limit_concurrency=MOST_CONNECTIONS,
        timeout_graceful_shutdown=FAREWELL,
    )
    server, loop = _Server(settings), asyncio.get_running_loop()
    stopped: asyncio.Future[int] = loop.create_future()

    def stop(number: int) -> None:
        if not stopped.done():
            stopped.set_result(number)

    for number in stops:
        loop.add_signal_handler(number, stop, number)
    keeping, serving = asyncio.create_task(hub.keep()), asyncio.create_task(server.serve(sockets=[listening]))
    ready()
    awaited: list[asyncio.Future[Any]] = [stopped, serving, keeping]
    await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
    await hub.close()
    server.should_exit = True
    await serving
    await keeping
    if not stopped.done():
        raise RunError("the server ended by itself")
    return stopped.result()
