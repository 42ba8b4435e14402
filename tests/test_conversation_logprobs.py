"""Conversations sampled turn by turn, against one forward pass over each: equal log-probabilities, no gradient where masked."""

import asyncio
import os
import random

import pytest
import torch
from torch import Tensor

import groupwise as gw
from groupwise.algorithms import NAMED
from groupwise.models import Call, Chat, Conversations, LanguageModel, new_module
from groupwise.rollouts.base import Request, Sampling
from groupwise.rollouts.native import NativeSampler
from groupwise.types import pad_rows
from tests import chat_templates
from tests.test_conversation import random_replies, text

COUNT = int(os.environ.get("GROUPWISE_CONVERSATIONS", "64"))
"""1,000 takes a few minutes."""
Row = tuple[Tensor, Tensor, Tensor, int]
"""A conversation: tokens [T], mask [T], log-probabilities as sampled [T], tokens of the prompt."""


@pytest.fixture(scope="module")
def talk() -> Conversations:
    schema = {"type": "object", "properties": {"query": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "search", "description": "", "parameters": schema}}
    return Conversations(Chat.build(chat_templates.tokenizer("qwen2.5")), [tool])


@pytest.fixture(scope="module")
def model(talk: Conversations) -> LanguageModel:
    """A random Llama of two layers that ends about one turn in three by itself."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    architecture = {"model_type": "llama", "max_position_embeddings": 2048, **sizes}
    module = new_module(architecture, talk.chat.tokenizer, seed=3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2.5)
        module.lm_head.weight[talk.stop_tokens[0]] *= 8
    return LanguageModel(module)


async def converse(talk: Conversations, sampler: NativeSampler, seed: int) -> Row:
    chance = random.Random(seed)
    S = talk.prompt("Question" + text(chance))
    prompt, mask, logprobs, handle = len(S), torch.zeros(len(S), dtype=torch.bool), torch.zeros(len(S)), None
    turns = chance.randrange(2, 5)
    for turn in range(turns):
        sampling = Sampling(max_tokens=chance.randrange(4, 13), stop_tokens=talk.stop_tokens)
        request = Request(prompt=S, sampling=sampling, seed=seed, offset=16 * turn, keep=turn < turns - 1, continues=handle)
        (said,) = await sampler.generate(request)
        handle = said.handle
        calls = [Call("search", {}, f"{i:09d}") for i in range(chance.randrange(3))]
        follows = talk.after(said.tokens, random_replies(calls, chance)) if turn < turns - 1 else S[:0]
        S = torch.cat([S, said.tokens, follows])
        mask = torch.cat([mask, torch.ones(len(said.tokens), dtype=torch.bool), torch.zeros(len(follows), dtype=torch.bool)])
        logprobs = torch.cat([logprobs, said.logprobs, torch.zeros(len(follows))])
    return S, mask, logprobs, prompt


@pytest.fixture(scope="module")
def rows(talk: Conversations, model: LanguageModel) -> list[Row]:
    sampler = NativeSampler(model, talk.chat.tokenizer, max_rows=256)

    async def all_of_them() -> list[Row]:
        return list(await asyncio.gather(*(converse(talk, sampler, seed) for seed in range(COUNT))))

    return asyncio.run(all_of_them())


def test_log_probabilities_equal_those_of_one_forward_pass(talk: Conversations, model: LanguageModel, rows: list[Row]) -> None:
    worst, turns, ended = 0.0, 0, 0
    for start in range(0, len(rows), 50):
        batch = rows[start : start + 50]
        tokens_BT = pad_rows([row[0] for row in batch])
        with torch.no_grad():  # transformers itself, with nothing of ours in between
            logits = model.module(tokens_BT[:, :-1]).logits.log_softmax(-1)
        expected_BT = logits.gather(-1, tokens_BT[:, 1:, None])[..., 0]
        for i, (tokens, mask, sampled, _) in enumerate(batch):
            at = mask.nonzero()[:, 0]
            worst = max(worst, float((expected_BT[i, at - 1] - sampled[at]).abs().max()))
            turns += int((mask[1:] & ~mask[:-1]).sum())
            ended += int(torch.isin(tokens[mask], torch.tensor(talk.stop_tokens)).sum())
    print(f"{len(rows)} conversations, {turns} turns, {ended} of them ended by the model: largest difference {worst:.1e}")
    assert worst < 1e-5
    assert 0.1 * turns < ended < 0.9 * turns, "both turns that end and turns that are truncated"


@pytest.mark.parametrize("name", sorted(NAMED))
def test_no_gradient_goes_through_masked_positions(model: LanguageModel, rows: list[Row], name: str) -> None:
    """The gradient of the loss in the log-probabilities is exactly zero there, and in the weights it is the same bits whatever
    the other log-probabilities and advantages of masked tokens are."""
    algorithm = gw.named(name)
    batch = rows[:4]
    tokens_BT, mask_BT = pad_rows([row[0] for row in batch]), pad_rows([row[1] for row in batch])
    old_BT = pad_rows([row[2] for row in batch])
    advantages = torch.tensor([1.0, -1.0] * 2)
    gradients = []
    for garbage in (0.0, 7.0):
        model.module.zero_grad()
        logits = model.module(tokens_BT[:, :-1]).logits.log_softmax(-1)
        logprobs_BT = torch.nn.functional.pad(logits.gather(-1, tokens_BT[:, 1:, None])[..., 0], (1, 0))
        logprobs_BT.retain_grad()
        old = torch.where(mask_BT, old_BT + 0.1 * torch.arange(4)[:, None] / 4, torch.full_like(old_BT, -garbage))
        loss, _ = gw.policy_loss(
            algorithm,
            logprobs_BT,
            old,
            advantages[:, None].where(mask_BT, torch.tensor(garbage)) if algorithm_takes_tokens(name) else advantages,
            mask_BT,
            group_ids_B=torch.arange(4) // 2,
            ref_logprobs_BT=old,
        )
        loss.backward()
        assert logprobs_BT.grad is not None
        assert (logprobs_BT.grad[~mask_BT] == 0).all() and (logprobs_BT.grad[mask_BT] != 0).any()
        gradients.append([parameter.grad.clone() for parameter in model.module.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


def algorithm_takes_tokens(name: str) -> bool:
    return name in ("gspo_token", "grpo_process", "ppo")
