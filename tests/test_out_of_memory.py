"""Memory that does not suffice: halved, done again, and the same result as with the smaller budget from the start."""

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.algorithms import named
from groupwise.config import LearnerSection
from groupwise.errors import RunError
from groupwise.learner.local import LocalLearner
from groupwise.learner.micro_batches import Budget
from groupwise.learner.optimiser import Optimiser
from groupwise.models import LanguageModel
from groupwise.rollouts.base import Request, Sampling, requests
from groupwise.rollouts.driver import generate_all
from groupwise.rollouts.native import NativeSampler
from groupwise.training import sft
from groupwise.types import Batch, TrainingBatch
from tests.conftest import owned, tiny_model
from tests.launcher import Launcher
from tests.test_learner import random_batch


def learner_of(module: Any, budget: int, algorithm: str = "dapo") -> LocalLearner:
    return LocalLearner(
        owned(module),
        named(algorithm),
        LearnerSection(micro_batch_tokens=budget, learning_rate=1e-2),
        updates=10,
        temperature=1.0,
        max_tokens=16,
    )


class Memory:
    """Of a device on which forward passes of more than so many rows fail, also after the first ones succeeded."""

    def __init__(self, patch: pytest.MonkeyPatch, rows: int) -> None:
        self.rows, self.failed = rows, 0
        forward = LanguageModel.completion_logprobs

        def limited(model: LanguageModel, part: Any, **options: Any) -> Any:
            if len(part) > self.rows:
                self.failed += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return forward(model, part, **options)

        patch.setattr(LanguageModel, "completion_logprobs", limited)


def trained(module: Any, batch: TrainingBatch, budget: int) -> tuple[LocalLearner, dict[str, Tensor], list[Any], Any]:
    """Two updates from the same weights: the learner, its weights, the records of its tokens, its metrics."""
    learner = learner_of(module, budget)
    records: list[Any] = []
    updates = [learner.update(batch, records.append) for _ in range(2)]
    return learner, {name: value.clone() for name, value in module.state_dict().items()}, records, updates


@pytest.mark.parametrize("fits", [1, 2, 3])
def test_the_update_is_that_of_the_smaller_budget(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, fits: int) -> None:
    batch = random_batch(tiny_model("llama", tokenizer))
    with monkeypatch.context() as patch:
        memory = Memory(patch, fits)
        halved, weights, records, updates = trained(tiny_model("llama", tokenizer), batch, 4096)
    assert memory.failed >= 1 and halved.budget.tokens < 4096
    _, expected, their_records, their_updates = trained(tiny_model("llama", tokenizer), batch, halved.budget.tokens)
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    assert len(records) == len(their_records)
    for ours, theirs in zip(records, their_records, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for update, other in zip(updates, their_updates, strict=True):
        assert update.latest["micro_batch_tokens"] == halved.budget.tokens and "micro_batch_tokens" not in other.latest
        assert replace(update, latest={}) == replace(other, latest={})


def test_log_probabilities_too(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    training = random_batch(tiny_model("llama", tokenizer))
    batch = Batch(**{item.name: getattr(training, item.name) for item in fields(Batch)})
    with monkeypatch.context() as patch:
        Memory(patch, 2)
        learner = learner_of(tiny_model("llama", tokenizer), 4096)
        found, _ = learner.compute_logprobs(batch)
    expected, _ = learner_of(tiny_model("llama", tokenizer), learner.budget.tokens).compute_logprobs(batch)
    assert torch.equal(found.old_logprobs_BT, expected.old_logprobs_BT)


def test_the_halved_budget_is_saved_unless_the_recipe_asks_for_another(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = random_batch(tiny_model("llama", tokenizer))
    with monkeypatch.context() as patch:
        Memory(patch, 2)
        learner = trained(tiny_model("llama", tokenizer), batch, 4096)[0]
    learner.save(tmp_path)
    for asked, expected in ((4096, learner.budget.tokens), (1000, 1000)):
        resumed = learner_of(tiny_model("llama", tokenizer), asked)
        resumed.load(tmp_path)
        assert resumed.budget.tokens == expected


def test_one_completion_that_does_not_fit_stops_the_run(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny_model("llama", tokenizer)
    learner, batch = learner_of(module, 4096), random_batch(module)
    Memory(monkeypatch, 0)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    learner.begin_step()
    with pytest.raises(RunError, match=r"out of memory with a single completion of .* learner\.checkpointing"):
        learner.update(batch)
    assert learner.take_back()
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_memory_that_is_gone_before_the_first_micro_batch_stops_the_run(tokenizer: Any) -> None:
    """Although an earlier batch was cut into micro-batches of many rows: halving would go on for ever."""
    budget, batch = Budget(4096), random_batch(tiny_model("llama", tokenizer))
    assert budget.fit(lambda: [len(rows) for rows, _ in budget.cut(batch, padded=True)], lambda: None)[0] > 1
    tries: list[int] = []

    def work() -> None:
        tries.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.raises(RunError, match=r"before the first micro-batch: CUDA out of memory.*\[model\.lora\]"):
        budget.fit(work, lambda: None)
    assert len(tries) == 1 and budget.tokens == 4096


def test_the_warm_start_halves_its_micro_batches_too(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(tokens: int) -> tuple[Budget, float, list[Tensor]]:
        model, budget = owned(tiny_model("llama", tokenizer)), Budget(tokens, "less")
        optimiser = Optimiser(
            model.parameters(),
            learning_rate=0.01,
            updates=5,
            warmup_steps=0,
            schedule="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
        )
        loss = sft.train_step(model, optimiser, batch, budget)
        return budget, loss, [parameter.detach().clone() for parameter in model.parameters()]

    batch = random_batch(tiny_model("llama", tokenizer))
    with monkeypatch.context() as patch:
        memory = Memory(patch, 2)
        budget, loss, weights = trained(4096)
        assert memory.failed >= 1 and budget.tokens < 4096
        memory.rows = 0
        with pytest.raises(RunError, match=r"out of memory with a single completion of .*: less take less"):
            trained(4096)
    _, expected, theirs = trained(budget.tokens)
    assert loss == expected and all(torch.equal(ours, other) for ours, other in zip(weights, theirs, strict=True))


def test_the_optimisers_own_memory(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    module = tiny_model("llama", tokenizer)
    learner, batch = learner_of(module, 4096), random_batch(module)
    learner.begin_step()
    with pytest.raises(RunError, match=r"out of memory in the optimiser's step: .* two moments"):
        learner.update(batch)
    assert not learner.take_back()  # which weights it has changed is not known


@pytest.mark.parametrize("most", [12, 7, 4])
def test_generation_goes_on_with_fewer_rows(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Also when memory runs out in the middle, with some requests finished and some in the queue."""
    model = owned(tiny_model("llama", tokenizer))
    prompts = [torch.tensor(tokenizer(f"{i}+{i * i}=").input_ids) for i in range(7)]
    asked = requests(prompts, 3, Sampling(max_tokens=12, temperature=1.0), seed=5)
    expected = generate_all(NativeSampler(model, tokenizer), asked)
    sampler = NativeSampler(model, tokenizer)
    made, failed = model.decoding_cache, []

    def cache(*arguments: Any, **options: Any) -> Any:
        found, steps = made(*arguments, **options), iter(range(1000))
        step = found.step

        def limited(tokens_R: Tensor) -> Tensor:
            if next(steps) >= 3 and len(tokens_R) > most:
                failed.append(len(tokens_R))
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes")
            return step(tokens_R)  # type: ignore[no-any-return]

        found.step = limited
        return found

    monkeypatch.setattr(model, "decoding_cache", cache)
    for ours, theirs in zip(generate_all(sampler, asked), expected, strict=True):
        for completion, other in zip(ours, theirs, strict=True):
            assert torch.equal(completion.tokens, other.tokens) and torch.equal(completion.logprobs, other.logprobs)
            assert completion.versions == other.versions
    assert failed and sampler.max_rows < 21
    for asked_rows, rows in ((1024, sampler.max_rows), (512, 512)):  # a resumed run takes it up, unless its recipe asks anew
        resumed = NativeSampler(model, tokenizer, max_rows=asked_rows)
        resumed.load_rows(sampler.rows())
        assert resumed.max_rows == rows
    most = 2
    with pytest.raises(RunError, match=r"out of memory with one prompt and its 3 completions: .*rollouts\.group_size"):
        generate_all(sampler, asked)


def test_what_was_kept_of_completions_is_given_up_first(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out while anything is kept, and again with rows that are kept as they finish."""
    model = owned(tiny_model("llama", tokenizer))
    sampler = NativeSampler(model, tokenizer)
    prompt = torch.tensor(tokenizer("1+1=").input_ids)
    asked = [Request(prompt=prompt, sampling=Sampling(max_tokens=12), seed=seed, n=3, keep=True) for seed in range(2)]
    expected = [generate_all(sampler, [request])[0] for request in asked]
    assert len(sampler._kept) == 6
    advance, failed = NativeSampler._advance, []

    def limited(self: NativeSampler) -> None:
        if len(self._kept) > 3:
            failed.append(len(self._kept))
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes")
        advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(NativeSampler, "_advance", limited)
        again = [generate_all(sampler, [request])[0] for request in asked]
    assert failed and sampler.max_rows == 1024
    for ours, theirs in zip(again, expected, strict=True):
        assert [one.tokens.tolist() for one in ours] == [one.tokens.tolist() for one in theirs]


def test_what_is_kept_is_bounded_in_memory(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = NativeSampler(owned(tiny_model("llama", tokenizer)), tokenizer)
    asked = Request(prompt=torch.tensor([3, 4, 5]), sampling=Sampling(max_tokens=12), seed=0, n=8, keep=True)
    generate_all(sampler, [asked])
    kept = sampler._kept
    sizes = [one.prefix.nbytes for one in kept._kept.values()]
    assert len(sizes) == 8 and kept._bytes == sum(sizes)
    kept._most_bytes = sum(sizes[-3:]) + 1
    kept.drop([next(iter(kept._kept))])
    generate_all(sampler, [replace(asked, n=1, seed=1)])
    assert len(kept) <= 4 and kept._bytes == sum(one.prefix.nbytes for one in kept._kept.values()) <= kept._most_bytes
    kept.clear()
    assert kept._bytes == 0


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    made = Launcher()
    yield made
    made.close()


LIMIT = """
import resource
import groupwise.learner.local as local
update = local.LocalLearner.update
def limited(self, *arguments):
    if self.version == 0:
        used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmSize"))
        resource.setrlimit(resource.RLIMIT_AS, (used + 32 * 2**20, resource.RLIM_INFINITY))
    return update(self, *arguments)
local.LocalLearner.update = limited
"""


def test_a_process_with_too_little_memory_trains_on(launcher: Launcher, tmp_path: Path) -> None:
    """A real allocation that fails: the address space of the process is limited."""
    out = tmp_path / "run"
    sets = ["training.steps=1", "training.eval_problems=4", "learner.micro_batch_tokens=400000", "training.tokens_every=0"]
    sets += ["rollouts.group_size=48", "rollouts.prompts_per_step=32", "rollouts.max_tokens=16", "learner.minibatches=1"]
    arguments = ["train", "grpo", "--out", out, *(part for item in sets for part in ("--set", item))]
    process = launcher.start(arguments, tmp_path / "log", before=LIMIT)
    assert process.ends(120) == 0, process.text
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert {event["name"] for event in events} == {"out_of_memory"}
    assert "learner.micro_batch_tokens = " in events[0]["advice"] and events[0]["text"] in process.text
