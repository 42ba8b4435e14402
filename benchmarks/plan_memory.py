"""Predicted against measured peak memory, for four sizes of model, on this CPU: what `groupwise plan` says a process takes.

    python benchmarks/plan_memory.py [--sizes 10M 30M] [--works learner sampler] [--out FILE]

Each measurement is a process of its own, with random weights: its peak resident memory minus what it held after all imports and
one step of a tiny model, which loads code and compiles kernels.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from worker_groupwise import SETTINGS, Step
from workloads import Work, new_model, peak_mib, prompts, tokenizer

HERE = Path(__file__).parent
SIZES = {
    "10M": Work(8, 32, 8, 48, vocabulary=8192, hidden=256, layers=8, heads=4, mlp=1024, micro_batch_tokens=1024),
    "30M": Work(8, 32, 8, 48, vocabulary=16384, hidden=384, layers=10, heads=6, mlp=1536, micro_batch_tokens=1024),
    "100M": Work(4, 32, 8, 48, vocabulary=32768, hidden=640, layers=12, heads=10, kv_heads=5, mlp=2560, micro_batch_tokens=768),
    "250M": Work(4, 32, 8, 48, vocabulary=32768, hidden=1024, layers=13, heads=16, kv_heads=8, mlp=4096, micro_batch_tokens=768),
}
TINY = Work(2, 8, 4, 8, vocabulary=64, hidden=64, layers=2, heads=1, mlp=64)
WORKS = ("learner", "learner, checkpointing", "learner, bfloat16", "sampler")


def recipe_of(work: Work, kind: str) -> Any:
    """The recipe that the worker's settings amount to."""
    from groupwise.config import Recipe

    return Recipe.model_validate(
        {
            "rollouts": {"group_size": work.group_size, "prompts_per_step": work.prompts, "max_tokens": work.max_tokens},
            "learner": {
                "micro_batch_tokens": work.micro_batch_tokens,
                "minibatches": 1,
                "checkpointing": "checkpointing" in kind,
                "precision": "bfloat16" if "bfloat16" in kind else "float32",
            },
        }
    )


def predicted(work: Work, kind: str) -> dict[str, float]:
    """MiB, by part, with their sum as "peak"."""
    from groupwise.cluster.planning.memory import Load, Needs, learner_memory, sampler_memory
    from groupwise.cluster.planning.shape import shape_of

    with torch.device("meta"):
        shape = shape_of(new_model(work, "meta").config)
    load = Load(
        prompts=work.prompts,
        group=work.group_size,
        prompt_tokens=work.prompt_tokens,
        longest_prompt=work.prompt_tokens,
        tokens=mean_tokens(work, kind),
        max_tokens=work.max_tokens,
    )
    recipe = recipe_of(work, kind)
    if kind == "sampler":
        rows = work.prompts * work.group_size
        memory = sampler_memory(shape, recipe, load, rows=rows, prompts=work.prompts, gpu=False)
    else:
        memory = learner_memory(shape, recipe, Needs(), load, gpu=False)
    return {name: size / 2**20 for name, size in {**memory.parts, "peak": memory.peak}.items()}


def mean_tokens(work: Work, kind: str) -> float:
    return float(work.max_tokens) if kind == "sampler" else 0.75 * work.max_tokens


def measure(work: Work, kind: str) -> float:
    """MiB, in this process."""
    torch.set_num_threads(1)
    run(TINY, kind)
    before = rss_mib()
    run(work, kind)
    return peak_mib() - before


def rss_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def run(work: Work, kind: str) -> None:
    """Two rollout batches generated, or two made-up ones learnt from: with the second the optimiser's moments are there."""
    if kind == "sampler":
        step = Step(
            replace(work, endless=True),
            new_model(replace(work, endless=True)),
            tokenizer(replace(work, endless=True)),
            prompts(work),
        )
        for _ in range(2):
            step.sample()
        return
    settings = recipe_of(work, kind).learner
    SETTINGS.update(checkpointing=settings.checkpointing)
    step = Step(replace(work, precision=settings.precision), new_model(work), tokenizer(work), prompts(work))
    random = torch.Generator().manual_seed(0)
    for _ in range(2):
        step.learner.update(step.batch([made_up(work, random) for _ in range(work.prompts)]))


def made_up(work: Work, random: torch.Generator) -> tuple[Any, ...]:
    """A group of completions of half to all of `max_tokens` random tokens."""
    from groupwise.types import Completion

    lengths = torch.randint(work.max_tokens // 2, work.max_tokens + 1, (work.group_size,), generator=random).tolist()
    lengths[0] = work.max_tokens
    return tuple(
        Completion(
            text="",
            tokens=torch.randint(2, work.vocabulary, (length,), generator=random),
            logprobs=torch.full((length,), -5.0),
            mask=torch.ones(length, dtype=torch.bool),
            stop="stop",
            versions=(),
        )
        for length in lengths
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--out", type=Path, help="Write the table as JSON.")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(SIZES[arguments.one[0]], arguments.one[1])))
        return
    console, rows = Console(highlight=False), []
    table = Table("model", "work", "predicted MiB", "measured MiB", "predicted / measured", title="Peak memory")
    for size in arguments.sizes:
        for kind in arguments.works:
            found = subprocess.run([sys.executable, __file__, "--one", size, kind], capture_output=True, text=True, check=True)
            measured, parts = json.loads(found.stdout), predicted(SIZES[size], kind)
            rows.append(SimpleNamespace(size=size, kind=kind, measured=measured, parts=parts).__dict__)
            table.add_row(size, kind, f"{parts['peak']:,.0f}", f"{measured:,.0f}", f"{parts['peak'] / measured:.2f}")
            console.print({name: round(value, 1) for name, value in parts.items()})
            if arguments.out:
                arguments.out.write_text(json.dumps(rows, indent=1))
    console.print(table)


if __name__ == "__main__":
    main()
