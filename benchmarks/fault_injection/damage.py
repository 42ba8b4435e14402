"""Damage to the files of a run that was killed halfway, and foreign files beside them; the run is then resumed.

What may come of it: the damage is named and the command refused (exit code 2, nothing changed); or it is named, passed over or
repaired, and the run ends as the undisturbed one; or, where a resume does not read the file, the run ends as the undisturbed one
but for this file. Never: a different result in silence, a traceback.
"""

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fault_injection.checks import Reference, differences, said_once, tree_of
from fault_injection.preload import Fault
from fault_injection.server import Server

OUTCOMES = ("refused", "named, same end", "not read, same end")


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
    """Damage, resume; returns which of OUTCOMES it was, and what is wrong with it."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(reference.halfway, run)
    file = Path(trial.file)
    DAMAGES[trial.kind](run / file, _older(reference, trial.file) or run / file, random.Random(trial.seed))
    fault = Fault(denied=trial.file if trial.kind == "unreadable" else "")
    return judge(server, reference, run, fault, names=[trial.file, *file.parts[1:]], damaged=trial.file)


def judge(
    server: Server, reference: Reference, run: Path, fault: Fault, *, names: list[str], damaged: str = "", foreign: str = ""
) -> tuple[str, list[str]]:
    """Report and resume a damaged run; returns which of OUTCOMES it was, and what is wrong with it.

    Args:
        names: what a message would call the damage.
        damaged: a file that may stay as it is where a resume does not read it.
        foreign: a file or directory that may be left over.
    """
    problems = []
    page = run.parent / "page.html"
    reported = server.run(["report", run, "--out", page], run, fault)
    problems += [f"report: {problem}" for problem in said_once(reported)]
    before = tree_of(run)
    outcome = server.run(["train", "--resume", run], run, fault)
    problems += said_once(outcome)
    named = any(name in outcome.output for name in names if name != "checkpoints")
    if outcome.code == 2:
        problems += [] if named else [f"refused, and the file is not named: {outcome.output.strip()[-200:]}"]
        changed = {name for name, digest in tree_of(run).items() ^ before.items()}
        return "refused", problems + [f"refused, and {name} changed" for name in sorted(changed)]
    if outcome.code != 0:
        return "failed", [*problems, f"exit code {outcome.code}: {outcome.output.strip()[-200:]}"]
    found = differences(run, reference)
    kept = tuple(name for name in (damaged if not damaged.startswith("checkpoints/") else "", foreign) if name)
    if not named:
        # A record of a past step, which no resume reads, stays as it is.
        found = [one for one in found if not (kept and one.startswith(kept) and not one.startswith(JOURNAL))]
    else:
        found = [one for one in found if not (kept and one.startswith(kept))]
    return ("named, same end" if named else "not read, same end"), problems + found


JOURNAL = ("recipe.toml", "metrics", "segments.jsonl")
"""Files that say what the run was: their damage must be named."""

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


@_foreign("checkpoints/step-000098")
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
    outcome, problems = judge(server, reference, run, Fault(), names=[Path(name).name], foreign=name)
    if outcome == "refused" and name != "checkpoints/step-000098":  # a later version's run may be refused
        problems.append("refused, though it could be passed over")
    return outcome, problems
