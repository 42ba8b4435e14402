"""A server that speaks the wire protocol of `groupwise serve` and computes nothing: completions of heavy-tailed lengths arrive
when a GPU would have them.

    python benchmarks/synthetic_sampler.py --port 8000 --fixed 0.02 --mean 100 --cv 1.5 --most 2000

All rows are decoded together: a step takes `fixed` + rows * `each` seconds (0: completions come at once). Lengths are lognormal
and follow from the request's seed, as the random numbers of the native engine do.
"""

import argparse
import asyncio
import base64
import heapq
import itertools
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from groupwise.cluster.planning.lengths import lognormal
from groupwise.models.loading import shipped_path
from groupwise.rollouts import wire

CHARACTERS = "0123456789 +-*=" * 20_000
"""What completions say; about four characters a token."""


@dataclass(eq=False)
class Rows:
    """The rows of a sampler, which get a token each in every step."""

    fixed: float
    each: float
    made: float = 0.0
    seen: float = field(default_factory=time.monotonic)
    ends: list[tuple[float, int, "asyncio.Future[None]"]] = field(default_factory=list)
    number: Any = field(default_factory=itertools.count)
    timer: asyncio.TimerHandle | None = None

    def advance(self) -> None:
        now = time.monotonic()
        if self.ends:
            self.made += (now - self.seen) / self.step
        self.seen = now

    @property
    def step(self) -> float:
        return max(1e-9, self.fixed + self.each * len(self.ends))

    def add(self, length: int) -> "asyncio.Future[None]":
        self.advance()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self.ends, (self.made + length, next(self.number), future))
        self.wait()
        return future

    def wait(self) -> None:
        """For the next row that ends."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.ends:
            left = max(0.0, self.ends[0][0] - self.made) * self.step
            self.timer = asyncio.get_running_loop().call_later(left, self.finish)

    def finish(self) -> None:
        self.advance()
        while self.ends and self.ends[0][0] <= self.made + 1e-6:
            future = heapq.heappop(self.ends)[2]
            if not future.done():
                future.set_result(None)
        self.wait()


def long_model(directory: Path) -> str:
    """The shipped model, said to take long sequences; a copy in this directory. Nothing computes with it."""
    copy = directory / "model"
    shutil.copytree(shipped_path("arithmetic-base"), copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 65_536}))
    return str(copy)


class Sampler:
    """The routes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.rows = Rows(arguments.fixed, arguments.each)
        self.lengths = lognormal(arguments.mean, arguments.cv, arguments.most)
        random = np.random.default_rng(0)
        self.tokens = [int(token) for token in random.integers(2, arguments.vocabulary, arguments.most)]
        self.logprobs = np.full(arguments.most, -1.0, "<f4").tobytes()
        self.id: str | None = None

    async def generate(self, request: Request) -> Response:
        body = await request.json()
        parameters = body["sampling_params"]
        random = np.random.default_rng(parameters["seed"])
        lengths = np.minimum(self.lengths(random, parameters["n"]), parameters["max_tokens"]).tolist()
        began = self.id
        await asyncio.gather(*(self.rows.add(length) for length in lengths))
        choices = [self.choice(index, length, began) for index, length in enumerate(lengths)]
        return Response(json.dumps({"choices": choices, "prompt_logprobs": None}), media_type="application/json")

    def choice(self, index: int, length: int, began: str | None) -> dict[str, Any]:
        """Half of it under the weights that it was begun with, where there are others now."""
        half = length if began == self.id else max(1, length // 2)
        spans = [{"version": began, "start": 0, "end": half}]
        spans += [{"version": self.id, "start": half, "end": length}] if half < length else []
        logprobs = base64.b64encode(self.logprobs[: 4 * length]).decode()
        return {
            "index": index,
            "token_ids": self.tokens[:length],
            "logprobs": None,
            "finish_reason": "stop",
            "weight_versions": spans,
            "groupwise": {"text": CHARACTERS[: 4 * length], "logprobs": logprobs, "handle": None, "kept": None},
        }

    async def load(self, request: Request) -> Response:
        self.id = (await request.json())["id"]
        return Response(json.dumps({"id": self.id}), media_type="application/json")

    async def health(self, _: Request) -> Response:
        self.rows.advance()
        state = {"id": self.id, "waiting": 0, "rows": len(self.rows.ends), "steps": self.rows.made}
        return Response(json.dumps(state), media_type="application/json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--fixed", type=float, default=0.0, help="Seconds of a decoding step.")
    parser.add_argument("--each", type=float, default=0.0, help="Seconds that each row adds to it.")
    parser.add_argument("--mean", type=float, default=100.0)
    parser.add_argument("--cv", type=float, default=1.0)
    parser.add_argument("--most", type=int, default=1000)
    parser.add_argument(
        "--vocabulary", type=int, default=64, help="Token ids are below it; those of a large one take more digits."
    )
    sampler = Sampler(arguments := parser.parse_args())
    routes = [
        Route(wire.GENERATE, sampler.generate, methods=["POST"]),
        Route(wire.LOAD, sampler.load, methods=["POST"]),
        Route(wire.HEALTH, sampler.health),
    ]
    uvicorn.run(Starlette(routes=routes), host=arguments.host, port=arguments.port, log_level="critical")


if __name__ == "__main__":
    main()
