"""A reward over HTTP: the completions of a problem are posted as JSON, and their rewards come back."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx

from groupwise.environments.hosting import Lent
from groupwise.errors import UserError
from groupwise.rewards.base import Progress, Rated, all_failed
from groupwise.rewards.user import columns_of, prompt_of, said
from groupwise.rewards.values import rate_values
from groupwise.types import Completion, Problem
from groupwise.workers import elsewhere
from groupwise.workers.child import LARGEST

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 10.0
"""Seconds between two tries; each pause is twice the one before."""
TOO_MANY = 429


class Unavailable(Exception):
    """A try failed in a way that another may not."""

    def __init__(self, text: str, pause: float = 0.0) -> None:
        super().__init__(text)
        self.pause = pause
        """Seconds that the server asked to be left alone for."""


class Refused(Exception):
    """The server gave an answer that no other try would change."""

    def __init__(self, failure: str, detail: str) -> None:
        super().__init__(detail)
        self.failure = failure


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteReward:
    """A server that is sent prompt, completions and columns, and answers {"rewards": […]}."""

    name: str
    url: str
    limit: float
    """Seconds for an answer, all tries and pauses together."""
    concurrency: int
    """Requests at once."""
    answer_key: str
    prompt_key: str
    _client: list[httpx.AsyncClient] = field(init=False, default_factory=list)
    _room: list[asyncio.Semaphore] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        """
        Raises:
            UserError: the URL cannot be one of a server.
        """
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise UserError(f"{self.url!r} is no URL: {error}") from error
        if not url.host or not 0 < (url.port or 80) < 2**16:
            raise UserError(f"{self.url!r} is no URL of a server: expected http://host:port/path, the port at most {2**16 - 1}")

    async def rate(
        self, problem: Problem, completions: Sequence[Completion], progress: Progress, environments: Lent | None = None
    ) -> Sequence[Rated]:
        body = {
            "prompt": prompt_of(problem),
            "completions": [said(problem, completion) for completion in completions],
            "columns": columns_of(problem, self.prompt_key, self.answer_key),
            "step": progress.step,
        }
        try:
            values = await elsewhere(self._ask(json.dumps(body, default=str).encode()))
        except Refused as error:
            return all_failed(len(completions), error.failure, f"{self.name}: {error}")
        rated = rate_values(values, [len(completion.text) for completion in completions])
        return [one if one.failure is None else Rated(failure=one.failure, detail=f"{self.name}: {one.detail}") for one in rated]

    async def _ask(self, body: bytes) -> Any:
        """The rewards; tried again after failures to connect, 5xx and 429, until the time is over.

        Raises:
            Refused: there are none.
        """
        if not self._client:
            self._client.append(httpx.AsyncClient(timeout=self.limit, limits=httpx.Limits(max_connections=self.concurrency)))
            self._room.append(asyncio.Semaphore(self.concurrency))
        async with self._room[0]:
            deadline, pause = time.monotonic() + self.limit, FIRST_PAUSE
            while True:
                try:
                    async with asyncio.timeout(deadline - time.monotonic()):
                        return await self._post(body)
                except TimeoutError as error:
                    raise Refused("timeout", f"no answer within {self.limit:g} s") from error
                except Unavailable as error:
                    wait = max(pause, error.pause)
                    if time.monotonic() + wait > deadline:
                        raise Refused("unreachable", f"{error}, for {self.limit:g} s") from error
                    await asyncio.sleep(wait)
                    pause = min(2 * pause, LONGEST_PAUSE)

    async def _post(self, body: bytes) -> Any:
        try:
            headers = {"content-type": "application/json"}
            async with self._client[0].stream("POST", self.url, content=body, headers=headers) as response:
                content = b""
                async for part in response.aiter_bytes():
                    content += part
                    if len(content) > LARGEST:
                        raise Refused("too large", f"the answer has more than {LARGEST} bytes")
        except httpx.TimeoutException as error:
            raise TimeoutError from error
        except (httpx.TransportError, httpx.StreamError) as error:
            raise Unavailable(f"{type(error).__name__}: {error}") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:  # such as a body that is not encoded as its headers say
            raise Refused("wrong type", f"{type(error).__name__}: {error}") from error
        return _rewards_in(response, content)


def _rewards_in(response: httpx.Response, content: bytes) -> Any:
    """
    Raises:
        Unavailable, Refused: it holds none.
    """
    text = content[:200].decode(errors="replace")
    if response.status_code >= 500 or response.status_code == TOO_MANY:
        after = response.headers.get("retry-after", "")
        raise Unavailable(f"HTTP {response.status_code}: {text}", float(after) if after.isdecimal() else 0.0)
    if response.status_code != 200:
        raise Refused("raised", f"HTTP {response.status_code}: {text}")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Refused("wrong type", f"the answer is not JSON: {text!r}") from error
    if not isinstance(found, dict) or "rewards" not in found:
        raise Refused("wrong type", f'the answer has no "rewards": {text!r}')
    return found["rewards"]
