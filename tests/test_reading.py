"""Completions to read: what a run records of them, how they are read, and the page's reader in Chromium."""

import pytest
import torch

from groupwise.algorithms import named
from groupwise.training.batching import make_batch
from groupwise.training.credit import CreditAssigner, reward_parts, weighted_parts
from groupwise.types import LogprobBatch, Score, upgrade
from tests.test_methods import group_of, two

# --- what a run records


def test_parts_are_weighted_and_sum_to_the_reward_that_was_trained_on() -> None:
    """The task's components times their weights. Of a limit of 4 tokens 2 are the overlong cache: a completion of 4 loses
    1. DAPO prices a wrong verdict at -1. What components leave of a reward is the remainder."""
    scores = [
        two(1, 0.2),
        two(0, None),
        Score(reward=0.0, correct=False, verdict="wrong"),
        Score.failed("raised"),
        Score(reward=1.0, components={"format": 0.25}),
    ]
    group = group_of(scores, lengths=[2, 4, 2, 2, 2])
    algorithm = named("dapo", overlong_cache=0.5)
    rewards = reward_parts([group], algorithm, 4)
    parts = weighted_parts([group], rewards)
    over = "algorithm/overlong"
    assert parts == [
        {"right": 1.0, "short": 0.1, over: 0.0},
        {"right": 0.0, over: -1.0},
        {"task": -1.0, over: 0.0},
        {},
        {"format": 0.25, "remainder": 0.75, over: 0.0},
    ]
    trained = sum(rewards.values()).tolist()  # type: ignore[union-attr]
    assert [sum(part.values()) for part in parts if part] == pytest.approx([trained[i] for i in (0, 1, 2, 4)])


def test_the_kl_penalty_is_a_part() -> None:
    """Two tokens with log(π_old / π_ref) = 0.5 each, and a coefficient of 0.1: the penalty is 0.1."""
    group, algorithm = group_of([Score(reward=1.0), Score.failed("raised")]), named("reinforce_pp", kl_reward=0.1)
    batch = make_batch([group], algorithm)
    zeros = torch.zeros(batch.tokens_BT.shape)
    batch = upgrade(LogprobBatch, batch, old_logprobs_BT=zeros, ref_logprobs_BT=zeros - 0.5)
    rewards, assigner = reward_parts([group], algorithm, 8), CreditAssigner(algorithm, None, 8)
    training, _ = assigner.assign(batch, [group], rewards, policy_moved=True)
    assert assigner.parts(training, [group], rewards) == [{"task": 1.0, "algorithm/kl": pytest.approx(-0.1)}, {}]
