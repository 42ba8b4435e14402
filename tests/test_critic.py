"""The critic: its values are its own network's, it learns its returns, and its step does not depend on the cut."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from groupwise.config import CriticSection, LearnerSection
from groupwise.learner.critic import Critic, value_losses
from groupwise.learner.micro_batches import cut_rows
from tests.conftest import owned, tiny_model
from tests.test_learner import random_batch


def make_critic(tokenizer: Any, **settings: Any) -> Critic:
    section = CriticSection(learning_rate=1e-2, value_clip=10.0)
    return Critic(owned(tiny_model("qwen3", tokenizer)), section, LearnerSection(**settings), updates=100)


def randomised(critic: Critic) -> Critic:
    torch.nn.init.normal_(critic.values_of.network["head"].weight)
    return critic


def test_values_start_at_zero_and_are_of_the_state_before_the_token(tokenizer: Any) -> None:
    critic = make_critic(tokenizer)
    batch = random_batch(tiny_model("qwen3", tokenizer))
    assert critic.values(batch).abs().max() == 0
    randomised(critic)
    values_BT = critic.values(batch)
    critic.learner = LearnerSection(share_prompts=False)
    torch.testing.assert_close(values_BT, critic.values(batch), rtol=0, atol=1e-4)
    for row, length in enumerate(batch.lengths_B.tolist()):
        prompt = batch.prompts[int(batch.group_ids_B[row])]
        tokens = torch.cat([prompt, batch.tokens_BT[row, :length]])
        hidden = critic.values_of.network["decoder"](input_ids=tokens[None]).last_hidden_state[0]
        expected = critic.values_of.network["head"](hidden)[len(prompt) - 1 : -1, 0]
        torch.testing.assert_close(values_BT[row, :length], expected, rtol=0, atol=1e-4)


def test_value_losses_by_hand() -> None:
    """Old 0, clip 0.2, return 1. At 0.5: the held value is 0.2, so (0.2 - 1)^2 / 2 = 0.32. At -0.5: 1.5^2 / 2 = 1.125."""
    values = torch.tensor([0.5, -0.5, 0.1])
    losses = value_losses(values, torch.zeros(3), torch.ones(3), 0.2)
    torch.testing.assert_close(losses, torch.tensor([0.32, 1.125, 0.405]))


def test_update_does_not_depend_on_the_cut_and_learns(tokenizer: Any) -> None:
    batch = random_batch(tiny_model("qwen3", tokenizer))
    returns = torch.where(batch.mask_BT, batch.tokens_BT.float() / 17, 0)
    batch = replace(batch, values_BT=torch.zeros_like(returns), returns_BT=returns)
    tokens = int(batch.mask_BT.sum())
    results = []
    for budget in (1, 10**6):
        critic = randomised(make_critic(tokenizer))
        torch.nn.init.constant_(critic.values_of.network["head"].weight, 0.01)
        results.append(critic.update((batch.select(rows) for rows in cut_rows(batch, budget, padded=False)), tokens))
    assert results[0]["critic/grad_norm"] == pytest.approx(results[1]["critic/grad_norm"], rel=1e-5)
    critic = make_critic(tokenizer)
    losses = [critic.update(iter([batch]), tokens)["critic/loss"] for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]
