"""What HTTP costs: completions of one `groupwise serve` against those of the same engine in this process, in turn.

    python benchmarks/serving.py [WORK ...] [--vllm .bench/vllm/bin/python]

Works are those of workloads.py; "arithmetic" is the embedded task: 32 prompts with 16 completions each of arithmetic-base. Each
side has one thread, and the client that asks the server has the process of this script. Prints useful tokens per second, the
fastest of all turns and the median, and whether all tokens are the same. With --vllm, the same of vLLM's server and of vLLM in a
process of its own; they draw other tokens, so that only their speed is compared.
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
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from workloads import WORKS, make

from groupwise.cluster.piece import free_port
from groupwise.config import Recipe
from groupwise.models import LanguageModel, encode_prompt, load_tokenizer
from groupwise.models.loading import model_path, stored_end_tokens
from groupwise.rollouts.base import Request, Sampler, Sampling, requests
from groupwise.rollouts.driver import gather
from groupwise.rollouts.native import NativeSampler
from groupwise.rollouts.remote import NativeServer
from groupwise.rollouts.servers import Published, Unavailable
from groupwise.rollouts.vllm import VllmServer, command
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


@asynccontextmanager
async def vllm_served(case: Case, tokenizer: Any, python: str) -> AsyncIterator[VllmServer]:
    started = f"{python} -m vllm.entrypoints.launchers.api_server.entry"
    cluster = {"vllm": started, "vllm_arguments": ["--max-model-len=512"]}
    recipe, port = Recipe.model_validate({"model": {"path": case.model}, "cluster": cluster}), free_port()
    words, settings = command(recipe, host="127.0.0.1", port=port, gpus=0)
    environment = {**os.environ, **settings, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    process = subprocess.Popen(words, env=environment, start_new_session=True)
    client = VllmServer(f"http://127.0.0.1:{port}", tokenizer, stored_end_tokens(case.model, tokenizer), packs=True)
    client.given.add(Published(directory=Path(), id="default", version=0))
    try:
        while process.poll() is None:
            try:
                await client.health()
                break
            except Unavailable:
                await asyncio.sleep(0.5)
        yield client
        await client.close()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def vllm_here(case: Case, python: str) -> Iterator[Callable[[], float]]:
    """What gives tokens per second of vLLM in a process of its own, each time anew."""
    job = {
        "prompts": [request.prompt.tolist() for request in case.asked],
        "n": case.asked[0].n,
        "max_tokens": case.asked[0].sampling.max_tokens,
        "seeds": [1000 * i for i in range(len(case.asked))],
    }
    script = Path(__file__).with_name("worker_vllm_prompts.py")
    words = [python, str(script), model_path(case.model)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdin is not None and worker.stdout is not None
        lines, ask = iter(worker.stdout), worker.stdin

        def rate() -> float:
            ask.write(json.dumps(job) + "\n")
            ask.flush()
            report = json.loads(next(line for line in lines if line.startswith("REPORT ")).removeprefix("REPORT "))
            return float(report["tokens"] / report["seconds"])

        next(line for line in lines if line.startswith("READY"))
        yield rate
        ask.close()


async def compare_vllm(case: Case, turns: int, python: str) -> dict[str, Any]:
    """As `compare`."""
    rates: dict[str, list[float]] = {"here": [], "served": []}
    with vllm_here(case, python) as here:
        async with vllm_served(case, load_tokenizer(case.model), python) as there:
            for number in range(turns + 1):
                rate_here, (rate_there, _) = here(), await turn(there, case.asked)
                if number:
                    rates["here"].append(rate_here)
                    rates["served"].append(rate_there)
    return summary(rates)


def summary(rates: dict[str, list[float]]) -> dict[str, Any]:
    pairs = zip(rates["here"], rates["served"], strict=True)
    return {
        "here": max(rates["here"]),
        "served": max(rates["served"]),
        "share": max(rates["served"]) / max(rates["here"]),
        "median share": statistics.median(there / here for here, there in pairs),
    }


async def turn(sampler: Sampler | NativeServer | VllmServer, asked: list[Request]) -> tuple[float, list[list[int]]]:
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
    return {**summary(rates), "same tokens": ours == theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"of arithmetic, {', '.join(WORKS)}; by default the first three")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--vllm", metavar="PYTHON", help="the interpreter of vLLM's environment: compare its server as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    for name in arguments.works or ("arithmetic", "reasoning", "short"):
        with tempfile.TemporaryDirectory() as directory:
            case = embedded() if name == "arithmetic" else of_work(name, Path(directory))
            found = asyncio.run(compare(case, arguments.turns))
            vllm = asyncio.run(compare_vllm(case, arguments.turns, arguments.vllm)) if arguments.vllm else None
        console.print(
            f"{name}: {found['here']:,.0f} tokens/s in this process, {found['served']:,.0f} served: {found['share']:.2f} "
            f"(median {found['median share']:.2f}), {'the same' if found['same tokens'] else 'OTHER'} tokens"
        )
        if vllm is not None:
            console.print(
                f"{name}: vLLM: {vllm['here']:,.0f} tokens/s in its process, {vllm['served']:,.0f} served: {vllm['share']:.2f} "
                f"(median {vllm['median share']:.2f})"
            )


if __name__ == "__main__":
    main()
