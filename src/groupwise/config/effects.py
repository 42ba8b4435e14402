"""What settings that change on the way change of a run's results."""

import json
from collections.abc import Mapping
from typing import Any

HARMLESS = (
    "training.keep_checkpoints", "training.checkpoint_every", "training.tokens_every", "training.eval_every", "trackers.",
    "cluster.launcher", "cluster.ray_address", "cluster.weights", "cluster.timeout", "cluster.max_restarts",
)  # fmt: skip
"""Settings that change no result."""
ROUNDING = ("learner.micro_batch_tokens", "rollouts.max_rows", "learner.share_prompts", "learner.checkpointing", "model.backend",
            "model.device", "model.compile", "cluster.samplers", "cluster.learners", "cluster.gpus_per_sampler", "cluster.vllm",
            "cluster.vllm_arguments")  # fmt: skip
"""Settings that change results by rounding alone."""
BY_ROUNDING = "changes results by rounding"


def effect(key: str, tree: Mapping[str, Any]) -> str:
    """What a changed setting changes of the results, in words; empty: nothing."""
    if key.startswith(HARMLESS):
        return ""
    if key == "training.steps" and tree.get("learner", {}).get("schedule") == "constant":
        own = ".py:" in json.dumps(tree.get("task", {}), default=str)
        return "changes results where a reward reads trainer_state.max_steps" if own else ""
    if key.startswith("training.eval"):
        return "changes what evaluations measure"
    return BY_ROUNDING if key in ROUNDING else "changes results"
