"""A server at an address that people gave: whether it is vLLM or `groupwise serve` is found out when it first answers."""

from collections.abc import Callable

from torch import Tensor

from groupwise.rollouts.base import Request
from groupwise.rollouts.servers import Dialect, Health, Http, Published, Refused
from groupwise.types import Completion

VERSION = "/version"
"""A route of vLLM's, which `groupwise serve` does not have."""


class DetectedServer:
    """The `Dialect` that the server turns out to speak."""

    def __init__(
        self, address: str, *, native: Callable[[str], Dialect], vllm: Callable[[str], Dialect], connect: float = 10.0
    ) -> None:
        """
        Args:
            native, vllm: make the dialect for the address.
            connect: seconds within which a connection is there.

        Raises:
            UserError: it is no address of a server.
        """
        self.http, self._native, self._vllm = Http(address, connect=connect), native, vllm
        self._dialect: Dialect | None = None

    async def _found(self) -> Dialect:
        if self._dialect is None:
            try:
                await self.http.get(VERSION)
            except Refused:
                made = self._native(self.http.address)
            else:
                made = self._vllm(self.http.address)
            if self._dialect is not None:  # found by another call meanwhile
                await made.close()
            else:
                self._dialect = made
        return self._dialect

    async def generate(self, request: Request) -> tuple[Completion, ...]:
        return await (await self._found()).generate(request)

    async def load(self, published: Published) -> None:
        await (await self._found()).load(published)

    async def probe(self, tokens: Tensor) -> Tensor:
        return await (await self._found()).probe(tokens)

    async def health(self) -> Health:
        dialect = await self._found()
        try:
            return await dialect.health()
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(f"what answers at {self.http.address} is neither groupwise serve nor vLLM", 200) from error

    async def close(self) -> None:
        await self.http.close()
        if self._dialect is not None:
            await self._dialect.close()
