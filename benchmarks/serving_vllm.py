"""What HTTP costs with vLLM: completions of its server, asked as a run asks it, against vLLM in a process of its own, in turn.

    python benchmarks/serving_vllm.py PYTHON [WORK ...]

PYTHON is the interpreter of vLLM's environment, .bench/vllm/bin/python; works as in serving.py. Each side has one thread, draws
with a seed for each completion, and returns processed log-probabilities; they draw other tokens. Prints useful tokens per second,
the fastest of all turns, the median of the shares, and the CPU time of vLLM's process against that of server and client.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from serving import Case, embedded, of_work
from workloads import WORKS

from groupwise.cluster.piece import free_port
from groupwise.config import Recipe
from groupwise.models import load_tokenizer
from groupwise.models.loading import model_path, stored_end_tokens
from groupwise.rollouts.driver import gather
from groupwise.rollouts.servers import Published, Unavailable
from groupwise.rollouts.vllm import VllmServer, command

Turn = tuple[float, float]
"""Tokens per second, and tokens per second of CPU time."""


def spent(process: psutil.Process) -> float:
    """CPU time of a process and of all that it started."""
    return float(sum(sum(one.cpu_times()[:2]) for one in (process, *process.children(recursive=True))))


@asynccontextmanager
async def served(case: Case, tokenizer: Any, python: str) -> AsyncIterator[tuple[VllmServer, psutil.Process]]:
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
        yield client, psutil.Process(process.pid)
        await client.close()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def here(case: Case, python: str) -> Iterator[Callable[[], Turn]]:
    """What makes all completions in a process of vLLM's own, each time anew."""
    job = {
        "prompts": [request.prompt.tolist() for request in case.asked],
        "n": case.asked[0].n,
        "max_tokens": case.asked[0].sampling.max_tokens,
        "seeds": [1000 * i for i in range(len(case.asked))],
    }
    script = Path(__file__).with_name("worker_vllm_prompts.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with subprocess.Popen(
        [python, str(script), model_path(case.model)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as worker:
        assert worker.stdin is not None and worker.stdout is not None
        lines, ask, process = iter(worker.stdout), worker.stdin, psutil.Process(worker.pid)

        def turn() -> Turn:
            before = spent(process)
            ask.write(json.dumps(job) + "\n")
            ask.flush()
            report = json.loads(next(line for line in lines if line.startswith("REPORT ")).removeprefix("REPORT "))
            return report["tokens"] / report["seconds"], report["tokens"] / (spent(process) - before)

        next(line for line in lines if line.startswith("READY"))
        yield turn
        ask.close()


async def ask(server: VllmServer, case: Case, process: psutil.Process) -> Turn:
    this = psutil.Process()
    cpu, began = spent(process) + sum(this.cpu_times()[:2]), time.perf_counter()
    found = await gather(*(server.generate(request) for request in case.asked))
    seconds, cpu = time.perf_counter() - began, spent(process) + sum(this.cpu_times()[:2]) - cpu
    tokens = sum(len(completion.tokens) for group in found for completion in group)
    return tokens / seconds, tokens / cpu


async def compare(case: Case, turns: int, python: str) -> str:
    found: list[tuple[Turn, Turn]] = []
    with here(case, python) as turn_here:
        async with served(case, load_tokenizer(case.model), python) as (server, process):
            for number in range(turns + 1):
                pair = turn_here(), await ask(server, case, process)
                if number:  # the first warms up
                    found.append(pair)
    best = [max(pair[side][0] for pair in found) for side in (0, 1)]
    share = statistics.median(there[0] / ours[0] for ours, there in found)
    cpu = statistics.median(there[1] / ours[1] for ours, there in found)
    return (
        f"{best[0]:,.0f} tokens/s in its own process, {best[1]:,.0f} served: {best[1] / best[0]:.2f} (median {share:.2f}); "
        f"tokens per second of CPU time: {cpu:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("python", metavar="PYTHON")
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"of arithmetic, {', '.join(WORKS)}; by default the first two")
    parser.add_argument("--turns", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.works or ("arithmetic", "reasoning"):
        with tempfile.TemporaryDirectory() as directory:
            case = embedded() if name == "arithmetic" else of_work(name, Path(directory))
            Console().print(f"{name}: {asyncio.run(compare(case, arguments.turns, arguments.python))}")


if __name__ == "__main__":
    main()
