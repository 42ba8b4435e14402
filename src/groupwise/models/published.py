"""Weights on their way to samplers of other processes: a Hugging Face model directory, whole as soon as it exists."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from groupwise import files
from groupwise.models import export

if TYPE_CHECKING:
    from groupwise.models.language_model import LanguageModel


def publish(model: "LanguageModel", directory: Path) -> None:
    """Write the model's weights, adapters merged, in their own dtype; see `Learner.publish`."""
    partial = directory.with_name(files.PARTIAL + directory.name)
    shutil.rmtree(partial, ignore_errors=True)
    export.save_model(model.module, partial, model.dtype)
    partial.rename(directory)
