"""What HTTP costs: completions of one `groupwise serve` against those of the same engine in this process, in turn.

    python benchmarks/serving.py [WORK ...]

Works are those of workloads.py; "arithmetic" is the embedded task: 32 prompts with 16 completions each of arithmetic-base. Each
side has one thread, and the client that asks the server has the process of this script. Prints useful tokens per second, the
fastest of all turns and the median, and whether all tokens are the same.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from workloads import WORKS, make

from groupwise.config import Recipe
from groupwise.models import LanguageModel, encode_prompt, load_tokenizer
from groupwise.rollouts.base import Request, Sampler, Sampling, requests
from groupwise.rollouts.driver import gather
from groupwise.rollouts.native import NativeSampler
from groupwise.rollouts.remote import NativeServer
from groupwise.rollouts.servers import Published
from groupwise.tasks.arithmetic import ArithmeticTask


@dataclass(frozen=True)
class Case:
    """A model, and what it is asked."""

    model: str
    asked: list[Request]


def embedded() -> Case:
    recipe, tokenizer = Recipe(), load_tokenizer("arithmetic-base")
    settings, task = recipe.rollouts, ArithmeticTask()
    prompts = [encode_prompt(tokenizer, task.problem(i, 0).prompt) for i in range(settings.prompts_per_step)]
    return Case("arithmetic-base", requests(prompts, settings.group_size, Sampling(max_tokens=settings.max_tokens), 0))


def of_work(name: str, directory: Path) -> Case:
    work = WORKS[name]
    make(work, directory)
    tokenizer, texts = load_tokenizer(str(directory)), json.loads((directory / "prompts.json").read_text())
    prompts = [encode_prompt(tokenizer, text, False) for text in texts]
    return Case(str(directory), requests(prompts, work.group_size, Sampling(max_tokens=work.max_tokens), 0))


@asynccontextmanager
async def served(model: str, tokenizer: Any) -> AsyncIterator[NativeServer]:
    command = [sys.executable, "-m", "groupwise", "serve", model, "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "999"}
    )
    try:
        assert process.stdout is not None
        client = NativeServer(process.stdout.readline().rpartition(" ")[2].strip(), tokenizer)
        client.given.add(Published(directory=Path(), id="0", version=0))
        yield client
        await client.close()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


async def turn(sampler: Sampler | NativeServer, asked: list[Request]) -> tuple[float, list[list[int]]]:
    """Tokens per second, and the tokens."""
    began = time.perf_counter()
    found = await gather(*(sampler.generate(request) for request in asked))
    seconds = time.perf_counter() - began
    tokens = [completion.tokens.tolist() for group in found for completion in group]
    return sum(map(len, tokens)) / seconds, tokens


async def compare(case: Case, turns: int) -> dict[str, Any]:
    tokenizer = load_tokenizer(case.model)
    here = NativeSampler(LanguageModel.load(case.model), tokenizer)
    rates: dict[str, list[float]] = {"here": [], "served": []}
    async with served(case.model, tokenizer) as there:
        for number in range(turns + 1):  # the first warms up
            (rate_here, ours), (rate_there, theirs) = await turn(here, case.asked), await turn(there, case.asked)
            if number:
                rates["here"].append(rate_here)
                rates["served"].append(rate_there)
    pairs = zip(rates["here"], rates["served"], strict=True)
    return {
        "here": max(rates["here"]),
        "served": max(rates["served"]),
        "share": max(rates["served"]) / max(rates["here"]),
        "median share": statistics.median(there / here for here, there in pairs),
        "same tokens": ours == theirs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"of arithmetic, {', '.join(WORKS)}; by default the first three")
    parser.add_argument("--turns", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    for name in arguments.works or ("arithmetic", "reasoning", "short"):
        with tempfile.TemporaryDirectory() as directory:
            case = embedded() if name == "arithmetic" else of_work(name, Path(directory))
            found = asyncio.run(compare(case, arguments.turns))
        console.print(
            f"{name}: {found['here']:,.0f} tokens/s in this process, {found['served']:,.0f} served: {found['share']:.2f} "
            f"(median {found['median share']:.2f}), {'the same' if found['same tokens'] else 'OTHER'} tokens"
        )


if __name__ == "__main__":
    main()
