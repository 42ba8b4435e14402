"""One run from its recipe to its end, as the command line and `groupwise.train` start it."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from groupwise.config import Recipe, Source, find_recipe, load
from groupwise.errors import RunError, UserError
from groupwise.tasks.base import datasets_of
from groupwise.training import checkpoints
from groupwise.training.display import Display
from groupwise.training.interrupts import Interrupted
from groupwise.training.loop import Result, Trainer
from groupwise.training.records import RunDirectory
from groupwise.training.setup import Ready, prepare, resolved
from groupwise.training.trackers import Guarded, make_trackers


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A recipe that has been checked, and where its run goes."""

    recipe: Recipe
    source: Source
    path: Path
    """The run's directory."""
    checkpoint: Path | None
    """Where a resumed run goes on; None: it begins."""


def plan(
    recipe: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    changes: Mapping[str, Any] | None = None,
    out: Path | None = None,
    resume: Path | None = None,
) -> Session:
    """What to run, before anything is loaded.

    Raises:
        UserError: the recipe is wrong, or there is nothing to resume.
    """
    if resume is None:
        path = find_recipe(recipe)
        settings, source = load(path, Recipe, overrides, changes)
        run = out or Path("runs") / f"{path.stem}-{datetime.now():%Y%m%d-%H%M%S}"
        return Session(recipe=settings, source=source, path=run, checkpoint=None)
    if recipe is not None or out is not None:
        raise UserError("--resume takes the recipe and the directory from the run; change settings with --set")
    path = resume / "recipe.toml"
    if not path.is_file():
        raise UserError(f"--resume {resume}: no recipe.toml in it, so not a run")
    checkpoint = checkpoints.newest(resume)
    if checkpoint is None:
        raise UserError(f"--resume {resume}: the run has no checkpoint; begin again with groupwise train {path} --out ...")
    settings, source = load(path, Recipe, overrides, changes)
    if settings.algorithm.get("name") != load(path, Recipe)[0].algorithm.get("name"):
        raise source.error("algorithm.name", "a run goes on with the algorithm it began with; its settings may change")
    return Session(recipe=settings, source=source, path=resume, checkpoint=checkpoint)


def run(session: Session, console: Console) -> Result:
    """Load what the recipe names, train, and show progress on the console.

    Raises:
        UserError, RunError: as soon as something is wrong.
        Interrupted, KeyboardInterrupt: the user stopped it. What was reached is saved, and the console says how to go on.
    """
    ready = prepare(session.recipe, session.source)
    directory, tree = RunDirectory(session.path, ready.tokenizer), resolved(ready)
    if session.checkpoint is None:
        directory.create(tree)
    else:
        directory.write_recipe(tree)
    trackers = make_trackers(ready.trackers, session.path, tree)
    patience = session.recipe.trackers.timeout
    _announce(ready, session, console)
    with Display(console, session.recipe.training.steps) as display, ExitStack() as closing:
        named = zip(ready.trackers, trackers, strict=True)
        guarded = [Guarded(tracker.name, recorder, display.note, patience) for tracker, recorder in named]
        for tracker in guarded:
            closing.callback(tracker.close)
        trainer = Trainer(ready, directory, [display, *guarded])
        if session.checkpoint is not None:
            trainer.resume(session.checkpoint)
            display.begin_at(trainer.step)
            display.note(f"going on after step {trainer.step}")
        try:
            return trainer.train()
        except (Interrupted, KeyboardInterrupt, UserError, RunError):
            display.note(f"stopped in step {trainer.step + 1}{_how_to_go_on(session.path)}")
            raise


def _announce(ready: Ready, session: Session, console: Console) -> None:
    model = session.recipe.model.path
    for dataset in datasets_of(ready.task):
        if left_out := dataset.left_out():
            console.print(f"left out of {dataset.path}: {left_out}", soft_wrap=True)
    console.print(f"{ready.algorithm.name} on {ready.task.name}, model {model}; writing {session.path}", soft_wrap=True)
    for line in (ready.model.describe_adapters(), ready.fallback(), *ready.hints()):
        if line:
            console.print(line, soft_wrap=True)


def _how_to_go_on(path: Path) -> str:
    checkpoint = checkpoints.newest(path)
    return f"; to go on from {checkpoint.name}: groupwise train --resume {path}" if checkpoint else ""
