"""The model of a checkpoint as a Hugging Face directory: of a run that is under way, was killed, or went on past its best."""

from pathlib import Path

from groupwise.config import Recipe, load
from groupwise.errors import UserError
from groupwise.models import load_tokenizer
from groupwise.training import checkpoints
from groupwise.training.checkpoints import Best, Checkpoint, Damaged
from groupwise.training.metrics_file import METRICS, TRAINED, parse
from groupwise.training.records import write_model
from groupwise.training.setup import load_policy


def export_checkpoint(run: Path, which: str, out: Path) -> tuple[Checkpoint, float | None]:
    """Write a checkpoint's model to `out`; returns the checkpoint, and by how much merging adapters moved a logit.

    Args:
        which: "newest", "best", or a step.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or `out` is taken.
        DiskError: `out` cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: already there and not empty")
    found = find(run, which)
    recipe, source = load(found.path / checkpoints.RECIPE, Recipe)
    tokenizer = load_tokenizer(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)
    model = load_policy(recipe, source)
    try:
        model.load_weights(found.path / "model")
    except ValueError as error:
        raise UserError(f"{found.path}: {error}") from error
    merge = recipe.model.lora is None or recipe.model.lora.export == "merged"
    said = write_model(out, lambda path: model.export(path, tokenizer, merge=merge))
    return found, said.get("export/merge_gap")


def find(run: Path, which: str) -> Checkpoint:
    """A checkpoint of a run, verified.

    Raises:
        UserError: there is none of that kind, or it is damaged.
    """
    directory = run / "checkpoints"
    there = checkpoints.listed(directory)
    if not there:
        raise UserError(f"{run}: there are no checkpoints of a run in it")
    if which == "newest":
        newest, damaged = checkpoints.newest(directory)
        if newest is None:
            raise checkpoints.refusal(directory, damaged)
        return newest
    if which == "best":
        best = best_of(run)
        if best is None:
            raise UserError(f"{run}: no step with a checkpoint was evaluated; name a step: {', '.join(map(str, there))}")
        step = best.step
    elif which.isdecimal() and len(which) < 19:
        step = int(which)
    else:
        raise UserError(f"--checkpoint {which}: expected newest, best or a step: {', '.join(map(str, there))}")
    if step not in there:
        raise UserError(f"--checkpoint {which}: there is none of step {step}; there are {', '.join(map(str, there))}")
    try:
        return checkpoints.verify(there[step], step)
    except Damaged as error:
        raise UserError(f"{there[step]}: {error}") from error


def best_of(run: Path) -> Best | None:
    """The best evaluated step of a run that has a checkpoint."""
    path = run / METRICS
    lines = path.read_bytes().splitlines() if path.is_file() else []
    evaluations = [record for line in lines if (record := parse(line)) and TRAINED not in record]
    return checkpoints.best_of(run / "checkpoints", evaluations)
