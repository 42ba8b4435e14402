"""Whether a long run holds on to anything: memory, file descriptors, threads and processes over 2,000 steps.

    python benchmarks/soak.py [--steps 2000] [--set KEY=VALUE ...]

Runs `groupwise train` on the shipped calculator task with an environment class of a user's, whose calls run in worker processes,
and with evaluations, checkpoints and token records now and then, and reads /proc of the process that trains each time a tenth of
the steps is done. Memory is the resident set of the trainer, and of it and its children together; the growth is from the second
tenth to the last.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ENVIRONMENT = """
import random

class Noise:
    def reset(self, **row):
        pass

    def get_reward(self):
        return random.random()
"""
"""Rewards that always differ, so that every step trains."""
SETTINGS = [
    "rollouts.group_size=4",
    "rollouts.prompts_per_step=4",
    "learner.minibatches=1",
    "learner.learning_rate=1e-6",
    "training.eval_every=200",
    "training.eval_problems=16",
    "training.checkpoint_every=50",
    "training.tokens_every=100",
]


@dataclass(frozen=True, slots=True)
class Sight:
    """What is seen of the process and its children at one moment."""

    step: int
    own_mib: float
    all_mib: float
    descriptors: int
    threads: int
    children: int


def look(process: psutil.Process, step: int) -> Sight:
    children = process.children(recursive=True)
    own = process.memory_info().rss
    return Sight(
        step=step,
        own_mib=own / 2**20,
        all_mib=(own + sum(child.memory_info().rss for child in children)) / 2**20,
        descriptors=process.num_fds(),
        threads=process.num_threads(),
        children=len(children),
    )


def steps_done(run: Path) -> int:
    """The last training step in metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}") and "reward/mean" in line), default=0)


def watch(run: Path, steps: int, settings: list[str]) -> list[Sight]:
    """Run it, and look at it ten times."""
    own = run.with_name("own.py")
    own.write_text(ENVIRONMENT)
    settings = [f"environment.class={own}:Noise", "environment.task_reward=true", *settings]
    overrides = [f"--set={setting}" for setting in [*SETTINGS, f"training.steps={steps}", *settings]]
    command = [sys.executable, "-m", "groupwise", "train", "calculator", "--out", str(run), *overrides]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    trainer, seen = psutil.Process(process.pid), list[Sight]()
    with Progress() as progress:
        bar = progress.add_task("steps", total=steps)
        while process.poll() is None:
            time.sleep(0.2)
            done = steps_done(run)
            progress.update(bar, completed=done)
            if len(seen) < 10 and done >= (len(seen) + 1) * (steps - 2) // 10:
                seen.append(look(trainer, done))
    if process.returncode != 0:
        raise SystemExit(f"the run ended with {process.returncode}")
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        seen = watch(Path(directory) / "run", options.steps, options.set)
        left = [process for process in psutil.process_iter() if directory in " ".join(process.cmdline() or [])]
    table = Table("step", "trainer, MiB", "with children, MiB", "descriptors", "threads", "children")
    for one in seen:
        values = f"{one.own_mib:.1f}", f"{one.all_mib:.1f}", str(one.descriptors), str(one.threads), str(one.children)
        table.add_row(str(one.step), *values)
    console = Console()
    console.print(table)
    first, last = seen[1], seen[-1]
    console.print(
        f"{options.steps} steps in {time.monotonic() - started:.0f} s; from step {first.step} to {last.step} the trainer's "
        f"memory grew by {last.own_mib / first.own_mib - 1:+.1%}, with its children {last.all_mib / first.all_mib - 1:+.1%}; "
        f"{len(left)} processes left"
    )


if __name__ == "__main__":
    main()
