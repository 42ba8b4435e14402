"""From scored groups to advantages: rewards as the algorithm shapes them, its estimator, and what it remembers of each prompt."""

import bisect
import functools
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from groupwise.algorithms import (
    Algorithm,
    Credit,
    Outcomes,
    adaptive_coefficient,
    soft_overlong_penalty,
    token_log_ratio,
)
from groupwise.algorithms.credit import per_token
from groupwise.errors import RunError
from groupwise.types import Batch, Group, LogprobBatch, Score, TrainingBatch, upgrade

Rewards = Mapping[str, Tensor]
"""What a completion's reward is the sum of, float64 [B] each: the task's, and the overlong punishment where there is one."""


def reward_parts(groups: Sequence[Group], algorithm: Algorithm, max_tokens: int) -> Rewards:
    """The rewards of every completion: verdicts priced by the algorithm, with its soft overlong punishment."""
    scores = [score for group in groups for score in group.scores]
    parts = {"task": torch.tensor([_priced(score, algorithm) for score in scores], dtype=torch.float64)}
    if algorithm.overlong_cache:
        lengths_B = torch.tensor([len(c.tokens) - c.lead for group in groups for c in group.completions])
        parts["overlong"] = soft_overlong_penalty(lengths_B, max_tokens, round(algorithm.overlong_cache * max_tokens))
    return parts


def _priced(score: Score, algorithm: Algorithm) -> float:
    if algorithm.outcome_rewards is None or score.verdict is None:
        return score.reward
    return algorithm.outcome_rewards[("correct", "wrong", "unparsed").index(score.verdict)]


def reward_components(groups: Sequence[Group], rewards: Rewards) -> tuple[list[str], Tensor, Tensor]:
    """What rewards consist of: names, values (float64 [B, K], NaN where a completion has no such one), weights (float64 [K]).

    The components of the task's reward as it names them ("task", where it names none), and what the algorithm adds
    ("algorithm/overlong").

    Raises:
        RunError: a component counts more in one completion than in another.
    """
    scores = [score for group in groups for score in group.scores]
    parts = {key: value.tolist() for key, value in rewards.items()}
    task = parts.pop("task")
    columns, weights = dict[str, list[float]](), dict[str, float]()
    for i, score in enumerate(scores):
        for name, value in (score.components or {"task": task[i]}).items() if score.failure is None else ():
            columns.setdefault(name, [math.nan] * len(scores))[i] = value
            weight = score.weights.get(name, 1.0)
            if weights.setdefault(name, weight) != weight:
                raise RunError(f"the reward {name!r} has weight {weights[name]:g} in one completion and {weight:g} in another")
    for name, values in parts.items():
        # Prefixed, since the task may have a component of the same name.
        columns[f"algorithm/{name}"], weights[f"algorithm/{name}"] = values, 1.0
    values_BK = torch.tensor(list(columns.values()), dtype=torch.float64).T
    return list(columns), values_BK, torch.tensor(list(weights.values()), dtype=torch.float64)


def weighted_parts(groups: Sequence[Group], rewards: Rewards) -> list[dict[str, float]]:
    """What the reward of each completion is the sum of, by name, each times its weight; empty where scoring failed.

    The components of the task's reward as it names them ("task", where it names none), and what the algorithm adds
    ("algorithm/overlong"). What components leave of the task's reward is its "remainder".
    """
    parts = {key: value.tolist() for key, value in rewards.items()}
    task = parts.pop("task")
    scores = [score for group in groups for score in group.scores]
    found: list[dict[str, float]] = []
    for i, score in enumerate(scores):
        if score.failure is not None:
            found.append({})
            continue
        named = {name: value * score.weights.get(name, 1.0) for name, value in score.components.items()} or {"task": task[i]}
        remainder = task[i] - sum(named.values())
        if not math.isclose(remainder, 0.0, abs_tol=1e-9 * max(1.0, abs(task[i]))):
            named["remainder"] = named.get("remainder", 0.0) + remainder
        found.append(named | {f"algorithm/{name}": values[i] + 0.0 for name, values in parts.items()})  # 0, and not -0
    return found


class CreditAssigner:
    """Gives batches their advantages; its state is what the algorithm remembers from step to step."""

    def __init__(self, algorithm: Algorithm, tokenizer: Any, max_tokens: int) -> None:
        self.algorithm, self.tokenizer, self.max_tokens = algorithm, tokenizer, max_tokens
        self.history: Mapping[str, Mapping[str, Any]] = {}
        """Of each prompt, for estimators that need it."""
        self.kl_coefficient = algorithm.kl_reward
        """The weight of the KL penalty in the reward, which follows `kl_target`."""

    def assign(
        self, batch: LogprobBatch, groups: Sequence[Group], rewards: Rewards, *, policy_moved: bool
    ) -> tuple[TrainingBatch, dict[str, float]]:
        """The batch with its advantages (and returns, for a critic), and metrics of the KL penalty.

        Args:
            batch: from these groups.
            rewards: from `reward_parts`.
            policy_moved: whether the policy has been updated yet; before, its KL to the reference is 0 by construction, and says
                nothing about the coefficient.
        """
        metrics: dict[str, float] = {}
        penalty_BT = torch.zeros(batch.mask_BT.shape, dtype=torch.float64)
        log_ratio_BT = self._penalised(batch)
        if log_ratio_BT is not None:
            kl = float(log_ratio_BT[batch.mask_BT].mean())
            if self.algorithm.kl_target is not None and policy_moved:
                self.kl_coefficient = adaptive_coefficient(self.kl_coefficient, kl, self.algorithm.kl_target)
            metrics = {"kl_reward/kl": kl, "kl_reward/coefficient": self.kl_coefficient}
            penalty_BT = self.kl_coefficient * log_ratio_BT.double()
        rows, credit = self._credit(batch, groups, rewards, penalty_BT, batch.values_BT)
        self.history = credit.history
        advantages_BT = torch.zeros(batch.mask_BT.shape)
        advantages_BT[rows] = per_token(credit.advantages, batch.mask_BT[rows]).float()
        returns_BT = None
        if credit.returns_BT is not None:
            returns_BT = torch.zeros(batch.mask_BT.shape)
            returns_BT[rows] = credit.returns_BT.float()
        return upgrade(TrainingBatch, batch, advantages_BT=advantages_BT, returns_BT=returns_BT), metrics

    def parts(self, batch: Batch, groups: Sequence[Group], rewards: Rewards) -> list[dict[str, float]]:
        """`weighted_parts`, and the KL penalty of each completion where there is one ("algorithm/kl").

        Args:
            batch: as `assign` returned it.
        """
        found = weighted_parts(groups, rewards)
        log_ratio_BT = self._penalised(batch) if isinstance(batch, LogprobBatch) else None
        if log_ratio_BT is not None:
            penalties = (self.kl_coefficient * log_ratio_BT.double()).sum(1).tolist()
            found = [part and part | {"algorithm/kl": -penalty} for part, penalty in zip(found, penalties, strict=True)]
        return found

    def _penalised(self, batch: LogprobBatch) -> Tensor | None:
        """log(π_old / π_ref), float [B, T], which the KL penalty in the reward is in proportion to; None: there is none."""
        if not self.algorithm.kl_reward or batch.ref_logprobs_BT is None:
            return None
        return token_log_ratio(batch.old_logprobs_BT, batch.ref_logprobs_BT, batch.mask_BT)

    def remember(self, batch: Batch, groups: Sequence[Group], rewards: Rewards) -> None:
        """Take groups into the history that are not trained on, so that every visit of a prompt counts once."""
        _, credit = self._credit(batch, groups, rewards, torch.zeros(batch.mask_BT.shape, dtype=torch.float64), None)
        self.history = credit.history

    def _credit(
        self, batch: Batch, groups: Sequence[Group], rewards: Rewards, penalty_BT: Tensor, values_BT: Tensor | None
    ) -> tuple[Tensor, Credit]:
        """The rows that count in the baseline (int64 [R]), and their credit.

        A completion that could not be scored does not count. One that overlong filtering took out of the loss also leaves its
        group's baseline, unless the algorithm says otherwise.
        """
        scored_B = torch.tensor([score.failure is None for group in groups for score in group.scores])
        counted_B = scored_B if self.algorithm.overlong_in_baseline else batch.mask_BT.any(1)
        rows = counted_B.nonzero()[:, 0]
        if len(rows) == 0:
            return rows, Credit(advantages=torch.zeros(0), history=self.history)
        rewards_B = torch.stack(list(rewards.values())).sum(0)
        ids = [group.problem.id for group in groups for _ in group.completions]
        steps = step_positions(groups, self.tokenizer) if "steps" in self.algorithm.needs else None
        shaped_B = rewards_B - penalty_BT.sum(1)
        turns = turn_positions(groups, shaped_B) if "turns" in self.algorithm.needs else None
        components = reward_components(groups, rewards) if "components" in self.algorithm.needs else None
        outcomes = Outcomes(
            rewards_B=shaped_B[rows],
            group_ids_B=batch.group_ids_B[rows],
            prompt_ids=[ids[i] for i in rows.tolist()],
            mask_BT=batch.mask_BT[rows],
            turn_rewards=[turns[i][0] for i in rows.tolist()] if turns else None,
            turn_ends=[turns[i][1] for i in rows.tolist()] if turns else None,
            components_BK=components[1][rows] if components else None,
            component_names=components[0] if components else (),
            component_weights_K=components[2] if components else None,
            step_rewards=[steps[i][0] for i in rows.tolist()] if steps else None,
            step_ends=[steps[i][1] for i in rows.tolist()] if steps else None,
            token_rewards_BT=(last_token(batch.mask_BT) * rewards_B[:, None] - penalty_BT)[rows],
            values_BT=values_BT[rows].double() if values_BT is not None else None,
            history=self.history,
        )
        credit = self.algorithm.advantage(outcomes)
        shapes = ((len(rows),), tuple(outcomes.mask_BT.shape))
        if tuple(credit.advantages.shape) not in shapes or not torch.isfinite(credit.advantages).all():
            name, shape = self.algorithm.choice("advantage"), tuple(credit.advantages.shape)
            raise RunError(f"the advantage {name} gave values that are not finite, or of shape {shape} and not one of {shapes}")
        return rows, credit

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "kl_coefficient": self.kl_coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history, self.kl_coefficient = state["history"], state["kl_coefficient"]


def last_token(mask_BT: Tensor) -> Tensor:
    """bool [B, T], True at each row's last trained token."""
    return mask_BT & (mask_BT.flip(1).cumsum(1).flip(1) == 1)


def turn_positions(groups: Sequence[Group], rewards_B: Tensor) -> list[tuple[list[float], list[int]]]:
    """For each completion the rewards of the policy's turns and the index of each turn's last token.

    `rewards_B`: of completions, the sum of their turns included; what no turn earned is the last one's.
    """
    result = []
    completions = [completion for group in groups for completion in group.completions]
    for completion, total in zip(completions, rewards_B.tolist(), strict=True):
        rewards = [turn.reward or 0.0 for turn in completion.said]
        rewards[-1] += total - sum(rewards)
        result.append((rewards, [turn.end - 1 for turn in completion.said]))
    return result


def step_positions(groups: Sequence[Group], tokenizer: Any) -> list[tuple[list[float], list[int]]]:
    """For each completion the rewards of its steps and the index of each step's last token.

    Tasks count a step's end in characters; the last step also owns what follows it, the end-of-sequence token.
    """
    lengths = functools.cache(lambda token: len(tokenizer.decode([token], skip_special_tokens=True)))
    result = []
    for group in groups:
        for completion, score in zip(group.completions, group.scores, strict=True):
            tokens = completion.tokens.tolist()
            reached = list(itertools.accumulate(lengths(token) for token in tokens))
            if reached[-1] != len(completion.text):  # some tokens are less than a character each
                starts = [tokenizer.decode(tokens[: t + 1], skip_special_tokens=True) for t in range(len(tokens))]
                reached = [len(os.path.commonprefix([start, completion.text])) for start in starts]  # noqa: RUF071 characters, as meant
            ends = [min(bisect.bisect_left(reached, end), len(tokens) - 1) for end, _ in score.steps]
            if ends:
                ends[-1] = len(tokens) - 1
            result.append(([reward for _, reward in score.steps], ends))
    return result
