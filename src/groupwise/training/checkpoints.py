"""Checkpoints: written next to the others, then renamed, so that one that exists is complete."""

import shutil
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch

from groupwise.errors import UserError
from groupwise.learner.base import Learner


def save(directory: Path, step: int, learner: Learner, state: dict[str, Any], keep: int) -> Path:
    """Write checkpoints/step-N with the learner and the loop's own state; keep the newest few.

    Raises:
        UserError: the state holds something that could not be read again.
    """
    state = plain(state, _refuse)
    final = directory / f"step-{step:06d}"
    partial = directory / f".partial-{step:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    learner.save(partial)
    torch.save(state, partial / "state.pt")
    if final.exists():
        shutil.rmtree(final)
    partial.replace(final)
    for old in sorted(directory.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return final


def plain(value: Any, other: Callable[[Any], Any] = str) -> Any:
    """A value as `torch.load(weights_only=True)` reads it: numbers, texts, tensors, and containers of these stay what they are,
    numpy's numbers become Python's, and anything else, such as a date in a row of a dataset, what `other` makes of it: its text.
    """
    if value is None or isinstance(value, bool | torch.Tensor):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, Mapping):
        return {plain(key, other): plain(item, other) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple)(plain(item, other) for item in value)
    return other(value)


def _refuse(value: Any) -> Any:
    raise UserError(
        f"a checkpoint holds numbers, texts, tensors, and lists and mappings of these, and a part of the algorithm remembers "
        f"{type(value).__name__}: {value!r:.100}"
    )


def newest(run: Path) -> Path | None:
    """The last checkpoint of a run, or None."""
    return max((run / "checkpoints").glob("step-*"), default=None)


def load(checkpoint: Path, learner: Learner) -> dict[str, Any]:
    """Let the learner continue from a checkpoint, and return the loop's own state.

    Raises:
        UserError: the checkpoint is damaged, of another model, or of an earlier version of groupwise.
    """
    try:
        state: dict[str, Any] = torch.load(checkpoint / "state.pt", weights_only=True)
        if "learner" in state:
            raise UserError(f"{checkpoint}: written by an earlier version of groupwise, which kept the learner's state elsewhere")
        learner.load(checkpoint)
    except UserError:
        raise
    except Exception as error:  # damaged files make the readers raise anything
        older = [path.name for path in sorted(checkpoint.parent.glob("step-*")) if path != checkpoint]
        hint = f"; remove it to go on from {older[-1]}" if older else ""
        raise UserError(f"{checkpoint}: cannot be read: {str(error).splitlines()[0]}{hint}") from error
    return state
