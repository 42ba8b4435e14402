"""What a run leaves in its directory: recipe.toml, metrics.jsonl, rollouts to read."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from groupwise.config import dump
from groupwise.errors import UserError
from groupwise.types import Group


class RunDirectory:
    """A run's files: recipe.toml, metrics.jsonl, rollouts/, checkpoints/, model/."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_path = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"

    def create(self, recipe: dict[str, Any]) -> None:
        """Raises:
        UserError: the directory holds something already.
        """
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"--out {self.path}: already there and not empty; to go on with a run: --resume {self.path}")
        try:
            (self.path / "rollouts").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {self.path}: {error.strerror}") from error
        self.write_recipe(recipe)

    def write_recipe(self, recipe: dict[str, Any]) -> None:
        (self.path / "recipe.toml").write_text(dump(recipe))

    def rewind(self, step: int) -> None:
        """Forget what was recorded after `step`, which will be done again, and evaluations of it, which may be missing."""
        lines = self.metrics_path.read_text().splitlines(keepends=True) if self.metrics_path.exists() else []
        kept = [line for line in lines if _step_of(line) < step or (_step_of(line) == step and "loss" in json.loads(line))]
        self.metrics_path.write_text("".join(kept))

    def write_metrics(self, step: int, metrics: dict[str, float]) -> None:
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}  # JSON has no NaN
        with self.metrics_path.open("a") as file:
            file.write(json.dumps({"step": step, **finite}) + "\n")

    def write_rollouts(self, step: int, groups: Sequence[Group]) -> None:
        """The best and the worst completion of each group, for a person to read."""
        text = "\n".join(_readable(group) for group in groups)
        (self.path / "rollouts" / f"step-{step:06d}.txt").write_text(text)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError):  # the line that a kill cut short
        return float("inf")


def _readable(group: Group) -> str:
    ranked = sorted(range(len(group.scores)), key=lambda i: group.scores[i].reward)
    lines = [f"=== {group.problem.prompt}   ({group.correct_count} of {len(ranked)} right; answer {group.problem.answer})"]
    for name, i in (("best", ranked[-1]), ("worst", ranked[0])):
        completion, score = group.completions[i], group.scores[i]
        truncated = ", truncated" if completion.stop == "length" else ""
        lines += [f"--- {name}: reward {score.reward:g}{truncated}", completion.text]
    return "\n".join(lines) + "\n"
