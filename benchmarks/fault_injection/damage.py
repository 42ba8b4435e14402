"""Damage to the files of a run that was killed halfway, and foreign files beside them; the run is then resumed.

What may come of it: the damage is named and the command refused (exit code 2, nothing changed); or stopped, where something
lies in the way of a file (exit code 1), to go on when that is removed; or the damage is named, and passed over or repaired;
or, where a resume does not read the file, it stays as it is. In all but the first the run ends with the model and the newest
checkpoint of the undisturbed one, and with its records but for those that were in the damaged file. Never: a different result
in silence, a traceback.
"""

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fault_injection.checks import Reference, differences, metrics_of, said_once, tree_of
from fault_injection.preload import Fault
from fault_injection.server import Server

OUTCOMES = REFUSED, NAMED, NOT_READ, STOPPED = "refused", "named", "not read", "stopped"
RECORDS = ("rollouts/", "tokens/", "evaluations/", "events.jsonl")
"""Files for people and reports: a resume does not read those of past steps, and they stay as they are."""


def truncate(path: Path, older: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path, older: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def flip(path: Path, older: Path, rng: random.Random) -> None:
    """One bit of one byte."""
    data = bytearray(path.read_bytes())
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def remove(path: Path, older: Path, rng: random.Random) -> None:
    path.unlink()


def swap(path: Path, older: Path, rng: random.Random) -> None:
    """For an older version of it, or the same file of an older step."""
    if older != path:
        shutil.copyfile(older, path)
    elif path.name == "recipe.toml":  # as before a resume with --set
        path.write_text(path.read_text().replace("learning_rate = 0.001", "learning_rate = 0.002"))
    else:
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[: max(0, len(lines) - 3)]))


def hide(path: Path, older: Path, rng: random.Random) -> None:
    """A directory has its name."""
    path.unlink()
    path.mkdir()


def deny(path: Path, older: Path, rng: random.Random) -> None:
    """It cannot be opened: done by the preloaded library, since permissions do not bind root."""


DAMAGES: dict[str, Callable[[Path, Path, random.Random], None]] = {
    "truncated": truncate,
    "emptied": empty,
    "a bit flipped": flip,
    "removed": remove,
    "an older one": swap,
    "a directory": hide,
    "unreadable": deny,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One trial."""

    file: str
    """Relative to the run's directory."""
    kind: str
    seed: int

    def __str__(self) -> str:
        return f"{self.file} {self.kind} (seed {self.seed})"


def plan(reference: Reference, rng: random.Random) -> list[Damage]:
    """Every file with every damage."""
    files = sorted(path.relative_to(reference.halfway) for path in reference.halfway.rglob("*") if path.is_file())
    trials = [
        Damage(file=str(file), kind=kind, seed=rng.randrange(10**6))
        for file in files
        if file.name != ".lock" and not any(part.startswith(".partial") for part in file.parts)
        for kind in DAMAGES
    ]
    journals = ("recipe.toml", "metrics.jsonl", "segments.jsonl", "events.jsonl")
    return [trial for trial in trials if trial.kind != "an older one" or trial.file in journals or _older(reference, trial.file)]


def _older(reference: Reference, file: str) -> Path | None:
    """The same file of an earlier step, if it differs."""
    path = reference.halfway / file
    steps = re.findall(r"step-(\d{6})", file)
    others = (file.replace(steps[0], f"{step:06d}") for step in range(int(steps[0]) - 1, 0, -1)) if steps else ()
    paths = (reference.halfway / other for other in others)
    return next((other for other in paths if other.is_file() and other.read_bytes() != path.read_bytes()), None)


def carry_out(server: Server, reference: Reference, trial: Damage, run: Path) -> tuple[str, list[str]]:
    """Damage, report, resume; returns which of OUTCOMES it was, and what is wrong with it."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(reference.halfway, run)
    file = Path(trial.file)
    DAMAGES[trial.kind](run / file, _older(reference, trial.file) or run / file, random.Random(trial.seed))
    fault = Fault(denied=trial.file if trial.kind == "unreadable" else "")
    outcome, problems, found = judge(server, reference, run, fault, names=[trial.file, *file.parts[1:]])
    if outcome == STOPPED and not problems:
        if (run / file).is_dir():
            (run / file).rmdir()
        again = server.run(["train", "--resume", run], run)
        problems += [] if again.code == 0 else [f"without what lay in the way: exit code {again.code}"]
        found = differences(run, reference)
    named = outcome in (NAMED, STOPPED)
    for name in list(found):
        if name == trial.file and (named or name.startswith(RECORDS)):
            del found[name]
        elif named and (name.startswith("checkpoints/damaged-") or ".damaged-" in name):
            del found[name]  # what cannot be read is kept
        elif named and trial.file == "metrics.jsonl" and name == "checkpoints/best.json":
            del found[name]  # the best is found by the evaluations in the records
    if trial.file == "metrics.jsonl" and named and metrics_of(run)[-2:] != reference.metrics[-2:]:
        problems.append("metrics.jsonl: the last step has other values")
    if outcome == NOT_READ and trial.file.startswith("checkpoints/step-") and (run / file.parent).exists():
        found.pop(trial.file, None)  # kept as the best, and not read by the resume; who reads it is told
        export = ["export", run, "--checkpoint", str(int(file.parts[1].removeprefix("step-"))), "--out", run.parent / "exported"]
        refused = server.run(export, run, fault)
        problems += [f"export: {problem}" for problem in said_once(refused)]
        problems += [] if refused.code == 2 else [f"export of the checkpoint: exit code {refused.code}"]
    return outcome, problems + list(found.values())


def judge(
    server: Server, reference: Reference, run: Path, fault: Fault, *, names: list[str]
) -> tuple[str, list[str], dict[str, str]]:
    """Report and resume a damaged run.

    Args:
        names: what a message would call the damage.

    Returns:
        Which of OUTCOMES it was; what is wrong with what was said; how the run's end differs from the undisturbed one's.
    """
    reported = server.run(["report", run, "--out", run.parent / "page.html"], run, fault)
    problems = [f"report: {problem}" for problem in said_once(reported)]
    before = tree_of(run)
    outcome = server.run(["train", "--resume", run], run, fault)
    problems += said_once(outcome)
    named = any(name in outcome.output for name in names)
    if outcome.code == 2:
        problems += [] if named else [f"refused, and the file is not named: {outcome.output.strip()[-200:]}"]
        changed = {name for name, _ in tree_of(run).items() ^ before.items()}
        return REFUSED, problems + [f"refused, and {name} changed" for name in sorted(changed)], {}
    if outcome.code != 0:
        said = [] if named and outcome.code == 1 else [f"exit code {outcome.code}: {outcome.output.strip()[-200:]}"]
        return STOPPED, problems + said, {}
    return NAMED if named else NOT_READ, problems, differences(run, reference)


FOREIGN: dict[str, Callable[[Path], None]] = {}
"""Path of a foreign thing -> what makes it there."""


def _foreign(path: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def register(make: Callable[[Path], None]) -> Callable[[Path], None]:
        FOREIGN[path] = make
        return make

    return register


@_foreign("checkpoints/step-notes")
def notes(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("the one of Tuesday was best")


@_foreign("checkpoints/step-000004.bak")
def backup(path: Path) -> None:
    shutil.copytree(path.with_suffix(""), path)


@_foreign("checkpoints/step-000099")
def empty_checkpoint(path: Path) -> None:
    path.mkdir()


LATER_VERSION = "checkpoints/step-000098"


@_foreign(LATER_VERSION)
def future_checkpoint(path: Path) -> None:
    """Of a later version, whose format this one does not know."""
    shutil.copytree(_newest(path.parent), path)
    manifest = path / "manifest.json"
    tree = json.loads(manifest.read_text()) if manifest.exists() else {}
    manifest.write_text(json.dumps({**tree, "format": 99, "step": 98, "groupwise": "99.0"}))


@_foreign("checkpoints/step-000097")
def file_as_checkpoint(path: Path) -> None:
    path.write_text("not a directory")


@_foreign("checkpoints/step-000096")
def renamed_checkpoint(path: Path) -> None:
    """A copy of the newest under a later name, which would skip the steps between."""
    shutil.copytree(_newest(path.parent), path)


@_foreign("checkpoints/step-000095")
def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


@_foreign("checkpoints/.partial-000006")
def abandoned(path: Path) -> None:
    path.mkdir(exist_ok=True)
    (path / "model.safetensors").write_bytes(b"half")


@_foreign("notes.txt")
def beside(path: Path) -> None:
    path.write_text("mine")


@_foreign("tokens/step-000099.parquet")
def tokens(path: Path) -> None:
    path.write_bytes(b"PAR1")


@_foreign("rollouts/notes.jsonl")
def rollouts(path: Path) -> None:
    path.write_text("{}\n")


def _newest(checkpoints: Path) -> Path:
    return max(path for path in checkpoints.glob("step-00000?") if path.is_dir())


def add_foreign(server: Server, reference: Reference, name: str, run: Path) -> tuple[str, list[str]]:
    """Put a foreign thing into the run's directory, and resume it."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(reference.halfway, run)
    FOREIGN[name](run / name)
    outcome, problems, found = judge(server, reference, run, Fault(), names=[Path(name).name])
    if outcome == REFUSED and name != LATER_VERSION:
        problems.append("refused, though it could be passed over")
    aside = "checkpoints/damaged-"
    return outcome, problems + [text for path, text in found.items() if not path.startswith((name, aside))]
