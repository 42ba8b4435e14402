"""What settings that change on the way change of a run's results."""

from collections.abc import Mapping
from typing import Any

HARMLESS = (
    "training.keep_checkpoints", "training.checkpoint_every", "training.tokens_every", "training.eval_every", "trackers.",
)  # fmt: skip
"""Settings that change no result."""
ROUNDING = ("learner.micro_batch_tokens", "rollouts.max_rows", "learner.share_prompts", "learner.checkpointing", "model.backend",
            "model.device", "model.compile")  # fmt: skip
"""Settings that change results by rounding alone."""
BY_ROUNDING = "changes results by rounding"


def effect(key: str, tree: Mapping[str, Any]) -> str:
    """What a changed setting changes of the results, in words; empty: nothing."""
    if key.startswith(HARMLESS) or (key == "training.steps" and tree.get("learner", {}).get("schedule") == "constant"):
        return ""
    if key.startswith("training.eval"):
        return "changes what evaluations measure"
    return BY_ROUNDING if key in ROUNDING else "changes results"
