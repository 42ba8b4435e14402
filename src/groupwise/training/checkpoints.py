"""Checkpoints: written beside, then renamed, so that one that exists is whole."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model

from groupwise.errors import UserError


def save(directory: Path, step: int, model: Any, state: dict[str, Any], keep: int) -> Path:
    """Write checkpoints/step-N with the weights and everything else that a resume needs; keep the newest few."""
    final = directory / f"step-{step:06d}"
    partial = directory / f".partial-{step:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_model(model, str(partial / "model.safetensors"))
    torch.save(state, partial / "state.pt")
    if final.exists():
        shutil.rmtree(final)
    partial.replace(final)
    for old in sorted(directory.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return final


def newest(run: Path) -> Path | None:
    """The last checkpoint of a run, or None."""
    return max((run / "checkpoints").glob("step-*"), default=None)


def load(checkpoint: Path, model: Any) -> dict[str, Any]:
    """Fill the model with a checkpoint's weights and return its state.

    Raises:
        UserError: the checkpoint is damaged, or of another model.
    """
    try:
        state: dict[str, Any] = torch.load(checkpoint / "state.pt", weights_only=True)
        load_model(model, str(checkpoint / "model.safetensors"), device=str(model.device))
    except Exception as error:  # whatever the readers make of a damaged file
        older = [path.name for path in sorted(checkpoint.parent.glob("step-*")) if path != checkpoint]
        hint = f"; remove it to go on from {older[-1]}" if older else ""
        raise UserError(f"{checkpoint}: cannot be read: {str(error).splitlines()[0]}{hint}") from error
    return state
