"""From the rewards of a batch to advantages: the `advantage` part of an algorithm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from groupwise.algorithms import advantages

if TYPE_CHECKING:
    from groupwise.algorithms.algorithm import Algorithm


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """What is known of a batch once it is scored. Rows are completions."""

    rewards_B: Tensor
    """float [B], shaped."""
    group_ids_B: Tensor
    """int [B]."""
    prompt_ids: Sequence[str]
    """B identities of prompts, the same at each visit."""
    mask_BT: Tensor
    """bool [B, T], True where a token is trained on."""
    step_rewards: Sequence[Sequence[float]] | None = None
    step_ends: Sequence[Sequence[int]] | None = None
    """B lists each, as in `process_advantages`; None where the task scores no steps."""
    token_rewards_BT: Tensor | None = None
    """float [B, T]: the reward on the last trained token, a KL penalty on each; for a critic."""
    values_BT: Tensor | None = None
    """float [B, T], the critic's values before the update."""
    history: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What earlier steps remembered of each prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """Advantages, and what an estimate leaves behind."""

    advantages: Tensor
    """float [B], or [B, T] where tokens differ."""
    history: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """For the next step."""
    returns_BT: Tensor | None = None
    """What the critic learns to predict."""


def group(outcomes: Outcomes, settings: "Algorithm") -> Credit:
    values = advantages.group_advantages(
        outcomes.rewards_B,
        outcomes.group_ids_B,
        center=settings.center,
        scale=settings.scale,
        ddof=settings.ddof,
        eps=settings.advantage_eps,
    )
    return Credit(advantages=values)


def leave_one_out(outcomes: Outcomes, settings: "Algorithm") -> Credit:
    return Credit(advantages=advantages.leave_one_out_advantages(outcomes.rewards_B, outcomes.group_ids_B))


def process(outcomes: Outcomes, settings: "Algorithm") -> Credit:
    if outcomes.step_rewards is None or outcomes.step_ends is None:
        raise ValueError("process supervision needs rewards of steps, and these completions have none")
    values_BT = advantages.process_advantages(
        outcomes.step_rewards,
        outcomes.step_ends,
        outcomes.group_ids_B,
        outcomes.mask_BT.shape[1],
        ddof=settings.ddof,
        eps=settings.advantage_eps,
    )
    return Credit(advantages=values_BT)


def smoothed(outcomes: Outcomes, settings: "Algorithm") -> Credit:
    values, history = advantages.smoothed_advantages(
        outcomes.rewards_B, outcomes.group_ids_B, outcomes.prompt_ids, outcomes.history
    )
    return Credit(advantages=values, history=history)


def gae(outcomes: Outcomes, settings: "Algorithm") -> Credit:
    if outcomes.values_BT is None or outcomes.token_rewards_BT is None:
        raise ValueError("generalised advantage estimation needs a critic's values and rewards of tokens")
    values_BT, returns_BT = advantages.gae(
        outcomes.token_rewards_BT, outcomes.values_BT, outcomes.mask_BT, gamma=settings.gamma, lam=settings.gae_lambda
    )
    return Credit(advantages=advantages.whiten(values_BT, outcomes.mask_BT), returns_BT=returns_BT)


def spread(values: Tensor, mask_BT: Tensor) -> Tensor:
    """Advantages [B] or [B, T] as [B, T], 0 where masked."""
    return torch.where(mask_BT, values if values.dim() == 2 else values[:, None], 0)
