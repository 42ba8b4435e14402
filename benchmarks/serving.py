"""What HTTP costs: completions of one `groupwise serve` against those of the same engine in this process, in turn.

    python benchmarks/serving.py [WORK ...]

Works are those of workloads.py; "arithmetic" is the embedded task: 32 prompts with 16 completions each of arithmetic-base. Each
side has one thread, and the client that asks the server has the process of this script. Prints useful tokens per second, the
fastest of all turns and the median, whether all tokens are the same, and the CPU time of one process against that of both, which
says more on a machine that others use too.
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

import psutil
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
async def served(model: str, tokenizer: Any) -> AsyncIterator[tuple[NativeServer, psutil.Process]]:
    command = [sys.executable, "-m", "groupwise", "serve", model, "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "999"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        client = NativeServer(process.stdout.readline().rpartition(" ")[2].strip(), tokenizer)
        client.given.add(Published(directory=Path(), id="0", version=0))
        yield client, psutil.Process(process.pid)
        await client.close()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


@dataclass(frozen=True)
class Turn:
    """One rollout batch."""

    tokens: list[list[int]]
    seconds: float
    cpu_seconds: float
    """Of the processes that took part."""

    @property
    def rate(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds


async def turn(sampler: Sampler | NativeServer, asked: list[Request], processes: list[psutil.Process]) -> Turn:
    def spent() -> float:
        return float(sum(sum(process.cpu_times()[:2]) for process in processes))

    cpu, began = spent(), time.perf_counter()
    found = await gather(*(sampler.generate(request) for request in asked))
    seconds, cpu = time.perf_counter() - began, spent() - cpu
    return Turn([completion.tokens.tolist() for group in found for completion in group], seconds, cpu)


async def compare(case: Case, turns: int) -> str:
    tokenizer = load_tokenizer(case.model)
    here = NativeSampler(LanguageModel.load(case.model), tokenizer)
    found: list[tuple[Turn, Turn]] = []
    async with served(case.model, tokenizer) as (there, process):
        this = psutil.Process()
        for number in range(turns + 1):
            pair = await turn(here, case.asked, [this]), await turn(there, case.asked, [this, process])
            if number:  # the first warms up
                found.append(pair)
    best_here, best_there = (max(pair[i].rate for pair in found) for i in range(2))
    median = statistics.median(there.rate / here.rate for here, there in found)
    cpu_here, cpu_there = (sum(pair[i].cpu_seconds for pair in found) for i in range(2))
    same = all(here.tokens == there.tokens for here, there in found)
    return (
        f"{best_here:,.0f} tokens/s in this process, {best_there:,.0f} served: {best_there / best_here:.2f} "
        f"(median {median:.2f}); CPU time {cpu_here / cpu_there:.2f}; {'the same' if same else 'OTHER'} tokens"
    )


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
            console.print(f"{name}: {asyncio.run(compare(case, arguments.turns))}", soft_wrap=True)


if __name__ == "__main__":
    main()
