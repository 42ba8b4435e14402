"""One run from its recipe to its end, as the command line and `groupwise.train` start it."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from groupwise.config import Recipe, Source, find_recipe, load
from groupwise.errors import RunError, UserError
from groupwise.tasks.base import datasets_of, sandboxes_of
from groupwise.terminal import Terminal
from groupwise.training import checkpoints
from groupwise.training.display import Display
from groupwise.training.events import Warned
from groupwise.training.inputs import input_hashes
from groupwise.training.interrupts import Interrupt, ending, interruptible
from groupwise.training.loop import Result, Trainer
from groupwise.training.pieces import InProcess, Pieces
from groupwise.training.processes import described
from groupwise.training.records import RunDirectory
from groupwise.training.recovery import take_up
from groupwise.training.resume import Resumption, resumed_recipe, resumption
from groupwise.training.segments import after, as_json, changes, keep_damaged, metrics_at
from groupwise.training.setup import Ready, prepare, resolved
from groupwise.training.trackers import Guarded, make_trackers


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A recipe that has been checked, and where its run goes."""

    recipe: Recipe
    source: Source
    path: Path
    """The run's directory."""
    resumption: Resumption | None = None
    """How a run that exists goes on; None: it begins."""


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
        RunDirectory(run, None).check_free()
        return Session(recipe=settings, source=source, path=run)
    if recipe is not None or out is not None:
        raise UserError("--resume takes the recipe and the directory from the run; change settings with --set")
    found = resumption(resume)
    try:
        settings, source = resumed_recipe(resume, found.recorded, overrides, changes)
    except UserError:
        found.lock.close()
        raise
    return Session(recipe=settings, source=source, path=resume, resumption=found)


Launch = Callable[[Ready, RunDirectory], AbstractContextManager[Pieces]]
"""Starts the processes of a run, which end with the context."""


def in_process(ready: Ready, directory: RunDirectory) -> AbstractContextManager[Pieces]:
    """No other process."""
    return nullcontext(InProcess.of(ready))


def run(session: Session, console: Terminal, *, ends: bool = False, launch: Launch = in_process) -> Result:
    """Load what the recipe names, train, and show progress on the console.

    Args:
        launch: what starts the learner and the samplers.
        ends: a signal that stops at once ends this process; else it raises KeyboardInterrupt.

    Raises:
        UserError, RunError: as soon as something is wrong.
        Interrupted, KeyboardInterrupt: the user stopped it. What was reached is saved, and the console says how to go on.
    """
    display = Display(console, session.recipe.training.steps)

    def farewell() -> None:
        display.stop()
        display.note(f"stopped at once{_how_to_go_on(session.path)}")

    interrupt = Interrupt(end=ending(farewell) if ends else None, note=display.note)
    with interruptible(interrupt), ExitStack() as closing:
        lock = session.resumption.lock if session.resumption else None
        if lock is not None:
            closing.callback(lock.close)
        ready = prepare(session.recipe, session.source)
        directory, tree = RunDirectory(session.path, ready.tokenizer), resolved(ready)
        if lock is None:
            lock = directory.claim()
            closing.callback(lock.close)
        trackers = make_trackers(ready.trackers, session.path, tree)
        if line := described(session.recipe, directory.logs):
            console.print(line, soft_wrap=True)
        trainer = Trainer(ready, directory, pieces=closing.enter_context(launch(ready, directory)))
        closing.callback(trainer.collector.close)
        events = start(session, ready, trainer, tree)
        if lock.warning:
            events.append(Warned(step=trainer.step, name="no_lock", text=lock.warning))
        _announce(ready, session, console)
        closing.enter_context(display)
        named, patience = zip(ready.trackers, trackers, strict=True), session.recipe.trackers.timeout
        guarded = [Guarded(tracker.name, recorder, display.note, patience) for tracker, recorder in named]
        for tracker in guarded:
            closing.callback(tracker.close)
        trainer.recorders += [display, *guarded]
        display.begin_at(trainer.step)
        for event in events:
            trainer.record(event)
        try:
            return trainer.train(interrupt)
        except (KeyboardInterrupt, UserError, RunError):
            where = f"after step {trainer.step}" if trainer.step else "before the first step was done"
            display.note(f"stopped {where}{_how_to_go_on(session.path, trainer.step)}")
            raise
        finally:
            interrupt.release()  # now Ctrl-C ends the waiting for trackers


def start(session: Session, ready: Ready, trainer: Trainer, tree: Mapping[str, Any]) -> list[Warned]:
    """Load the checkpoint that the run goes on from, and write the settings; returns what is to be said of it.

    `tree`: the settings, whole.
    """
    directory, found, tree = trainer.run_directory, session.resumption, as_json(tree)
    begun = found.recorded.segments[-1:] if found else []
    inputs = input_hashes(tree, ready.task, session.path, begun[0].files if begun else None)
    if found is None:
        directory.create(tree, inputs)
        return []
    if found.checkpoint is None:
        keep_damaged(session.path, found.recorded)
        first = directory.create_again(tree, inputs)
        return found.events([*begun, replace(first, changed=changes(found.recorded.tree, tree))], None)
    take_up(trainer, found.checkpoint)
    segments = after(found.recorded.segments, found.checkpoint, tree, inputs)
    keep_damaged(session.path, found.recorded)
    metrics = metrics_at(found.recorded.segments, found.checkpoint)
    problem = directory.resume(found.checkpoint, found.damaged, segments, trainer.store, metrics)
    trainer.watch.catch_up(directory.metrics.path)
    return found.events(segments, problem)


def _announce(ready: Ready, session: Session, console: Terminal) -> None:
    model = session.recipe.model.path
    for dataset in datasets_of(ready.task):
        if left_out := dataset.left_out():
            console.print(f"left out of {dataset.path}: {left_out}", soft_wrap=True)
    console.print(f"{ready.algorithm.name} on {ready.task.name}, model {model}; writing {session.path}", soft_wrap=True)
    sandbox = "; ".join(sandboxes_of(ready.task))
    programs = f"programs run in the sandbox {sandbox}" if sandbox else ""
    adapters = ready.model.describe_adapters() if ready.model is not None else None
    for line in (programs, adapters, ready.fallback(), *ready.hints()):
        if line:
            console.print(line, soft_wrap=True)


def _how_to_go_on(path: Path, step: int = 0) -> str:
    """`step`: the last one that was done."""
    there, command = checkpoints.listed(path / "checkpoints"), f"groupwise train --resume {shlex.quote(str(path))}"
    if not there:
        return f"; to begin again: {command}" if (path / checkpoints.RECIPE).is_file() else ""
    last = max(there)
    again = f" (step {step} is done again)" if step == last + 1 else f" (steps {last + 1} to {step} are done again)"
    return f"; to go on from {checkpoints.name_of(last)}: {command}{again if step > last else ''}"
