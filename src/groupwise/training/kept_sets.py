"""What sampling replay needs of a sampler, checked."""

from collections.abc import Sequence

import torch

from groupwise.algorithms import Algorithm
from groupwise.config import Recipe
from groupwise.errors import UserError
from groupwise.kept import KeptTokens
from groupwise.types import Completion


def check_kept(completions: Sequence[Completion], recipe: Recipe, algorithm: Algorithm) -> None:
    """Refuse completions whose log-probabilities the learner cannot compute as their sampler did.

    Raises:
        UserError: kept sets are missing where the sampler's log-probabilities are used, or do not belong to the tokens.
    """
    rollouts, kept = recipe.rollouts, [completion.kept for completion in completions]
    limited = rollouts.top_p < 1 or rollouts.top_k > 0 or rollouts.min_p > 0
    used_by = "learner.old_logprobs = 'sampler'" if recipe.learner.old_logprobs == "sampler" else None
    if algorithm.needs_rollout_logprobs:
        kind = "correction" if algorithm.corrects_mismatch else "mask"
        used_by = f"algorithm.{kind} = {algorithm.choice(kind)!r}"
    if limited and used_by and None in kept:
        raise UserError(
            f"rollouts.sampler, {rollouts.sampler}: gives no kept sets (`Completion.kept`), so the learner cannot compute "
            f"log-probabilities of the distribution that top_p, top_k or min_p left, which {used_by} compares with the "
            "sampler's; remove one of the two"
        )
    for completion in completions:
        if completion.kept is not None and len(completion.kept) != len(completion.tokens):
            raise UserError(
                f"rollouts.sampler, {rollouts.sampler}: {len(completion.kept)} kept sets for {len(completion.tokens)} tokens"
            )
    joined = KeptTokens.join(kept, [len(completion.tokens) for completion in completions])
    if joined is not None:
        tokens = torch.cat([completion.tokens for completion in completions])
        outside = tokens[~joined.contains(tokens)]
        if len(outside):
            raise UserError(f"rollouts.sampler, {rollouts.sampler}: token {outside[0]} is not in the kept set it was drawn from")
