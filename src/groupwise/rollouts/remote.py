"""The client of `groupwise serve`: the native engine in another process."""

from typing import Any

from torch import Tensor

from groupwise.rollouts import wire
from groupwise.rollouts.base import Request
from groupwise.rollouts.servers import Given, Health, Http, Published, Unavailable
from groupwise.types import Completion


class NativeServer:
    """The `Dialect` of `groupwise serve`."""

    def __init__(self, address: str, tokenizer: Any, *, connect: float = 10.0) -> None:
        """
        Args:
            connect: seconds within which a connection is there.

        Raises:
            UserError: it is no address of a server.
        """
        self.http, self.tokenizer, self.given = Http(address, connect=connect), tokenizer, Given()

    async def generate(self, request: Request) -> tuple[Completion, ...]:
        answer = await self.http.post(wire.GENERATE, wire.encode_request(request))
        try:
            return wire.decode_answer(answer, request.n, version_of=self.given.version_of, text_of=self._text_of)
        except wire.Aborted as error:
            raise Unavailable(str(error)) from error

    async def load(self, published: Published) -> None:
        self.given.add(published)
        await self.http.post(wire.LOAD, {"directory": str(published.directory), "id": published.id})

    async def probe(self, tokens: Tensor) -> Tensor:
        return wire.decode_probe(await self.http.post(wire.GENERATE, wire.encode_probe(tokens)), tokens)

    async def health(self) -> Health:
        found = await self.http.get(wire.HEALTH)
        return Health(id=found["id"], waiting=int(found["waiting"]), rows=int(found["rows"]), progress=float(found["steps"]))

    async def close(self) -> None:
        await self.http.close()

    def _text_of(self, tokens: list[list[int]]) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return texts
