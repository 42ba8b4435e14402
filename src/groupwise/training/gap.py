"""How far the sampler's log-probabilities may be from the learner's."""

from groupwise.config import Recipe
from groupwise.errors import RunError

LARGEST_GAP_IN_FLOAT32 = 0.01
"""Nats, the mean over tokens. In float32 the two are usually within 1e-5, and a token near a tie of a router may be far off."""


def in_float32(recipe: Recipe) -> bool:
    """Whether the recipe's sampler and learner compute the same distribution, but for float32's rounding."""
    rollouts = recipe.rollouts
    dtypes = recipe.model.dtype, recipe.learner.precision, rollouts.dtype, rollouts.cache_dtype
    same_weights = rollouts.max_age == 0 and recipe.cluster.staleness == 0 and rollouts.sampler == "native"
    return set(dtypes) <= {"float32", None} and same_weights


def check_gap(step: int, gap: float, recipe: Recipe) -> None:
    """Stop where sampler and learner compute different models, which rounding cannot explain.

    Args:
        gap: nats, the mean over the tokens of a step.

    Raises:
        RunError: both run in float32 on the same weights, and their log-probabilities differ.
    """
    if gap > LARGEST_GAP_IN_FLOAT32 and in_float32(recipe):
        raise RunError(
            f"step {step}: the sampler's log-probabilities are {gap:.2g} nats from the learner's on average, though both run in "
            "float32 on the same weights, so one of the two does not compute this model. Set model.backend = 'transformers', and "
            "please report the model's type"
        )
