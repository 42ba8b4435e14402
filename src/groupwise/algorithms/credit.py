"""From the rewards of a batch to advantages: the `advantage` part of an algorithm.

An estimator takes `Outcomes` and returns `Credit`. One of your own is such a function, or a frozen dataclass with settings; an
attribute `needs` says what it reads beyond a group's rewards.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from groupwise.algorithms import advantages
from groupwise.algorithms.part import Part, one_of


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
    turn_rewards: Sequence[Sequence[float]] | None = None
    """For each row, the reward of each of the policy's turns; they sum to `rewards_B`, whose rest is the last turn's."""
    turn_ends: Sequence[Sequence[int]] | None = None
    """For each row, the index of the last token of each of these turns."""
    components_BK: Tensor | None = None
    """float [B, K]: the parts of the task's reward and what the algorithm adds to it; NaN where one does not apply. The three
    are given where the estimator needs "components"."""
    component_names: Sequence[str] = ()
    component_weights_K: Tensor | None = None
    """float [K]: the reward is the sum of its parts times these."""
    step_rewards: Sequence[Sequence[float]] | None = None
    step_ends: Sequence[Sequence[int]] | None = None
    """B lists each, as in `process_advantages`; None where the task scores no steps."""
    token_rewards_BT: Tensor | None = None
    """float [B, T]: the reward on the last trained token, minus the KL penalty of each token."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimator(Part):
    """Base of the advantage estimators below, each called with `Outcomes` to give `Credit`."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """What it reads beyond a group's rewards: "components", "steps", "turns", "critic", "history"."""
    per_token: ClassVar[bool] = False
    """Whether advantages differ between the tokens of a completion."""
    compares_group: ClassVar[bool] = False
    """Whether a group of one completion would get nothing but zeros."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group(Estimator):
    """`group_advantages`."""

    center: Literal["group", "batch", "none"] = "group"
    """Whose mean is subtracted from a reward."""
    scale: Literal["group", "batch", "mean", "none"] = "group"
    """What it is divided by: the standard deviation of the group or of the batch, the group's mean, or nothing."""
    ddof: Literal[0, 1] = 1
    """A standard deviation divides by n - ddof."""
    advantage_eps: float = 1e-6
    """Added to the standard deviation."""

    @property
    def compares_group(self) -> bool:  # type: ignore[override]
        return self.center == "group"

    def contradictions(self) -> Iterable[tuple[str, bool, str]]:
        yield one_of(self, "center", ("group", "batch", "none"))
        yield one_of(self, "scale", ("group", "batch", "mean", "none"))
        yield one_of(self, "ddof", (0, 1))
        undivided = self.scale in ("mean", "none")
        yield "ddof", undivided and self.ddof != 1, f"is of a standard deviation, and scale = {self.scale!r} has none"
        yield (
            "advantage_eps",
            undivided and self.advantage_eps != 1e-6,
            f"is added to a standard deviation, and scale = {self.scale!r} has none",
        )
        mean_only = self.scale == "mean" and self.center != "group"
        yield "scale", mean_only, "dividing by the group's mean asks for center = 'group'"

    def __call__(self, outcomes: Outcomes) -> Credit:
        rewards_B, ids_B = outcomes.rewards_B, outcomes.group_ids_B
        settings: dict[str, Any] = {"center": self.center, "scale": self.scale, "ddof": self.ddof, "eps": self.advantage_eps}
        return Credit(advantages=advantages.group_advantages(rewards_B, ids_B, **settings))


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveOneOut(Estimator):
    """`leave_one_out_advantages`."""

    compares_group: ClassVar[bool] = True

    def __call__(self, outcomes: Outcomes) -> Credit:
        return Credit(advantages=advantages.leave_one_out_advantages(outcomes.rewards_B, outcomes.group_ids_B))


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoupled(Estimator):
    """`decoupled_advantages` over the components of the reward; a reward without components is one."""

    needs: ClassVar[frozenset[str]] = frozenset({"components"})
    compares_group: ClassVar[bool] = True
    ddof: Literal[0, 1] = 1
    """A standard deviation, of each component in its group and of the batch, divides by n - ddof."""
    advantage_eps: float = 1e-6
    """Added to those standard deviations."""

    def contradictions(self) -> Iterable[tuple[str, bool, str]]:
        yield one_of(self, "ddof", (0, 1))

    def __call__(self, outcomes: Outcomes) -> Credit:
        components_BK, weights_K = outcomes.components_BK, outcomes.component_weights_K
        if components_BK is None or weights_K is None:
            raise ValueError("rewards normalised one by one need the components of the rewards, and these have none")
        values_B = advantages.decoupled_advantages(
            components_BK, outcomes.group_ids_B, weights_K, ddof=self.ddof, eps=self.advantage_eps
        )
        return Credit(advantages=values_B)


@dataclass(frozen=True, slots=True, kw_only=True)
class Process(Estimator):
    """`process_advantages`, for tasks that score steps."""

    needs: ClassVar[frozenset[str]] = frozenset({"steps"})
    per_token: ClassVar[bool] = True
    ddof: Literal[0, 1] = 1
    """The standard deviation of the group's step rewards divides by n - ddof."""
    advantage_eps: float = 1e-6
    """Added to the standard deviation."""

    def contradictions(self) -> Iterable[tuple[str, bool, str]]:
        yield one_of(self, "ddof", (0, 1))

    def __call__(self, outcomes: Outcomes) -> Credit:
        if outcomes.step_rewards is None or outcomes.step_ends is None:
            raise ValueError("process supervision needs rewards of steps, and these completions have none")
        values_BT = advantages.process_advantages(
            outcomes.step_rewards,
            outcomes.step_ends,
            outcomes.group_ids_B,
            outcomes.mask_BT.shape[1],
            ddof=self.ddof,
            eps=self.advantage_eps,
        )
        return Credit(advantages=values_BT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns(Estimator):
    """`turn_advantages`, for conversations of several turns."""

    needs: ClassVar[frozenset[str]] = frozenset({"turns"})
    per_token: ClassVar[bool] = True
    compares_group: ClassVar[bool] = True
    gamma: float = 1.0
    """Discount per turn."""
    ddof: Literal[0, 1] = 1
    """The standard deviation of a group, over all turns, has one degree of freedom less for each turn if this is 1."""
    advantage_eps: float = 1e-6
    """Added to the standard deviation."""

    def contradictions(self) -> Iterable[tuple[str, bool, str]]:
        yield one_of(self, "ddof", (0, 1))
        yield "gamma", self.gamma > 1, "must lie in 0 to 1"

    def __call__(self, outcomes: Outcomes) -> Credit:
        if outcomes.turn_rewards is None or outcomes.turn_ends is None:
            raise ValueError("credit for turns needs the turns of completions")
        values_BT = advantages.turn_advantages(
            outcomes.turn_rewards,
            outcomes.turn_ends,
            outcomes.group_ids_B,
            outcomes.mask_BT.shape[1],
            gamma=self.gamma,
            ddof=self.ddof,
            eps=self.advantage_eps,
        )
        return Credit(advantages=values_BT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoothed(Estimator):
    """`smoothed_advantages`, which remembers every prompt's rewards."""

    needs: ClassVar[frozenset[str]] = frozenset({"history"})

    def __call__(self, outcomes: Outcomes) -> Credit:
        values, history = advantages.smoothed_advantages(
            outcomes.rewards_B, outcomes.group_ids_B, outcomes.prompt_ids, outcomes.history
        )
        return Credit(advantages=values, history=history)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gae(Estimator):
    """`gae` with a critic's values, whitened over the batch's trained tokens."""

    needs: ClassVar[frozenset[str]] = frozenset({"critic"})
    per_token: ClassVar[bool] = True
    gamma: float = 1.0
    """Discount per token."""
    gae_lambda: float = 0.95
    """Between one step of the critic's values (0) and the whole return (1)."""

    def contradictions(self) -> Iterable[tuple[str, bool, str]]:
        for key in ("gamma", "gae_lambda"):
            yield key, getattr(self, key) > 1, "must lie in 0 to 1"

    def __call__(self, outcomes: Outcomes) -> Credit:
        if outcomes.values_BT is None or outcomes.token_rewards_BT is None:
            raise ValueError("generalised advantage estimation needs a critic's values and rewards of tokens")
        values_BT, returns_BT = advantages.gae(
            outcomes.token_rewards_BT, outcomes.values_BT, outcomes.mask_BT, gamma=self.gamma, lam=self.gae_lambda
        )
        return Credit(advantages=advantages.whiten(values_BT, outcomes.mask_BT), returns_BT=returns_BT)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardToGo(Estimator):
    """The token rewards from each token on, whitened over the batch's trained tokens (REINFORCE++, arXiv 2501.03262, eq. 8-10).

    With a KL penalty in the reward, a token is charged for its own log ratio and those after it, not for those before.
    """

    per_token: ClassVar[bool] = True

    def __call__(self, outcomes: Outcomes) -> Credit:
        if outcomes.token_rewards_BT is None:
            raise ValueError("rewards to go need rewards of tokens")
        rewards_BT = torch.where(outcomes.mask_BT, outcomes.token_rewards_BT, 0)
        to_go_BT = rewards_BT.flip(1).cumsum(1).flip(1)
        return Credit(advantages=advantages.whiten(to_go_BT, outcomes.mask_BT))


def per_token(values: Tensor, mask_BT: Tensor) -> Tensor:
    """Advantages [B] or [B, T] as [B, T]: a completion's on each of its trained tokens, 0 where masked."""
    return torch.where(mask_BT, values if values.dim() == 2 else values[:, None], 0)
