"""A GPU whose memory does not suffice: PyTorch is allowed only so much of it. Needs PyTorch, transformers and pytest only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.models import LanguageModel, character_tokenizer
from groupwise.rollouts.base import Sampling, requests
from groupwise.rollouts.driver import generate_all
from groupwise.rollouts.native import NativeSampler
from groupwise.types import Completion, TrainingBatch
from tests.test_gpu import DEVICE, FLOAT32, as_batch, learner, tiny

pytestmark = pytest.mark.gpu


@contextmanager
def room_for(mib: int) -> Iterator[None]:
    """Within: so much memory beyond what is allocated now."""
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + mib * 2**20
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info()[1])
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.fixture(scope="module")
def characters() -> Any:
    return character_tokenizer("0123456789abcdefghijklmnopqrstuvwxyz+-*=\n")


def long_batch(vocabulary: int, groups: int = 16, size: int = 16, length: int = 120) -> TrainingBatch:
    generator = torch.Generator().manual_seed(0)

    def completion() -> Completion:
        tokens = torch.randint(2, vocabulary, (length,), generator=generator)
        mask = torch.ones(length, dtype=torch.bool)
        return Completion(text="", tokens=tokens, logprobs=mask * -3.0, mask=mask, stop="length", versions=())

    prompts = [torch.randint(2, vocabulary, (20,), generator=generator) for _ in range(groups)]
    return as_batch(prompts, [tuple(completion() for _ in range(size)) for _ in range(groups)])


def test_micro_batches_are_halved_until_they_fit(characters: Any) -> None:
    batch = long_batch(len(characters))

    def updated(budget: int) -> tuple[int, dict[str, Tensor]]:
        module = tiny("qwen3", characters, FLOAT32)
        made = learner(LanguageModel(module), micro_batch_tokens=budget)
        made.update(batch)
        return made.budget.tokens, {name: value.detach().cpu() for name, value in module.named_parameters()}

    updated(512)  # what is compiled and allocated once
    with room_for(200):
        budget, weights = updated(100_000)
        assert budget < 40_000, "all of it fitted"
        again, expected = updated(budget)
    assert again == budget
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)


def test_generation_begins_again_with_fewer_rows(characters: Any) -> None:
    model = LanguageModel(tiny("qwen3", characters, FLOAT32))
    prompts = [torch.randint(2, len(characters), (30,), generator=torch.Generator().manual_seed(i)) for i in range(32)]
    asked = requests([prompt.to(DEVICE) for prompt in prompts], 16, Sampling(max_tokens=200, temperature=1.0), seed=1)
    generate_all(NativeSampler(model, characters), asked[:1])
    sampler = NativeSampler(model, characters)
    model.affordable_rows = lambda *_, **__: 1024.0  # type: ignore[method-assign]  # as if others took memory since it was asked
    with room_for(120):  # all of it would take some 210 MiB
        found = generate_all(sampler, asked)
    assert sampler.max_rows < 512, "all of it fitted"
    assert [len(group) for group in found] == [16] * 32
