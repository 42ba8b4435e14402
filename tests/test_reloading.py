"""Weights that change while requests run: no key, value or state of theirs outlives the weights that made it."""

import asyncio
from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.models import LanguageModel
from groupwise.rollouts.base import Request, Sampling
from groupwise.rollouts.driver import gather, wait_for
from groupwise.rollouts.native import NativeSampler
from groupwise.types import Completion
from tests import zoo


def logprobs(module: Any, prompt: Tensor, tokens: Tensor) -> Tensor:
    """Of each token, by one forward pass over the whole sequence."""
    with torch.no_grad():
        logits = module(input_ids=torch.cat([prompt, tokens])[None].to(module.device), use_cache=False).logits[0].float().cpu()
    return torch.log_softmax(logits, -1)[len(prompt) - 1 : -1].gather(1, tokens[:, None])[:, 0]


def disturb(module: Any, seed: int) -> None:
    """Other weights of the same size, in place."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=random)
            parameter.add_(0.3 * parameter.abs().mean() * noise.to(parameter))


REQUESTS = [
    Request(prompt=torch.tensor([7, 12, 5, 9, 11]), sampling=Sampling(max_tokens=14), seed=0, n=3, keep=True),
    Request(prompt=torch.tensor([8, 14]), sampling=Sampling(max_tokens=9, temperature=0.7), seed=1, n=2, keep=True),
    Request(prompt=torch.arange(3, 25), sampling=Sampling(max_tokens=14, top_k=5), seed=2, keep=True),
    Request(prompt=torch.tensor([4, 4, 13]), sampling=Sampling(max_tokens=14), seed=3, n=2),
]
"""Of six rows at once the last request waits for two to be done."""


def reload_twice(sampler: NativeSampler, module: Any) -> tuple[list[tuple[Completion, ...]], list[Any]]:
    """The completions of requests during which weights change twice, and the three states of the weights."""
    states = [{name: tensor.clone() for name, tensor in module.state_dict().items()}]

    async def run() -> list[tuple[Completion, ...]]:
        tasks = asyncio.ensure_future(gather(*(sampler.generate(request) for request in REQUESTS)))
        for version in (1, 2):
            while sampler.health()["steps"] < 5 * version:
                await asyncio.sleep(0)
            disturb(module, version)
            states.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
            sampler.load(sampler.model, version)
        return await tasks

    return wait_for(run()), states


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("backend", ["auto", "transformers"])
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "deepseek_v3", "qwen3_next", "lfm2", "mamba2", "gpt2"])
def test_tokens_after_a_load_are_those_of_the_new_weights_alone(name: str, backend: str, device: str) -> None:
    module = zoo.build(name).to(device)
    sampler = NativeSampler(LanguageModel(module, backend), zoo.tokenizer(), max_rows=6)
    found, states = reload_twice(sampler, module)
    spans = 0
    for request, group in zip(REQUESTS, found, strict=True):
        for completion in group:
            assert [span.start for span in completion.versions] == [0, *(span.end for span in completion.versions[:-1])]
            assert completion.versions[-1].end == len(completion.tokens)
            for span in completion.versions if request.sampling == Sampling(max_tokens=14) else ():
                module.load_state_dict(states[span.version])
                expected = logprobs(module, request.prompt, completion.tokens)[span.start : span.end]
                torch.testing.assert_close(completion.logprobs[span.start : span.end], expected, rtol=0, atol=1e-4)
                spans += 1
    assert spans >= 8, "some rows should have lived through both changes"
    if backend == "auto" and not sampler.model.decoder.recurrent:
        continues_on_new_weights(sampler, module, found)


def continues_on_new_weights(sampler: NativeSampler, module: Any, found: list[tuple[Completion, ...]]) -> None:
    """What was kept after the last change can be continued, and nothing that was kept before."""
    completion = max(found[0], key=lambda one: one.handle or 0)
    assert completion.handle is not None and sampler.health()["kept"]
    prompt = torch.cat([REQUESTS[0].prompt, completion.tokens, torch.tensor([9])])
    request = Request(prompt=prompt, sampling=Sampling(max_tokens=6), seed=9, continues=completion.handle)
    kept = sampler.health()["kept"]
    said = wait_for(sampler.generate(request))[0]
    assert sampler.health()["kept"] == kept - 1, "it was continued"
    torch.testing.assert_close(said.logprobs, logprobs(module, prompt, said.tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "backend"), [("qwen3", "auto"), ("qwen3", "transformers"), ("gpt2", "transformers"), ("qwen3_next", "auto")]
)
def test_the_tokens_that_are_computed_anew_at_once_are_few(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one request are cut too; where memory does not suffice, more so, and as many rows are generated as before."""
    module = zoo.build(name)
    sampler = NativeSampler(LanguageModel(module, backend), zoo.tokenizer(), max_rows=6)
    monkeypatch.setattr("groupwise.rollouts.native.TOKENS_AT_ONCE", 100)
    seen: list[int] = []
    make = sampler.model.decoding_cache

    def limited(*arguments: Any, **options: Any) -> Any:
        cache = make(*arguments, **options)
        restore = cache.restore

        def of_few(prompts: list[Tensor], rows: list[list[Tensor]]) -> Tensor:
            tokens = sum(map(len, prompts)) + sum(len(row) for of_prompt in rows for row in of_prompt)
            if tokens > 14 and sum(map(len, rows)) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            seen.append(tokens)
            found: Tensor = restore(prompts, rows)
            return found

        cache.restore = of_few
        return cache

    monkeypatch.setattr(sampler.model, "decoding_cache", limited)
    found, states = reload_twice(sampler, module)
    assert len(seen) > 4 and sampler.max_rows == 6
    for request, group in zip(REQUESTS[::3], found[::3], strict=True):
        for completion in group:
            for span in completion.versions:
                module.load_state_dict(states[span.version])
                expected = logprobs(module, request.prompt, completion.tokens)[span.start : span.end]
                torch.testing.assert_close(completion.logprobs[span.start : span.end], expected, rtol=0, atol=1e-4)
