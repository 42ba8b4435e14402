"""How far a run is, whether anybody works in it, and how long it will take: from its directory alone, on any machine."""

import math
import os
import re
import socket
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from groupwise.evidence.places import is_directory
from groupwise.evidence.runs import Run
from groupwise.evidence.shapes import Status
from groupwise.files import present

State = Literal["beginning", "training", "silent", "finished", "stopped", "gone"]
RECENT = 15
"""Over how many of the last steps times are measured."""
PATIENCE, LEAST_PATIENCE = 5.0, 60.0
"""A run is silent after so many times the longest that a step takes, and after no fewer seconds."""
GIVEN_UP = 86_400.0
"""Seconds after which a run of another machine, of which nobody can say whether it lives, counts as stopped."""
WRITTEN = ("metrics.jsonl", "events.jsonl", "segments.jsonl", "recipe.toml", "rollouts", "checkpoints", ".lock")
"""What a run writes now and then; the latest tells when it last did something."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds by the clock."""

    step: float | None
    """Of a step without an evaluation after it; None: not known."""
    evaluation: float
    """Of an evaluation; 0: not known."""


def status(run: Run, now: float) -> Status:
    """How far a run is.

    Args:
        now: seconds since 1970.
    """
    training = run.recipe.get("training", {})
    steps, every = _count(training.get("steps")), _count(training.get("eval_every"))
    last, written = run.last_step, last_written(run.path)
    pace = measured_pace(run, every)
    state = _state(run, steps, every, pace, written, now)
    left = None
    if state in ("training", "silent") and pace.step is not None and steps:
        due = sum(step % every == 0 or step == steps for step in range(last + 1, steps + 1)) if every else 0
        whole = max(0, steps - last) * pace.step + due * pace.evaluation
        left = max(0.0, whole - max(0.0, now - (written or now)))
    return {
        "state": state,
        "step": last,
        "steps": steps,
        "seconds_left": left,
        "seconds_per_step": pace.step,
        "since": datetime.fromtimestamp(written, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if written else "",
    }


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**53 else 0


def _state(run: Run, steps: int, every: int, pace: Pace, written: float | None, now: float) -> State:
    if not is_directory(run.path):
        return "gone"
    works = works_there(run.path)
    if _exported(run.path) and (run.last_step >= steps if steps else not works):
        return "finished"
    if works is False:
        return "stopped"
    quiet = now - written if written is not None else math.inf
    if works is None and quiet > GIVEN_UP:
        return "stopped"
    if not run.last_step and not run.evaluations:
        return "beginning"
    evaluates = _evaluation_due(run, steps, every)
    if pace.step is None or (evaluates and (works or not pace.evaluation)):  # nobody can say how long it may take
        return "training"
    return "silent" if quiet > max(LEAST_PATIENCE, PATIENCE * (pace.step + pace.evaluation)) else "training"


def _exported(path: Path) -> bool:
    try:
        return present(path / "model").is_dir()
    except OSError:
        return False


def _evaluation_due(run: Run, steps: int, every: int) -> bool:
    """Whether an evaluation, or after the last one the export of the model, comes next."""
    last = run.last_step
    if steps and last >= steps:
        return True
    evaluated = run.evaluations.last_step if run.evaluations else -1
    return every > 0 and last % every == 0 and evaluated < last


def last_written(path: Path) -> float | None:
    """When a run last wrote something, in seconds since 1970; None: not known."""
    times = [time for name in WRITTEN if (time := _modified(path / name)) is not None]
    return max(times, default=None)


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def works_there(path: Path) -> bool | None:
    """Whether a process trains in a run's directory; None: it was one of another machine, or it is not known.

    It reads who has the lock and does not try to take it: a run that is just starting would find it taken.
    """
    try:
        owner = re.fullmatch(r"pid (\d{1,9}) on (\S{1,300})\n?", (path / ".lock").read_text("utf-8", "replace")[:400])
    except FileNotFoundError:
        return False if path.is_dir() else None  # a copy of a run, or one of an earlier version
    except OSError:
        return None
    if owner is None or owner[2] != socket.gethostname():
        return None
    try:
        os.kill(int(owner[1]), 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def measured_pace(run: Run, every: int) -> Pace:
    """How long steps and evaluations take by the clock, as the files of the last steps tell: a run writes `rollouts/step-N` when a
    step is done. Copied files can have any time; then a step takes what its record says, without evaluations."""
    recorded = [value for name in ("seconds/rollouts", "seconds/learner") if (value := _recent_mean(run, name)) is not None]
    own = sum(recorded) if recorded else None
    first = max(1, run.last_step - max(RECENT, every))
    wanted = sorted({*range(max(1, run.last_step - RECENT), run.last_step + 1), *_evaluated(first, run.last_step, every)})
    times = {step: time for step in wanted if (time := _modified(run.path / "rollouts" / f"step-{step:06d}.jsonl")) is not None}
    gaps = [(step, times[step] - times[step - 1]) for step in times if step - 1 in times]
    plain = [gap for step, gap in gaps if not every or (step - 1) % every]
    with_evaluation = [gap for step, gap in gaps if every and (step - 1) % every == 0]
    step_seconds = statistics.median(plain) if plain else own
    if own is not None and step_seconds is not None and step_seconds < 0.2 * own:
        return Pace(own, 0.0)
    evaluation = statistics.median(with_evaluation) - (step_seconds or 0.0) if with_evaluation else 0.0
    return Pace(step_seconds, max(0.0, evaluation))


def _evaluated(first: int, last: int, every: int) -> Sequence[int]:
    """Steps before and after the last evaluations."""
    return (
        [] if not every else [step for at in range(last - last % every, first - 1, -every)[:3] for step in (at, at + 1) if step]
    )


def _recent_mean(run: Run, name: str) -> float | None:
    value = run.last(name, RECENT)
    return value if math.isfinite(value) else None
