"""What the controller does for each group at the scale of 1,024 GPUs: CPU time, messages, memory; samplers are synthetic.

    python benchmarks/controller_load.py [--groups 256] [--members 768] [--tokens 3000]

The controller is the real one: `Stream` (admission, problems, scores), `Fleet` (HTTP, health, dispatch) and ledger. Samplers are
one process of synthetic_sampler.py, which the fleet sees as many servers. Counted is this process's CPU time alone.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from synthetic_sampler import long_model

from groupwise.cluster.piece import free_port
from groupwise.config import Recipe, load
from groupwise.rollouts.attending import Limits
from groupwise.rollouts.fleet import Fleet
from groupwise.rollouts.remote import NativeServer
from groupwise.rollouts.servers import Published, Unavailable
from groupwise.training.ledger import Entry, Ledger
from groupwise.training.setup import Ready, prepare
from groupwise.training.stream import Stream

HERE = Path(__file__).parent


@contextmanager
def synthetic_sampler(*arguments: object) -> Iterator[str]:
    """Its address."""
    port = free_port("127.0.0.1")
    command = [sys.executable, str(HERE / "synthetic_sampler.py"), "--port", str(port), *map(str, arguments)]
    process = subprocess.Popen(command)
    try:
        address = f"http://127.0.0.1:{port}"
        asyncio.run(_answers(address))
        yield address
    finally:
        process.terminate()
        process.wait()


async def _answers(address: str) -> None:
    """Wait until it does."""
    server = NativeServer(address, None)
    while True:
        try:
            await server.health()
            break
        except Unavailable:
            await asyncio.sleep(0.1)
    await server.close()


def ready_of(prompts: int, group: int, tokens: int, staleness: int) -> Ready:
    changes: dict[str, Any] = {
        "algorithm.name": "grpo", "rollouts.group_size": group, "rollouts.prompts_per_step": prompts,
        "rollouts.max_tokens": tokens, "training.steps": 10_000, "training.eval_problems": 4, "cluster.samplers": 1,
        "cluster.staleness": staleness, "cluster.window": prompts,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "empty.toml").write_text("")
        changes["model.path"] = long_model(Path(directory))
        return prepare(*load(Path(directory) / "empty.toml", Recipe, (), changes))


def rss() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096.0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    prompts, group, tokens = arguments.groups, arguments.group_size, arguments.tokens
    options = ["--mean", tokens, "--cv", 0, "--most", tokens, "--vocabulary", 150_000]
    with synthetic_sampler(*options) as address, tempfile.TemporaryDirectory() as directory:
        ready = ready_of(prompts, group, tokens, arguments.staleness)
        limits = Limits(timeout=60, max_restarts=0)
        addresses = [address] * arguments.members
        connect = lambda url: NativeServer(url, ready.tokenizer)  # noqa: E731
        with Fleet(addresses, connect, limits=limits, most_rows=64, tell=print) as fleet:
            started, cpu = time.perf_counter(), time.process_time()
            fleet.load(Published(directory=Path(directory), id="0", version=0))
            loading = time.perf_counter() - started, time.process_time() - cpu
            cpu = time.process_time()
            time.sleep(arguments.idle)
            idle = (time.process_time() - cpu) / arguments.idle
            stream, ledger = (
                Stream(ready.rollouts(fleet), ready.recipe, ready.algorithm),
                Ledger(Path(directory) / "ledger.jsonl"),
            )
            before, started, cpu, groups, most = rss(), time.perf_counter(), time.process_time(), 0, 0.0
            for step in range(arguments.steps):
                stream.begin_step()
                collected = stream.collect(step)
                groups += len(collected.groups)
                ledger.append(Entry.of(step + 1, collected))
                most = max(most, rss() - before)
                held = len(collected.frontier.finished) + len(collected.groups)
                stream.publish(step + 1)
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
            stream.close()
            size = ledger.path.stat().st_size / arguments.steps
    return {
        "members": arguments.members,
        "groups of a batch": prompts,
        "tokens of a group": group * tokens,
        "groups": groups,
        "groups/s": groups / seconds,
        "CPU s per group": cpu / groups,
        "cores": cpu / seconds,
        "MB held": most / 1e6,
        "groups held": held,
        "ledger bytes per step": size,
        "CPU of health, cores": idle,
        "load of all members, s": loading[0],
        "load of all members, CPU s": loading[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=64, help="Of a batch.")
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=3000, help="Of a completion.")
    parser.add_argument("--members", type=int, default=768)
    parser.add_argument("--staleness", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--idle", type=float, default=10.0)
    Console(highlight=False).print(json.dumps(measure(parser.parse_args()), indent=1))


if __name__ == "__main__":
    main()
