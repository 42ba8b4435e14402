"""Taking up a run that exists: from which checkpoint, with which settings, what has changed since. Nothing is written here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groupwise.config import Recipe, Source, load
from groupwise.config.effects import effect
from groupwise.errors import UserError
from groupwise.files import Lock
from groupwise.training import checkpoints
from groupwise.training.checkpoints import RECIPE, Checkpoint
from groupwise.training.events import Warned
from groupwise.training.inputs import PARTS, hash_of, is_of, model_files
from groupwise.training.segments import SEGMENTS, Recorded, Segment, check_beginning, recorded, shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """How a run goes on."""

    lock: Lock
    """Nobody else writes there."""
    checkpoint: Checkpoint | None
    """Where; None: the run has none, and begins again."""
    damaged: Mapping[int, str]
    """Newer checkpoints, by step, and what is wrong with them."""
    recorded: Recorded

    def events(self, segments: Sequence[Segment], problem: str | None) -> list[Warned]:
        """What a person should know of it, once it is done.

        Args:
            segments: of the run, the new one last.
            problem: what is wrong with metrics.jsonl.
        """
        step = self.checkpoint.step if self.checkpoint else 0
        there = f"checkpoints/{checkpoints.name_of(step)}" if self.checkpoint else "the beginning: it has no checkpoint"
        before, now = (segments[-2] if len(segments) > 1 else None), segments[-1]
        found = [
            Warned(step=step, name="checkpoint_damaged", text=f"{checkpoints.name_of(number)} is passed over: {reason}")
            for number, reason in self.damaged.items()
        ]
        notes = [*self.recorded.notes, *([problem] if problem else [])]
        found += [Warned(step=step, name="records_damaged", text=note) for note in notes]
        found.append(Warned(step=step, kind="note", name="resumed", text=f"goes on from {there}"))
        if before is not None:
            found += _changed(before, now, step)
        return found


def _changed(before: Segment, now: Segment, step: int) -> list[Warned]:
    found = []
    for key, (old, new) in now.changed.items():
        what = effect(key, now.recipe)
        text = f"{key}: {shown(old)} -> {shown(new)}{f' ({what})' if what else ''}"
        found.append(Warned(step=step, kind="note", name="settings_changed", text=text))
    for package in ("groupwise", "torch"):
        old, new = getattr(before, package), getattr(now, package)
        if old and old != new:
            text = f"{package} {old} -> {new} (may change results)"
            found.append(Warned(step=step, kind="note", name="settings_changed", text=text))
    base = before.recipe.get("model", {}).get("path", "")
    for path, wanted in before.files.items():
        known = now.files.get(path)
        if "model.path" in now.changed and is_of(path, base):  # it has moved, and was found to be the same
            continue
        if known != wanted and (known is not None or not Path(path).exists()):
            text = f"{path} {'has changed' if known else 'is gone'} since the run read it (may change results)"
            found.append(Warned(step=step, name="files_changed", text=text))
    return found


def resumption(run: Path) -> Resumption:
    """Where a run goes on, every file of the checkpoint verified, and no other process at work there.

    Raises:
        UserError: it is no run, or none of its checkpoints is whole, or another process has it, or its settings were edited.
    """
    if not run.is_dir():
        raise UserError(f"--resume {run}: there is no such directory")
    if not any((run / name).exists() for name in (RECIPE, SEGMENTS, "checkpoints", ".lock")):
        raise UserError(f"--resume {run}: no {RECIPE} in it, so not a run")
    lock = Lock(run)
    try:
        checkpoint, damaged = checkpoints.newest(run / "checkpoints")
        if checkpoint is None and damaged:
            raise checkpoints.refusal(run / "checkpoints", damaged)
        found = recorded(run, checkpoint)
        if checkpoint is None:
            check_beginning(run, found.tree)
        return Resumption(lock=lock, checkpoint=checkpoint, damaged=damaged, recorded=found)
    except UserError:
        lock.close()
        raise


def resumed_recipe(
    run: Path, found: Recorded, overrides: Sequence[str], changes: Mapping[str, Any] | None
) -> tuple[Recipe, Source]:
    """A run's settings with those that are given now.

    Raises:
        UserError: they are wrong, or such as cannot change in a run.
    """
    path = run / RECIPE
    settings, source = load(path, Recipe, overrides, changes, text=found.text)
    before = load(path, Recipe, text=found.text)[0]
    if settings.algorithm.get("name") != before.algorithm.get("name"):
        raise source.error("algorithm.name", "a run goes on with the algorithm it began with; its settings may change")
    if settings.model.lora != before.model.lora:
        ours, theirs = (lora.model_dump() if lora else {} for lora in (settings.model.lora, before.model.lora))
        key = next(key for key in (ours or theirs) if ours.get(key, math.nan) != theirs.get(key, math.nan))
        raise source.error(f"model.lora.{key}", "[model.lora] cannot change in a run, whose adapters have its form")
    _check_base(settings.model.path, before.model.path, found, source)
    kept = "correction" in source.changed("algorithm") or settings.algorithm.get("correction") != "none"
    if settings.cluster.staleness and not before.cluster.staleness and not kept:
        # The run's file holds what the synchronous run chose by default; `with_correction` chooses for an asynchronous one.
        algorithm = {key: value for key, value in settings.algorithm.items() if key != "correction"}
        settings = settings.model_copy(update={"algorithm": algorithm})
    return settings, source


def _check_base(path: str, before: str, found: Recorded, source: Source) -> None:
    """The base model may have moved, and not be another one.

    Raises:
        UserError: it is gone, or another.
    """
    known = found.segments[-1].files if found.segments else {}
    wanted = {_within(name, before): digest for name, digest in known.items() if is_of(name, before)}
    if path == before:
        if wanted and not any(name.startswith("hub:") for name in known if is_of(name, before)) and not Path(path).is_dir():
            raise source.error(
                "model.path",
                "the base model's directory is gone. The checkpoints hold the trained weights; tokenizer, configuration and what "
                "the run began with come from the base: bring it back, or say where it is now with --set model.path=DIR",
            )
        return
    ours = {_within(name, path): file for name, file in model_files(path, Path(source.path).parent).items()}
    same = (name in ours and hash_of(ours[name], whole=not digest.startswith(PARTS)) == digest for name, digest in wanted.items())
    if not wanted or not all(same):
        why = "" if not wanted else f": its files are not those of {before}"
        raise source.error("model.path", f"a run goes on with the base model it began with{why}")


def _within(name: str, model: str) -> str:
    """A file's name in a model's directory."""
    return name.removeprefix("hub:").removeprefix(model).lstrip("/")
