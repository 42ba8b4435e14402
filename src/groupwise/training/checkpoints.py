"""Checkpoints: written beside the others, flushed to the disk, then renamed, so that one that exists is complete.

Each has a manifest with the hash of every file in it, the manifest included; nothing is read before all of them are verified.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from groupwise import files
from groupwise.errors import LearnerLost, RunError, UserError
from groupwise.files import Digest
from groupwise.learner.base import Learner
from groupwise.state import read_state, write_state

FORMAT = 2
"""Of the files in a checkpoint; those of format 1 were pickled, and had no manifest."""
MANIFEST, RECIPE, BEST = "manifest.json", "recipe.toml", "best.json"


class Damaged(Exception):
    """A checkpoint that cannot be resumed from, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose files are those that were written."""

    path: Path
    step: int
    recipe: str
    """The run's settings as it was written: its recipe.toml."""
    metrics: Digest
    """Of metrics.jsonl up to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """The best held-out result of a run, among steps of which there is a checkpoint."""

    step: int
    metric: str
    value: float


# --- finding


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def listed(directory: Path) -> dict[int, Path]:
    """The checkpoints in a directory by step, ascending, damaged ones included; what else is there is passed over."""
    found: dict[int, Path] = {}
    for path in directory.iterdir() if directory.is_dir() else ():
        name = path.name.removeprefix(files.REPLACED)  # all that there is, where a kill came between two renames
        step = int(name[5:]) if re.fullmatch(r"step-[0-9]{6,18}", name) else -1
        if step >= 0 and name == name_of(step) and path.is_dir() and files.present(path.with_name(name)) == path:
            found[step] = path
    return dict(sorted(found.items()))


def newest(directory: Path) -> tuple[Checkpoint | None, dict[int, str]]:
    """The newest checkpoint that is whole, and by step what is wrong with each newer one."""
    damaged: dict[int, str] = {}
    for step, path in reversed(listed(directory).items()):
        try:
            return verify(path, step), damaged
        except Damaged as error:
            damaged[step] = str(error)
    return None, damaged


def verify(path: Path, step: int) -> Checkpoint:
    """The checkpoint in a directory, each byte of its files compared with the manifest.

    Raises:
        Damaged: it is not what was written, or of another version of groupwise.
    """
    try:
        manifest = _manifest(path)
        if manifest["step"] != step:
            raise Damaged(f"{path.name} holds step {manifest['step']}")
        for name, wanted in manifest["files"].items():
            found = files.sha256(path / name)
            if found != Digest(**wanted):
                size = "" if found.bytes == wanted["bytes"] else f": {found.bytes:,} bytes and not {wanted['bytes']:,}"
                raise Damaged(f"{name} is not the file that was written{size}")
        recipe = (path / RECIPE).read_text(encoding="utf-8")
        return Checkpoint(path=path, step=step, recipe=recipe, metrics=Digest(**manifest["metrics"]))
    except FileNotFoundError as error:
        raise Damaged(f"{Path(str(error.filename)).name} is missing") from error
    except OSError as error:
        raise Damaged(f"{Path(str(error.filename)).name} cannot be read: {error.strerror}") from error


def _manifest(path: Path) -> dict[str, Any]:
    if not (path / MANIFEST).exists() and (path / "state.pt").exists():
        raise Damaged("written by an earlier version of groupwise, whose checkpoints were pickled and are not read any more")
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_bytes())
        sealed = manifest.pop("sha256") == seal(manifest)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} is damaged") from error
    if not sealed:
        raise Damaged(f"{MANIFEST} is damaged")
    if manifest["format"] != FORMAT:
        raise Damaged(f"written by groupwise {manifest['groupwise']}, in a format that this version does not read")
    return manifest


def seal(content: Mapping[str, Any]) -> str:
    """A hash of a JSON object, to be kept in it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def refusal(directory: Path, damaged: Mapping[int, str]) -> UserError:
    """What to say where no checkpoint can be resumed from."""
    reasons = "".join(f"\n  {name_of(step)}: {reason}" for step, reason in damaged.items())
    return UserError(
        f"{directory}: no checkpoint can be resumed from:{reasons}\nBring back a copy of one, or begin again in another directory"
    )


# --- reading and writing


def load(checkpoint: Checkpoint, learner: Learner) -> dict[str, Any]:
    """Let the learner continue from a checkpoint, and return the loop's own state.

    Raises:
        UserError: it is of another model, or of another version of groupwise.
        LearnerLost: the learner's process died over it.
    """
    try:
        state: dict[str, Any] = read_state(checkpoint.path / "state")
        learner.load(checkpoint.path)
    except (UserError, LearnerLost):
        raise
    except Exception as error:  # the files are as they were written, but for a model or a version that is not this one
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{checkpoint.path}: does not fit the run: {text}") from error
    return state


def save(directory: Path, step: int, learner: Learner, state: Any, *, recipe: str, metrics: Digest) -> Path:
    """Write checkpoints/step-N with the learner and the loop's own state.

    Args:
        recipe: the run's settings, as TOML.
        metrics: of metrics.jsonl as it is now, on the disk.

    Raises:
        UserError: the state holds something that could not be read again.
        DiskError: it cannot be written; other checkpoints are as they were.
    """
    final = directory / name_of(step)
    partial = directory / (files.PARTIAL + final.name)
    with files.explained(partial):
        directory.mkdir(exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    try:
        listing = {**learner.save(partial), **write_state(partial / "state", state)}
        with files.written(partial / RECIPE) as file:
            file.write(recipe.encode())
            listing[RECIPE] = file.digest
        manifest = {
            "format": FORMAT,
            "groupwise": version("groupwise"),
            "step": step,
            "recipe": listing[RECIPE].sha256,
            "files": {name: asdict(digest) for name, digest in listing.items()},
            "metrics": asdict(metrics),
        }
        with files.written(partial / MANIFEST) as file:
            file.write((json.dumps({**manifest, "sha256": seal(manifest)}, indent=1) + "\n").encode())
        files.sync(partial)
        files.sync(directory.parent)
    except (RunError, UserError):
        shutil.rmtree(partial, ignore_errors=True)
        raise
    files.put_directory(partial, final)
    return final


class Store:
    """The checkpoints of a run: the newest few, and the best by held-out score."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory, self.keep = directory, keep
        self.best: Best | None = None

    def prune(self, step: int) -> None:
        """Keep the newest few up to this step, and the best.

        Raises:
            DiskError: one cannot be removed.
        """
        there = {number: path for number, path in listed(self.directory).items() if number <= step}
        for number in list(there)[: -self.keep]:
            if self.best is None or number != self.best.step:
                files.remove(there[number])

    def set_aside(self, steps: Iterable[int]) -> None:
        """Give damaged checkpoints a name that is no checkpoint's, so that they neither count as the newest nor are lost."""
        there = listed(self.directory)
        for step in steps:
            if step in there:
                path, number = there[step], 1
                while (aside := self.directory / f"damaged-{name_of(step)}{f'-{number}' * (number > 1)}").exists():
                    number += 1
                files.move(path, aside)

    # --- the best

    def is_better(self, step: int, metrics: Mapping[str, Any]) -> Best | None:
        """This evaluation, if it is the best so far of a step that was trained; the first of equals stays the best."""
        found = _best([{**metrics, "step": step}], {step})
        return found if found and (self.best is None or found.value > self.best.value) else None

    def set_best(self, best: Best) -> None:
        """Let `prune` keep the checkpoint of this evaluation from now on.

        Raises:
            DiskError: best.json cannot be written. A resume knows the best from the records, and writes it again.
        """
        self.best = best
        files.write_atomically(self.directory / BEST, json.dumps(asdict(best)) + "\n")

    def resume(self, step: int, evaluations: Iterable[Mapping[str, Any]]) -> None:
        """Find the best again, from the records of the evaluations up to where the run goes on, and do what was left to do."""
        self.best = best_of(self.directory, evaluations)
        if self.best is not None:
            self.set_best(self.best)
        with suppress(files.DiskError):  # the next checkpoint tries again, and says so
            self.prune(step)


def best_of(directory: Path, evaluations: Iterable[Mapping[str, Any]]) -> Best | None:
    """The best evaluation of a step that has a checkpoint, by the records; where a damaged one lacks it, as best.json says."""
    records = list(evaluations)
    try:
        known: dict[str, Any] = json.loads((directory / BEST).read_bytes())
        if not any(record["step"] == known["step"] and known["metric"] in record for record in records):
            records.append({"step": known["step"], known["metric"]: known["value"]})
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass  # the records say the same
    return _best(records, listed(directory))


def _best(evaluations: Iterable[Mapping[str, Any]], steps: Iterable[int]) -> Best | None:
    """By pass rate where there is one, else by mean reward; the first of equals."""
    known, best = set(steps) - {0}, None
    for record in evaluations:
        metric = "eval/pass@1" if "eval/pass@1" in record else "eval/reward"
        value = record.get(metric)
        if (
            record["step"] in known
            and isinstance(value, int | float)
            and -math.inf < value < math.inf
            and (best is None or value > best.value)
        ):
            best = Best(step=record["step"], metric=metric, value=value)
    return best
