"""kill -9 at chosen file operations and at random instants; the run is then resumed to its end and compared."""

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fault_injection.checks import WRITES, Reference, differences, lost, unclean
from fault_injection.preload import Fault, Operation
from fault_injection.server import Server

KINDS = {"run": 0.35, "checkpoint": 0.25, "resume": 0.25, "instant": 0.15}
"""Kind of trial -> its share. Killed at operations of the run, those in checkpoints/ apart; of a resume; at random instants."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One trial."""

    kind: str
    at: int = 0
    """The operation before which the process dies."""
    half: bool = False
    """Where it is a write: half of it is done."""
    after: float = 0.0
    """Seconds after which it dies instead, in a trial of the kind "instant"."""
    second: float | None = None
    """Kill the resumed run, too, after this share of as many operations as the whole run has."""
    same_command: bool = False
    """Where there is no checkpoint: begin again with the same command, and not with --resume."""

    def __str__(self) -> str:
        first = f"after {self.after:.3f} s" if self.kind == "instant" else str(Fault(action="kill", at=self.at, half=self.half))
        again = "" if self.second is None else f", again at {self.second:.0%} of the resume"
        return f"{first}{again}{', begun again with the same command' if self.same_command else ''}"


def points(done: Sequence[Operation], *, checkpoints: bool | None = None) -> list[int]:
    """Operations to kill at. Of successive writes to one file only the first and the last: those between are like them.

    Args:
        checkpoints: only those in checkpoints/, or only the others.
    """
    found = []
    for i, one in enumerate(done):
        inner = 0 < i < len(done) - 1 and all(other.name in WRITES and other.path == one.path for other in done[i - 1 : i + 2])
        if not inner and checkpoints in (None, one.place.startswith("checkpoints")):
            found.append(i)
    return found


def spread(items: Sequence[int], count: int, rng: random.Random) -> list[int]:
    """`count` of the items, evenly spread; each of them, and some more than once, where they are fewer."""
    offset = rng.random()
    return [items[int((i + offset) * len(items) / count)] for i in range(count)] if items else []


def plan(reference: Reference, count: int, rng: random.Random) -> list[Kill]:
    """So many trials, of all kinds."""
    numbers = {kind: round(count * share) for kind, share in KINDS.items()}
    numbers["instant"] += count - sum(numbers.values())
    places = {
        "run": points(reference.operations, checkpoints=False),
        "checkpoint": points(reference.operations, checkpoints=True),
        "resume": points(reference.resuming),
    }
    trials = []
    for kind, items in places.items():
        for at in spread(items, numbers[kind], rng):
            second = rng.random() if rng.random() < 0.25 else None
            trials.append(
                Kill(
                    kind=kind, at=at, half=rng.random() < 0.5, second=second, same_command=kind != "resume" and rng.random() < 0.5
                )
            )
    instants = [Kill(kind="instant", after=rng.random() * reference.seconds) for _ in range(numbers["instant"])]
    return trials + instants


def every(reference: Reference) -> list[Kill]:
    """Each operation in turn, of the run and of the resume; of writes the half, too."""
    trials = []
    for kind, done in (("run", reference.operations), ("resume", reference.resuming)):
        for at in points(done):
            halves = (False, True) if done[at].name in WRITES else (False,)
            kinds = "checkpoint" if kind == "run" and done[at].place.startswith("checkpoints") else kind
            trials += [Kill(kind=kinds, at=at, half=half) for half in halves]
    return trials


def carry_out(server: Server, reference: Reference, trial: Kill, run: Path) -> list[str]:
    """Kill, resume until it is done; what is wrong then."""
    shutil.rmtree(run, ignore_errors=True)
    begin = ["train", reference.recipe, "--out", run]
    resume = ["train", "--resume", run]
    problems: list[str] = []
    command: list[str | Path] = begin
    if trial.kind == "resume":
        shutil.copytree(reference.halfway, run)
        command = resume
    faults = [Fault(action="kill", at=trial.at, half=trial.half)]
    if trial.kind == "instant":
        faults = [Fault()]
    if trial.second is not None:
        faults.append(Fault(action="kill", at=int(trial.second * len(reference.operations))))
    for fault in [*faults, Fault()]:
        timer = trial.after if trial.kind == "instant" and fault is faults[0] else None
        outcome = server.run(command, run, fault, kill_after=timer)
        problems += unclean(outcome)
        if outcome.code == 0:
            break
        if outcome.code != -9:
            last = outcome.output.strip().splitlines()[-1:]
            return [*problems, f"{' '.join(map(str, command[:2]))}: exit code {outcome.code}: {last}"]
        done = outcome.operations[: fault.at] if fault.action == "kill" else outcome.operations  # the last was logged, not done
        problems += lost(run, reference.halfway if trial.kind == "resume" else None, done)
        begun = (run / "recipe.toml").is_file()
        again = not any((run / "checkpoints").glob("step-*")) and (trial.same_command or not begun)
        command = begin if again else resume
    return problems + (list(differences(run, reference).values()) if outcome.code == 0 else ["it never ended"])
