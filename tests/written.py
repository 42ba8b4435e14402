"""A run directory that grows as training writes it, with numbers made up: for tests of who reads it meanwhile."""

import json
import math
import random
import time
from pathlib import Path
from typing import Any

from groupwise.config import Recipe, dump
from groupwise.files import write_atomically
from groupwise.training.events import Warned
from groupwise.training.events_file import EventsFile
from groupwise.training.metrics_file import MetricsFile
from groupwise.training.segments import Segment, write_segments


class WrittenRun:
    """Writes with the classes that write a run's files. A new one for the same path goes on, as a resume does."""

    def __init__(self, path: Path, *, resume_at: int | None = None, steps: int = 20, **settings: Any) -> None:
        """
        Args:
            resume_at: the step of the checkpoint from which the run goes on; None: it begins.
            settings: of the recipe, as sections.
        """
        self.path, self.random = path, random.Random(time.perf_counter_ns())
        tree = Recipe().model_dump(by_alias=True)
        tree["training"] |= {"steps": steps, "eval_every": 5}
        for section, values in settings.items():
            tree[section] = tree[section] | values if isinstance(values, dict) else values
        (path / "rollouts").mkdir(parents=True, exist_ok=True)
        self.metrics, self.events = MetricsFile(path / "metrics.jsonl"), EventsFile(path / "events.jsonl")
        segments = [Segment(segment=0, first_step=1, recipe=tree)]
        self.last = 0
        self.added = ""
        """What its completions say besides."""
        if resume_at is not None:
            self.metrics.rewind(resume_at, [])
            segments.append(Segment(segment=1, first_step=resume_at + 1, recipe=tree))
            self.last = resume_at
        write_segments(path, segments)
        write_atomically(path / "recipe.toml", dump(tree))

    def step(self) -> int:
        """Write one more step; returns it."""
        self.last += 1
        wave = math.sin(self.last / 7) + 0.1 * self.random.random()
        values = {"reward/mean": 0.5 + 0.1 * wave, "entropy": 0.4 + 0.1 * wave, "clip_fraction": 0.01, "loss": wave}
        values |= {"seconds/rollouts": 0.5 + self.random.random(), "seconds/learner": 0.5, "rollouts/completions": 64.0}
        said = {
            "prompt": "1+1=",
            "answer": "2",
            "completion": f"2 in step {self.last}{self.added}",
            "reward": 1.0,
            "correct": True,
        }
        lines = [
            json.dumps({"rank": rank, **said, "stop": "stop", "tokens": 2, "turns": []}) + "\n" for rank in ("best", "worst")
        ]
        write_atomically(self.path / "rollouts" / f"step-{self.last:06d}.jsonl", "".join(lines), durable=False)
        self.metrics.append(self.last, values)
        return self.last

    def evaluate(self) -> None:
        self.metrics.append(self.last, {"eval/pass@1": 0.3 + 0.5 * self.random.random(), "eval_problems": 100.0})

    def note(self, text: str) -> None:
        self.events.record(Warned(step=self.last, name="entropy", text=text))

    def tear(self) -> None:
        """Leave half a line, as a kill does."""
        with (self.path / "metrics.jsonl").open("ab") as file:
            file.write(b'{"step": 3, "reward/me')
