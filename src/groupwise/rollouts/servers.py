"""What a sampler in another process is asked, whichever engine it runs, and the HTTP on which it is asked."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx2 as httpx
from torch import Tensor

from groupwise.descriptors import ran_out
from groupwise.errors import RunError, UserError
from groupwise.rollouts.base import Request
from groupwise.types import Completion

TOO_MANY = 429


class Unavailable(Exception):
    """There was no answer, or one that says nothing against the request, which may succeed at another time or place."""

    def __init__(self, text: str, *, answered: bool = False) -> None:
        super().__init__(text)
        self.answered = answered
        """Whether the server answered, with an error of its own."""


class Refused(RunError):
    """The server found the request wrong, as any other server would."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status
        """Of the answer, such as 404."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Weights in a directory that every sampler sees, complete and never changed."""

    directory: Path
    """As `Learner.publish` writes it."""
    id: str
    """No other weights have the same, in this run or another."""
    version: int
    """Optimiser updates that made them; that of other weights too, where the learner went back to a checkpoint."""


class Given:
    """The weights that one server was made to load."""

    def __init__(self) -> None:
        self._versions: dict[str, int] = {}

    def add(self, published: Published) -> None:
        self._versions[published.id] = published.version

    def version_of(self, id: str) -> int:
        """
        Raises:
            Unavailable: no such weights were given to it, so that it was started again meanwhile, or serves somebody else too.
        """
        if id not in self._versions:
            raise Unavailable(f"it generated with weights {id!r:.80}, which it was not given")
        return self._versions[id]


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What a server says of itself."""

    id: str | None
    """Of the weights that it samples from, as it was told when it loaded them; None: it does not say."""
    waiting: int
    """Requests that it has not begun."""
    rows: int
    """Completions being generated."""
    progress: float
    """Grows with everything it does for a request, decoding steps or tokens, say: where requests are under way and it stands
    still, the engine hangs."""


class Dialect(Protocol):
    """One server, spoken to in the way of its engine.

    All of them raise:
        Unavailable: the server is at fault.
        Refused: what was asked is.

    Time limits are the caller's, by cancelling the call; a request that is cancelled must be cancelled at the server too.
    """

    async def generate(self, request: Request) -> tuple[Completion, ...]:
        """See `Sampler.generate`; the versions are those of the ids that the server gives (`Given`). `handle`: any number
        of 0 and above where it is of use to send a request that continues this completion to the same server, which then finds
        it in `continues`; else None."""
        ...

    async def load(self, published: Published) -> None:
        """Sample from these weights from now on. Completions under way go on with them; no key or value that others computed is
        used any more."""
        ...

    async def probe(self, tokens: Tensor) -> Tensor:
        """float32 [L - 1]: log-probabilities of tokens (int64 [L]) but the first, at the temperature 1, over the whole
        vocabulary, computed anew."""
        ...

    async def health(self) -> Health: ...

    async def close(self) -> None:
        """Give back connections."""
        ...


class Http:
    """JSON to and from one server, over as many connections as there are requests."""

    def __init__(self, address: str, *, connect: float) -> None:
        """
        Args:
            address: as in "http://host:port".
            connect: seconds within which a connection is there.

        Raises:
            UserError: it is no address of a server.
        """
        self.address = address.rstrip("/")
        try:
            url = httpx.URL(self.address)
        except httpx.InvalidURL as error:
            raise UserError(f"{address!r} is no URL: {error}") from error
        if url.scheme not in ("http", "https") or not url.host:
            raise UserError(f"{address!r} is no address of a server: expected http://host:port")
        self._connect, self._verify = connect, httpx.create_ssl_context() if url.scheme == "https" else False
        self._clients: list[httpx.AsyncClient] = []
        self._free: list[httpx.AsyncClient] = []
        """Clients without a request. Each has one connection: a client looks through all of its connections at each request,
        which at 256 of them takes 2 ms, and among clients there is nothing to look for."""

    async def get(self, path: str) -> Any:
        """
        Raises:
            Unavailable, Refused: there is no answer to use.
        """
        return await self._ask("GET", path, None)

    async def text(self, path: str) -> str:
        """The answer as it is.

        Raises:
            Unavailable, Refused: there is no answer to use.
        """
        return (await self._send("GET", path, None)).text

    async def post(self, path: str, body: Any = None) -> Any:
        """
        Raises:
            Unavailable, Refused: there is no answer to use.
        """
        return await self._ask("POST", path, body)

    async def _ask(self, method: str, path: str, body: Any) -> Any:
        """The answer, read from JSON; None where it is empty."""
        response = await self._send(method, path, body)
        try:
            return json.loads(response.content) if response.content else None
        except ValueError as error:
            raise Unavailable(f"the answer is not JSON: {response.text:.80}", answered=True) from error

    async def _send(self, method: str, path: str, body: Any) -> httpx.Response:
        content = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"content-type": "application/json"}
        client = self._free.pop() if self._free else self._new_client()
        try:
            response = await client.request(method, path, content=content, headers=headers)
        except (httpx.HTTPError, httpx.StreamError, OSError) as error:
            if ran_out(error):
                raise RunError("too many open files, one for each request under way; allow more (ulimit -n)") from error
            raise Unavailable(f"{type(error).__name__}: {error}".removesuffix(": ")) from error
        finally:
            self._free.append(client)
        if response.status_code >= 500 or response.status_code == TOO_MANY:
            raise Unavailable(f"HTTP {response.status_code}: {_message(response)}", answered=True)
        if response.status_code != 200:
            raise Refused(f"{self.address}{path}: HTTP {response.status_code}: {_message(response)}", response.status_code)
        return response

    def _new_client(self) -> httpx.AsyncClient:
        made = httpx.AsyncClient(
            base_url=self.address,
            timeout=httpx.Timeout(None, connect=self._connect),
            verify=self._verify,
            trust_env=False,  # samplers are on this network; a proxy is for what is outside it
        )
        self._clients.append(made)
        return made

    async def close(self) -> None:
        for client in self._clients:
            await client.aclose()


def _message(response: httpx.Response) -> str:
    """What a server says of an error: vLLM's and ours put it into {"error": {"message"}}."""
    try:
        return f"{json.loads(response.content)['error']['message']:.500}"
    except (ValueError, KeyError, TypeError):
        return f"{response.text:.500}"
