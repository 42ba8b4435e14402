"""How `groupwise serve` reads requests and tells of errors."""

import asyncio
import json
import sys
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from ipaddress import ip_address
from typing import Any, TypeVar
from urllib.parse import urlsplit

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from groupwise.errors import RunError, UserError, first_line
from groupwise.rollouts.wire import Aborted

Result = TypeVar("Result")
Handler = Callable[[HttpRequest], Awaitable[Response]]
MOST_BYTES = 2**25
"""Of a body."""


class Unavailable(RunError):
    """There is nothing to sample with until other weights are loaded."""


async def read_json(http: HttpRequest) -> Any:
    """The body of a request.

    Raises:
        UserError: it is no JSON, too large, or has text that is none.
    """
    if not http.headers.get("content-type", "").startswith("application/json"):  # else any web page could send it
        raise UserError("the header Content-Type must be application/json")
    content = bytearray()
    async for part in http.stream():
        content += part
        if len(content) > MOST_BYTES:
            raise UserError(f"the body has more than {MOST_BYTES} bytes")
    try:
        text = content.decode()
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the body is no JSON: {first_line(error)}") from error
    if "\\u" in text and (place := _half_character(body)) is not None:
        raise UserError(f"{place}: half of a surrogate pair is no text")
    return body


def _half_character(body: Any) -> str | None:
    """Where a text is that cannot be encoded: JSON can write half a character."""
    left: list[tuple[str, Any]] = [("", body)]
    for place, value in left:
        if isinstance(value, str) and any("\ud800" <= char <= "\udfff" for char in value):
            return place.removeprefix(".") or "the body"
        if isinstance(value, dict):
            left += [(f"{place}, a field's name", key) for key in value]
            left += [(f"{place}.{key}", one) for key, one in value.items()]
        elif isinstance(value, list):
            left += [(f"{place}.{i}", one) for i, one in enumerate(value)]
    return None


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


def is_loopback(host: str) -> bool:
    """Whether whoever reaches this address is on this machine."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _check_sender(http: HttpRequest, local: bool) -> None:
    """Web pages in a browser of this machine may reach a server that only this machine is meant to reach.

    Raises:
        UserError: a web page sent it; or, where only this machine is listened to, its sender took another name for this machine.
    """
    if "origin" in http.headers:
        raise UserError("the header Origin: web pages are not answered")
    try:
        name = urlsplit(f"//{http.headers.get('host', '')}").hostname or ""
        named = name not in ("", "localhost") and not ip_address(name)
    except ValueError:
        named = True
    if local and named:
        raise UserError("the header Host: only localhost, or an address, names a server that this machine alone reaches")


def explained(handler: Handler, *, local: bool) -> Handler:
    """A handler whose errors become JSON, as {"error": {"message", "type", "code"}}.

    `local`: only this machine is listened to.
    """

    async def handle(http: HttpRequest) -> Response:
        try:
            _check_sender(http, local)
            return await handler(http)
        except UserError as error:
            return _error(400, "invalid_request", str(error))
        except ConnectionResetError as error:
            return _error(499, "client_closed_request", str(error))
        except (Aborted, Unavailable) as error:
            return _error(503, "unavailable", str(error))
        except RunError as error:
            return _error(500, "failed", str(error))
        except Exception as error:  # a bug must not end the server, and its traceback is no business of the client's
            traceback.print_exception(error, file=sys.stderr)
            return _error(500, "failed", f"{type(error).__name__}: {first_line(error)}")

    return handle


def _error(code: int, kind: str, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "type": kind, "code": code}}, status_code=code)
