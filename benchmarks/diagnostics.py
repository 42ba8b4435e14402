"""What the always-on diagnostics cost: their seconds within the default run's steps.

python benchmarks/diagnostics.py
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console

from groupwise.config import Recipe, find_recipe, load
from groupwise.learner import local
from groupwise.training import loop
from groupwise.training.display import Display
from groupwise.training.records import RunDirectory
from groupwise.training.setup import prepare, resolved

PARTS = ((local, "_examine"), *((loop, name) for name in ("combine", "rollout_metrics", "reward_metrics", "advantage_metrics")))


def main() -> None:
    spent, steps = 0.0, []
    recipe, source = load(find_recipe(None), Recipe, ["training.steps=12", "training.eval_every=12", "training.eval_problems=20"])

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            nonlocal spent
            started = time.perf_counter()
            result = function(*arguments, **named)
            spent += time.perf_counter() - started
            return result

        return run

    with tempfile.TemporaryDirectory() as home:
        ready = prepare(recipe, source)
        run = RunDirectory(Path(home) / "run", ready.tokenizer)
        run.create(resolved(ready))
        trainer = loop.Trainer(ready, run, [Display(Console(quiet=True), recipe.training.steps)])
        patches = [mock.patch.object(module, name, timed(getattr(module, name))) for module, name in PARTS]
        patches.append(mock.patch.object(RunDirectory, "write_tokens", timed(RunDirectory.write_tokens)))
        for patch in patches:
            patch.start()
        for _ in range(recipe.training.steps):
            spent, started = 0.0, time.perf_counter()
            trainer.train_step()
            steps.append((spent, time.perf_counter() - started))
    share = [cost / whole for cost, whole in steps]
    written = [share[0], share[-1]]
    print(f"median step: {statistics.median(share):.2%} of its time; steps that write their tokens: {max(written):.2%}")


if __name__ == "__main__":
    main()
