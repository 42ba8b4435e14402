"""Asynchronous against synchronous training: a real run over samplers and a learner whose device times are simulated, beside what
the simulation of `groupwise plan` predicts.

    python benchmarks/async_speed.py [--launcher ray] [--steps 12]

Real: the training loop, the stream of groups or the synchronous collector, the fleet, the wire protocol, the launcher (a local
Ray or plain processes), ledger and metrics. Simulated: synthetic_sampler.py in place of samplers, with heavy-tailed lengths, and
a learner that sleeps. Prediction and run have the same lengths, since both follow from a group's position.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from synthetic_sampler import long_model
from torch import Tensor

from groupwise.cluster.local import LocalLauncher
from groupwise.cluster.piece import Launcher, Piece
from groupwise.cluster.planning.lengths import lognormal
from groupwise.cluster.planning.simulation import Setup, Simulation
from groupwise.config import Recipe
from groupwise.files import Digest
from groupwise.learner.base import TokenRecord
from groupwise.learner.updates import Update
from groupwise.rollouts.attending import Limits
from groupwise.rollouts.fleet import Fleet
from groupwise.rollouts.remote import NativeServer
from groupwise.rollouts.servers import Published
from groupwise.seeding import derive
from groupwise.state import read_state, write_state
from groupwise.training import session
from groupwise.training.ledger import check_run
from groupwise.training.records import RunDirectory
from groupwise.training.setup import Ready
from groupwise.types import Batch, LogprobBatch, Metrics, TrainingBatch, upgrade

HERE = Path(__file__).parent
SAMPLERS, PROMPTS, GROUP = 2, 8, 8
MEAN, VARIATION, MOST = 100.0, 2.0, 1500
MODES = {
    "synchronous": {"staleness": 0, "window": 1},
    "staleness 1": {"staleness": 1, "window": PROMPTS},
    "staleness 4": {"staleness": 4, "window": PROMPTS},
}


class SleepingLearner:
    """A `Learner` without a model: an update takes so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.version = seconds, 0

    def begin_step(self) -> None: ...

    def take_back(self) -> bool:
        return False

    def compute_logprobs(self, batch: Batch) -> tuple[LogprobBatch, dict[str, float]]:
        return upgrade(LogprobBatch, batch, old_logprobs_BT=batch.rollout_logprobs_BT), {"entropy": 1.0}

    def update(self, minibatch: TrainingBatch, record: Callable[[TokenRecord], None] | None = None) -> Update:
        time.sleep(self.seconds)
        self.version += 1
        return Update(
            tokens=int(minibatch.mask_BT.sum()),
            skipped_tokens=0,
            means={},
            largest={},
            step={"loss": 0.0, "grad_norm": 1.0},
            latest={"learning_rate": 0.0, "skipped_updates": 0.0},
        )

    def publish(self, directory: Path) -> None:
        directory.mkdir()

    def probe(self, tokens: Tensor) -> Tensor:
        return torch.zeros(len(tokens) - 1)

    def save(self, directory: Path) -> Mapping[str, Digest]:
        return write_state(directory / "learner", {"version": self.version})

    def load(self, directory: Path) -> None:
        self.version = read_state(directory / "learner")["version"]

    def export(self, directory: Path, tokenizer: Any) -> dict[str, float]:
        directory.mkdir(exist_ok=True)
        return {}


class Pieces:
    """See `groupwise.training.pieces.Pieces`."""

    def __init__(self, fleet: Fleet, seconds: float, weights: Path) -> None:
        self.sampler, self.learner, self.weights = fleet, SleepingLearner(seconds), weights
        self.serials = itertools.count()
        self.brought: list[float] = []
        """When new weights were out."""

    def bring_weights(self) -> None:
        id = f"{next(self.serials):06d}-v{self.learner.version}"
        self.learner.publish(self.weights / id)
        self.sampler.load(Published(directory=self.weights / id, id=id, version=self.learner.version))
        self.brought.append(time.monotonic())

    def restart_learner(self) -> None:
        raise AssertionError("it is in this process")

    def notes(self) -> list[str]:
        return []

    def metrics(self) -> Metrics:
        return self.sampler.metrics()


def launcher_of(name: str, logs: Path, pieces: list[Piece]) -> Launcher:
    if name == "ray":
        from groupwise.cluster.ray import RayLauncher

        return RayLauncher(logs, pieces)
    return LocalLauncher(logs, [])


def run(mode: dict[str, int], arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds per step of a real run, and what its ledger says."""
    changes: dict[str, Any] = {
        "algorithm.name": "grpo", "rollouts.group_size": GROUP, "rollouts.prompts_per_step": PROMPTS,
        "rollouts.max_tokens": MOST, "rollouts.max_rows": 1024, "learner.minibatches": 1, "learner.old_logprobs": "sampler",
        "training.steps": arguments.steps + mode["staleness"] + 1, "training.eval_every": 10_000, "training.eval_problems": 1,
        "training.checkpoint_every": 10_000, "training.tokens_every": 0, "cluster.samplers": SAMPLERS,
        **{f"cluster.{name}": value for name, value in mode.items() if mode["staleness"]},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        out, recipe = Path(directory) / "run", Path(directory) / "empty.toml"
        recipe.write_text("")
        changes["model.path"] = long_model(Path(directory))
        found: list[Pieces] = []

        @contextmanager
        def launch(ready: Ready, run_directory: RunDirectory) -> Iterator[Pieces]:
            options = ["--fixed", arguments.fixed, "--mean", MEAN, "--cv", VARIATION, "--most", MOST]
            command = ["{python}", str(HERE / "synthetic_sampler.py"), "--host", "{host}", "--port", "{port}", *map(str, options)]
            pieces = [Piece(name=f"sampler {index}", command=command) for index in range(SAMPLERS)]
            launcher = launcher_of(arguments.launcher, run_directory.path / "logs", pieces)
            try:
                at = [launcher.start(piece) for piece in pieces]
                connect = lambda url: NativeServer(url, ready.tokenizer)  # noqa: E731
                limits = Limits(timeout=120, max_restarts=0)
                with Fleet(at, connect, limits=limits, most_rows=ready.recipe.rollouts.max_rows, tell=print) as fleet:
                    found.append(Pieces(fleet, arguments.learn, Path(directory)))
                    found[0].bring_weights()
                    yield found[0]
            finally:
                launcher.stop()

        session.run(session.plan(recipe, changes=changes, out=out), Console(file=sys.stderr), launch=launch)
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        ages = [record.get("cluster/age_max", 0.0) for record in records]
        steps = np.diff(found[0].brought)[mode["staleness"] + 1 :]
        return {"seconds": float(np.mean(steps)), "age": max(ages), "ledger problems": len(check_run(out))}


def predict(mode: dict[str, int], arguments: argparse.Namespace) -> float:
    """Seconds per step in the simulation, with the same lengths."""
    draw, positions = lognormal(MEAN, VARIATION, MOST), itertools.count()

    def lengths(_: np.random.Generator, count: int) -> Any:
        return draw(np.random.default_rng(derive(Recipe().seed, "rollouts", next(positions))), count)

    setup = Setup(
        samplers=SAMPLERS,
        rows=1024,
        prompts=PROMPTS,
        group=GROUP,
        step_seconds=lambda _: arguments.fixed,
        learn_seconds=lambda _: arguments.learn,
        **mode,
    )
    return Simulation(setup, lengths).run(arguments.steps + mode["staleness"] + 1).seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launcher", choices=["local", "ray"], default="ray")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--fixed", type=float, default=0.01, help="Seconds of a decoding step.")
    parser.add_argument("--learn", type=float, default=3.0, help="Seconds of a training step.")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--predict", action="store_true", help="Only that.")
    arguments = parser.parse_args()
    table = Table("", "predicted s/step", "measured s/step", "measured / predicted", "steps per hour", "age", "ledger problems")
    for name in arguments.modes:
        expected = predict(MODES[name], arguments)
        if arguments.predict:
            table.add_row(name, f"{expected:.2f}")
            continue
        found = run(MODES[name], arguments)
        ratio = found["seconds"] / expected
        cells = f"{expected:.2f}", f"{found['seconds']:.2f}", f"{ratio:.3f}", f"{3600 / found['seconds']:,.0f}"
        table.add_row(name, *cells, f"{found['age']:.0f}", f"{found['ledger problems']:.0f}")
        Console(stderr=True).print(table)
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
