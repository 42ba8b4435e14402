"""Runs of several processes while these are killed and frozen at random: does each end as if nothing had happened?

    python benchmarks/cluster_faults.py [--steps 45] [--kills 20] [--freezes 5] [--learners 3] [--controllers 1] [--seed 0]
        [--mode synchronous asynchronous] [--samplers 2] [--out DIR] [--set KEY=VALUE ...]

Runs `groupwise train` with two native samplers and a learner in processes of their own, and strikes at a random moment of every
other step or so: samplers are killed (SIGKILL) or frozen (SIGSTOP), the learner is killed, and the controller itself, whose run
is then resumed. Reports what was struck, whether the run ended with all of its steps, whether its ledger shows each group used up
exactly once, whether a synchronous run has the weights of an undisturbed run in one process, and whether any process is left.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from groupwise.training import ledger

SETTINGS = [
    "algorithm.name=grpo",
    "rollouts.group_size=4",
    "rollouts.prompts_per_step=4",
    "rollouts.max_tokens=32",
    "learner.minibatches=2",
    "training.eval_every=1000",
    "training.eval_problems=16",
    "training.checkpoint_every=3",
    "training.tokens_every=0",
]
ASYNCHRONOUS = ["cluster.staleness=2"]
KINDS = ("sampler killed", "sampler frozen", "learner killed", "controller killed")
LIMIT = 3600.0
"""Seconds for a run."""
ENDED = 10.0
"""Seconds within which nothing may be left of a controller that was killed."""


@dataclass
class Found:
    """What became of a run."""

    mode: str
    struck: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    seconds: float = 0.0
    steps: int = 0
    starts: dict[str, int] = field(default_factory=dict)
    """Of each process, from its log."""
    asked_again: int = 0
    """Groups of which some request was sent more than once."""
    most_stale: float = 0.0
    """Steps."""
    ledger: list[str] = field(default_factory=list)
    """What contradicts that each group is used up once."""
    same_weights: bool | None = None
    """As an undisturbed run; None: an asynchronous run need not."""
    left: int = 0
    """Processes, at the end and after the controller's death."""
    exit_code: int | None = None


def pieces_of(run: Path, kind: str = "") -> list[psutil.Process]:
    """Processes of a run whose command has this word, but for their keepers and for what is being waited for."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        ours = any(f"groupwise-{run.name}-" in word for word in words) and not any("keeper.py" in word for word in words)
        if ours and process.info["status"] != psutil.STATUS_ZOMBIE and (not kind or kind in words):
            found.append(process)
    return found


def last_step(run: Path) -> int:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}") and '"seconds/learner"' in line]
    return max(steps, default=0)


class Campaign:
    """One run, and what is done to it."""

    def __init__(self, run: Path, mode: str, arguments: argparse.Namespace) -> None:
        self.run, self.arguments, self.found = run, arguments, Found(mode)
        self.random = random.Random(f"{arguments.seed} {mode}")
        self.output = run.with_suffix(".output")
        changes = [f"cluster.samplers={arguments.samplers}", "cluster.learners=1", f"cluster.timeout={arguments.timeout}"]
        changes += ASYNCHRONOUS if mode == "asynchronous" else []
        self.settings = [f"training.steps={arguments.steps}", *SETTINGS, *changes, *arguments.set]
        self.controller = self.start("--out", str(run), *(word for item in self.settings for word in ("--set", item)))

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with self.output.open("ab") as output:
            return subprocess.Popen([sys.executable, "-m", "groupwise", "train", *arguments], stdout=output, stderr=output)

    def carry_out(self) -> Found:
        began = time.monotonic()
        asked = self.arguments
        counts = asked.kills, asked.freezes, asked.learners, asked.controllers
        strikes = [kind for kind, count in zip(KINDS, counts, strict=True) for _ in range(count)]
        self.random.shuffle(strikes)
        for kind in strikes:
            if not self.wait_for_a_step(began):
                break
            time.sleep(self.random.uniform(0, asked.spread))
            if self.strike(kind):
                self.found.struck[kind] += 1
        self.found.exit_code = self.controller.wait(max(1.0, LIMIT - (time.monotonic() - began)))
        self.found.seconds = time.monotonic() - began
        return self.look()

    def wait_for_a_step(self, began: float) -> bool:
        """Until a step is done, or undone. False: the run has ended."""
        before = last_step(self.run)
        while last_step(self.run) == before:
            if self.controller.poll() is not None:
                return False
            if time.monotonic() - began > LIMIT:
                self.controller.kill()
                return False
            time.sleep(0.05)
        return True

    def strike(self, kind: str) -> bool:
        """Whether there was something to strike at."""
        if kind == "controller killed":
            self.controller.kill()
            self.controller.wait()
            deadline = time.monotonic() + ENDED
            while (left := pieces_of(self.run)) and time.monotonic() < deadline:
                time.sleep(0.1)
            self.found.left += len(left)
            self.controller = self.start("--resume", str(self.run))
            return True
        name = "groupwise.cluster.learner_process" if kind.startswith("learner") else "serve"
        while not (running := [one for one in pieces_of(self.run, name) if one.info["status"] != psutil.STATUS_STOPPED]):
            if self.controller.poll() is not None:
                return False
            time.sleep(0.1)  # all of them are being started again
        number = signal.SIGSTOP if kind.endswith("frozen") else signal.SIGKILL
        try:
            self.random.choice(running).send_signal(number)
        except psutil.NoSuchProcess:
            return False
        return True

    def look(self) -> Found:
        found = self.found
        found.steps = last_step(self.run)
        found.ledger = ledger.check_run(self.run)
        entries = list(ledger.entries((self.run / ledger.LEDGER).read_bytes()))
        found.asked_again = sum(len(entry.attempts) for entry in entries)
        metrics = map(json.loads, (self.run / "metrics.jsonl").read_text().splitlines())
        found.most_stale = max((line.get("cluster/age_max", 0.0) for line in metrics), default=0.0)
        for log in sorted((self.run / "logs").glob("*.log")):
            found.starts[log.stem] = log.read_text(errors="replace").count("--- started")
        time.sleep(1)
        found.left += len(pieces_of(self.run))
        return found


def same_weights(run: Path, other: Path) -> bool:
    ours, theirs = (load_file(next((at / "model").glob("*.safetensors"))) for at in (run, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def undisturbed(out: Path, arguments: argparse.Namespace) -> Path:
    """The run in one process."""
    run = out / "undisturbed"
    settings = [f"training.steps={arguments.steps}", *SETTINGS, *arguments.set]
    words = [word for item in settings for word in ("--set", item)]
    with run.with_suffix(".output").open("wb") as output:
        subprocess.run([sys.executable, "-m", "groupwise", "train", "--out", str(run), *words], check=True, stdout=output)
    return run


def table_of(found: list[Found], arguments: argparse.Namespace) -> Table:
    table = Table("", *(item.mode for item in found))
    rows = {
        "samplers killed": [item.struck["sampler killed"] for item in found],
        "samplers frozen": [item.struck["sampler frozen"] for item in found],
        "learners killed": [item.struck["learner killed"] for item in found],
        "controllers killed": [item.struck["controller killed"] for item in found],
        "exit code": [item.exit_code for item in found],
        "steps": [f"{item.steps} of {arguments.steps}" for item in found],
        "seconds": [f"{item.seconds:.0f}" for item in found],
        "starts of processes": [sum(item.starts.values()) for item in found],
        "most stale groups, steps": [f"{item.most_stale:.0f}" for item in found],
        "groups asked for again": [item.asked_again for item in found],
        "contradictions in the ledger": [len(item.ledger) for item in found],
        "weights of an undisturbed run": [item.same_weights for item in found],
        "processes left": [item.left for item in found],
    }
    for name, values in rows.items():
        table.add_row(name, *map(str, values))
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--freezes", type=int, default=5)
    parser.add_argument("--learners", type=int, default=3)
    parser.add_argument("--controllers", type=int, default=1)
    parser.add_argument("--samplers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=10.0)
    parser.add_argument("--spread", type=float, default=1.0, help="Seconds after a step within which the strike comes.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", nargs="+", choices=["synchronous", "asynchronous"], default=["synchronous", "asynchronous"])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    out = arguments.out or Path(tempfile.mkdtemp(prefix="cluster-faults-"))
    out.mkdir(parents=True, exist_ok=True)
    reference = undisturbed(out, arguments) if "synchronous" in arguments.mode else None
    found = []
    for mode in arguments.mode:
        item = Campaign(out / mode, mode, arguments).carry_out()
        if reference is not None and mode == "synchronous" and item.exit_code == 0:
            item.same_weights = same_weights(out / mode, reference)
        found.append(item)
        (out / "found.json").write_text(json.dumps([asdict(item) for item in found], indent=1))
    Console().print(table_of(found, arguments))
    print(f"the runs are in {out}")
    good = [
        item.exit_code == 0
        and item.steps == arguments.steps
        and not item.ledger
        and item.same_weights is not False
        and not item.left
        for item in found
    ]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
