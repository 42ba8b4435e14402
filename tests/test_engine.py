"""The native engine: any number of requests at once give what each gives alone, and each prompt is computed once."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.models.attention.decoding import DecodingCache
from groupwise.rollouts.base import Request, Sampling, requests
from groupwise.rollouts.driver import gather, generate_all, wait_for
from groupwise.rollouts.native import NativeSampler
from groupwise.types import Completion
from tests.conftest import owned, tiny_model


def close(ours: Completion, theirs: Completion) -> None:
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-4)
    assert (ours.text, ours.stop) == (theirs.text, theirs.stop)


def random_requests(count: int, seed: int) -> list[Request]:
    """Prompts of 1 to 30 tokens, groups of 1 to 6, limits of 1 to 25 tokens, three ways of sampling."""
    rng = random.Random(seed)
    ways: list[dict[str, Any]] = [{}, {"temperature": 0.6}, {"top_k": 4, "stop": ("12",)}]
    return [
        Request(
            prompt=torch.tensor([rng.randint(2, 16) for _ in range(rng.randint(1, 30))]),
            sampling=Sampling(max_tokens=rng.randint(1, 25), **rng.choice(ways)),
            seed=rng.randint(0, 5),
            offset=rng.randint(0, 100),
            n=rng.randint(1, 6),
        )
        for _ in range(count)
    ]


@pytest.fixture
def prefills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every prompt that is computed, those that continue something left out."""
    lengths: list[int] = []
    original = DecodingCache.prefill

    def counted(cache: DecodingCache, prompts: list[Tensor], counts: list[int]) -> Tensor:
        lengths.extend(len(prompt) for prompt in prompts)
        return original(cache, prompts, counts)

    monkeypatch.setattr(DecodingCache, "prefill", counted)
    return lengths


@pytest.mark.parametrize("max_rows", [7, 1024])
@pytest.mark.parametrize("architecture", ["qwen3", "gemma", "gemma2"])
def test_requests_that_come_while_others_run_give_what_each_gives_alone(
    architecture: str, max_rows: int, tokenizer: Any, prefills: list[int]
) -> None:
    """In random order and at random times; Gemma 2 takes padded batches, where they wait for each other."""
    model = owned(tiny_model(architecture, tokenizer))
    asked = random_requests(30, seed=1)
    alone = [generate_all(NativeSampler(model, tokenizer), [request])[0] for request in asked]
    prefills.clear()
    engine, rng = NativeSampler(model, tokenizer, max_rows=max_rows), random.Random(2)

    async def late(request: Request) -> tuple[Completion, ...]:
        for _ in range(rng.randint(0, 40)):
            await asyncio.sleep(0)
        return await engine.generate(request)

    together = wait_for(gather(*(late(request) for request in asked)))
    for ours, theirs in zip(together, alone, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            close(one, other)
    if model.decoder.packs():
        assert sorted(prefills) == sorted(len(request.prompt) for request in asked), "each prompt is computed once for its group"
    assert engine.health() == {"version": 0.0, "waiting": 0.0, "rows": 0.0, "kept": 0.0, "steps": engine.health()["steps"]}


def test_requests_cancelled_at_random_leave_the_others_as_they_are(tokenizer: Any) -> None:
    model = owned(tiny_model("qwen3", tokenizer))
    asked = random_requests(40, seed=3)
    alone = [generate_all(NativeSampler(model, tokenizer), [request])[0] for request in asked]
    engine, rng = NativeSampler(model, tokenizer, max_rows=20), random.Random(4)

    async def run() -> list[Any]:
        tasks = [asyncio.ensure_future(engine.generate(request)) for request in asked]
        doomed = [task for task in tasks if rng.random() < 0.5]
        for task in doomed:
            for _ in range(rng.randint(0, 8)):
                await asyncio.sleep(0)
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = wait_for(run())
    cancelled = [isinstance(result, asyncio.CancelledError) for result in found]
    assert any(cancelled) and not all(cancelled)
    for result, theirs in zip(found, alone, strict=True):
        if not isinstance(result, asyncio.CancelledError):
            for one, other in zip(result, theirs, strict=True):
                close(one, other)
    assert engine.health()["rows"] == 0


def converse(sampler: NativeSampler, *, keep: bool) -> list[list[Completion]]:
    """Four conversations of three turns from one group, and one from another, each with its own words between turns."""
    sampling = Sampling(max_tokens=10)

    async def conversation(prompt: Tensor, first: Completion, which: int) -> list[Completion]:
        said, so_far, turns = first, prompt, [first]
        for turn in range(2):
            words = torch.tensor([3 + which, 4 + turn, 5])
            so_far = torch.cat([so_far, said.tokens, words])
            handle = said.handle if keep else None
            request = Request(prompt=so_far, sampling=sampling, seed=100 + which, offset=turn * 10, keep=keep, continues=handle)
            said = (await sampler.generate(request))[0]
            turns.append(said)
        return turns

    async def group(prompt: Tensor, n: int, first: int) -> list[list[Completion]]:
        opening = await sampler.generate(Request(prompt=prompt, sampling=sampling, seed=first, n=n, keep=keep))
        return await gather(*(conversation(prompt, one, first + i) for i, one in enumerate(opening)))

    async def run() -> list[list[list[Completion]]]:
        return await gather(group(torch.tensor([7, 12, 5, 15, 9]), 4, 0), group(torch.tensor([8, 14]), 1, 4))

    return [turns for found in wait_for(run()) for turns in found]


@pytest.mark.parametrize("architecture", ["qwen3", "gemma"])
def test_a_conversation_reuses_keys_and_values_and_says_the_same(
    architecture: str, tokenizer: Any, prefills: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = owned(tiny_model(architecture, tokenizer))
    expected = converse(NativeSampler(model, tokenizer), keep=False)
    prefills.clear()
    suffixes: list[int] = []
    original = DecodingCache.extend

    def counted(cache: DecodingCache, prefixes: Any, rest: list[Tensor], counts: list[int]) -> Tensor:
        suffixes.extend(len(suffix) for suffix in rest)
        return original(cache, prefixes, rest, counts)

    monkeypatch.setattr(DecodingCache, "extend", counted)
    sampler = NativeSampler(model, tokenizer)
    found = converse(sampler, keep=True)
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            close(one, other)
    assert sorted(prefills) == [2, 5], "only the two openings are computed as a whole"
    assert suffixes == [4] * 10, "the newest token, which had no key yet, and three words"
    assert sampler.health()["kept"] == 5
    sampler.load(model, 1)
    assert sampler.health()["kept"] == 0, "keys of earlier weights are dropped"


def test_a_handle_that_does_not_fit_its_prompt_is_ignored(tokenizer: Any) -> None:
    sampler = NativeSampler(owned(tiny_model("qwen3", tokenizer)), tokenizer)
    opening = Request(prompt=torch.tensor([7, 12]), sampling=Sampling(max_tokens=5), seed=0, keep=True)
    handle = generate_all(sampler, [opening])[0][0].handle
    other = Request(prompt=torch.tensor([9, 9, 9, 9, 9, 9, 9, 9]), sampling=Sampling(max_tokens=5), seed=0)
    expected = generate_all(sampler, [other])[0][0]
    close(generate_all(sampler, [replace(other, continues=handle)])[0][0], expected)


def test_weights_that_change_on_the_way_are_told_by_spans(tokenizer: Any) -> None:
    module = tiny_model("qwen3", tokenizer)
    model = owned(module)
    sampler = NativeSampler(model, tokenizer)
    endless = Request(prompt=torch.tensor([7, 12]), sampling=Sampling(max_tokens=12), seed=0, n=8)

    async def run() -> tuple[Completion, ...]:
        task = asyncio.ensure_future(sampler.generate(endless))
        for _ in range(5):
            await asyncio.sleep(0)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(-0.9)
        sampler.load(model, 3)
        return await task

    completions = wait_for(run())
    long = [completion for completion in completions if len(completion.tokens) > 6]
    assert long
    for completion in long:
        (first, second), T = completion.versions, len(completion.tokens)
        assert (first.version, second.version) == (0, 3) and (first.start, second.end) == (0, T) and first.end == second.start
        assert completion.oldest_version == 0


def test_bad_requests_are_refused(tokenizer: Any) -> None:
    sampler = NativeSampler(owned(tiny_model("qwen3", tokenizer)), tokenizer)
    good = Request(prompt=torch.tensor([7]), sampling=Sampling(max_tokens=3), seed=0)
    for bad in (
        replace(good, prompt=torch.tensor([], dtype=torch.long)),
        replace(good, n=0),
        replace(good, sampling=Sampling(max_tokens=0)),
    ):
        with pytest.raises(ValueError, match="at least one token"):
            generate_all(sampler, [bad])


def test_a_model_that_diverges_fails_every_request_and_the_engine_recovers(tokenizer: Any) -> None:
    from groupwise.errors import RunError

    module = tiny_model("qwen3", tokenizer)
    sampler = NativeSampler(owned(module), tokenizer)
    asked = requests([torch.tensor([7, 12]), torch.tensor([5])], 2, Sampling(max_tokens=4), 0)
    expected = generate_all(sampler, asked)
    remove: Callable[[], None] = module.base_model.norm.register_forward_hook(lambda *found: found[-1] * float("nan")).remove
    with pytest.raises(RunError, match="logits of the next token are not finite"):
        generate_all(sampler, asked)
    remove()
    for ours, theirs in zip(generate_all(sampler, asked), expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            close(one, other)


def test_a_running_event_loop_is_no_obstacle(tokenizer: Any) -> None:
    """As in a notebook."""
    sampler = NativeSampler(owned(tiny_model("qwen3", tokenizer)), tokenizer)
    asked = requests([torch.tensor([7, 12])], 2, Sampling(max_tokens=4), 0)

    async def cell() -> list[tuple[Completion, ...]]:
        return generate_all(sampler, asked)

    assert [c.text for c in asyncio.run(cell())[0]] == [c.text for c in generate_all(sampler, asked)[0]]


def test_limits_alone_do_not_split_a_batch(tokenizer: Any) -> None:
    sampler = NativeSampler(owned(tiny_model("qwen3", tokenizer)), tokenizer)
    sizes: list[int] = []
    original = sampler._draw_with

    def counted(drawing: Any, slots_R: Tensor, hidden_RH: Tensor) -> Any:
        sizes.append(len(slots_R))
        return original(drawing, slots_R, hidden_RH)

    sampler._draw_with = counted  # type: ignore[method-assign]
    asked = [Request(prompt=torch.tensor([7, 12]), sampling=Sampling(max_tokens=3 + i), seed=i) for i in range(6)]
    generate_all(sampler, asked)
    assert sizes[0] == 6


def test_a_prefill_that_fails_fails_its_requests(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none waits for ever."""
    sampler = NativeSampler(owned(tiny_model("qwen3", tokenizer)), tokenizer)

    def failing(*_: Any) -> Tensor:
        raise RuntimeError("no memory for this prompt")

    monkeypatch.setattr("groupwise.models.attention.decoding.DecodingCache.prefill", failing)
    monkeypatch.setattr("groupwise.models.caches.Caches.why_not_ours", lambda *_: None)
    sampler.model.decoder.packs()
    with pytest.raises(RuntimeError, match="no memory for this prompt"):
        asyncio.run(asyncio.wait_for(sampler.generate(requests([torch.tensor([3, 4])], 2, Sampling(max_tokens=3), 0)[0]), 20))
    assert sampler.health()["waiting"] == 0
