"""What only a CUDA device can show: FlashAttention, flex attention, captured decoding steps, and tiny models through all of them.

Needs PyTorch, transformers and pytest only. Tests in
bfloat16 come first, since those in float32 wait for flex attention to compile.
"""

import copy
import gc
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.algorithms import named
from groupwise.learner.local import LocalLearner
from groupwise.models import LanguageModel, character_tokenizer, new_module
from groupwise.models.attention import training_flex, training_varlen
from groupwise.models.attention.training import PackedAttention
from groupwise.models.attention.training_varlen import VarlenLayout
from groupwise.rollouts.base import Sampling, requests
from groupwise.rollouts.driver import generate_all
from groupwise.rollouts.native import NativeSampler
from groupwise.types import Batch, Completion, TrainingBatch, pad_rows

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 256,
    "max_position_embeddings": 512,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": SIZES,
    "llama": SIZES,
    "gemma2": {**SIZES, "sliding_window": 24, "query_pre_attn_scalar": 64},
    "qwen3_moe": {
        **SIZES,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "decoder_sparse_step": 1,
    },
}
PLAIN = ("qwen3", "llama")
"""Models that must run in the fastest way; others may fall back, and say why."""
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def characters() -> Any:
    return character_tokenizer("0123456789abcdefghijklmnopqrstuvwxyz+-*=\n")


def tiny(architecture: str, tokenizer: Any, dtype: torch.dtype) -> Any:
    """Random weights, larger than the usual start, so that distributions are far from flat."""
    module = new_module({"model_type": architecture, **MODELS[architecture]}, tokenizer, seed=1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
            parameter.data = parameter.data.to(dtype)  # buffers keep float32, as in `LanguageModel.copy`
    return module.to(DEVICE)


def as_batch(prompts: list[Tensor], groups: list[tuple[Completion, ...]]) -> TrainingBatch:
    rows = [completion for group in groups for completion in group]
    logprobs_BT = pad_rows([row.logprobs for row in rows])
    mask_BT = pad_rows([row.mask for row in rows])
    advantages_B = torch.linspace(-1, 1, len(rows))
    return TrainingBatch(
        rows_B=torch.arange(len(rows)),
        prompts=tuple(prompts),
        group_ids_B=torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group) for group in groups])),
        tokens_BT=pad_rows([row.tokens for row in rows]),
        lengths_B=torch.tensor([len(row.tokens) for row in rows]),
        mask_BT=mask_BT,
        rollout_logprobs_BT=logprobs_BT,
        old_logprobs_BT=logprobs_BT,
        advantages_BT=torch.where(mask_BT, advantages_B[:, None], 0.0),
    )


def random_batch(vocabulary: int, lengths: tuple[int, ...] = (60, 1, 30, 97, 5, 64)) -> tuple[list[Tensor], TrainingBatch]:
    """Two prompts, of 130 and 7 tokens, with three completions each."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, vocabulary, (n,), generator=generator) for n in (130, 7)]
    rows = [torch.randint(2, vocabulary, (n,), generator=generator) for n in lengths]
    completions = [
        Completion(
            text="",
            tokens=row,
            logprobs=torch.full((len(row),), -3.0),
            mask=torch.ones(len(row), dtype=torch.bool),
            stop="length",
            versions=(),
        )
        for row in rows
    ]
    return prompts, as_batch(prompts, [tuple(completions[:3]), tuple(completions[3:])])


def row_by_row(module: Any, batch: Batch) -> Tensor:
    """The log-probabilities [B, T] of each row alone, unpadded, through the model's own forward; differentiable."""
    rows = []
    for row, length in enumerate(batch.lengths_B.tolist()):
        prompt = batch.prompts[int(batch.group_ids_B[row])]
        tokens = torch.cat([prompt, batch.tokens_BT[row, :length]]).to(DEVICE)
        logits = module(input_ids=tokens[None], use_cache=False).logits[0]
        logprobs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, FLOAT32)), -1)[len(prompt) - 1 : -1]
        rows.append(logprobs.gather(1, tokens[len(prompt) :, None])[:, 0])
    return pad_rows(rows)


def weighted(logprobs_BT: Tensor) -> Tensor:
    """A loss that weights every token differently."""
    return (logprobs_BT * torch.linspace(-1, 1, logprobs_BT.numel(), device=logprobs_BT.device).view(logprobs_BT.shape)).sum()


def gradients(module: Any, loss: Tensor) -> list[Tensor]:
    module.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]


def error(ours: Tensor, exact: Tensor) -> float:
    """Relative, in the root mean square."""
    ours, exact = ours.detach().double(), exact.detach().double()
    return float((ours - exact).norm() / exact.norm().clamp(min=1e-12))


def sampled(model: LanguageModel, tokenizer: Any, **settings: Any) -> tuple[list[Tensor], list[tuple[Completion, ...]]]:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(2, len(tokenizer), (n,), generator=generator) for n in (40, 7, 2)]
    sampler = NativeSampler(model, tokenizer, max_rows=settings.pop("max_rows", 1024))
    n = settings.pop("group_size", 6)
    return prompts, generate_all(sampler, requests(prompts, n, Sampling(**{"max_tokens": 140, **settings}), 5))


# --- attention alone


def attention_case(dtype: torch.dtype, heads: int, shared: int, size: int) -> tuple[Any, list[Tensor], Tensor]:
    """The layout of three prompts and five completions, one of them without a token, random inputs, and an output gradient."""
    prompts, owners, lengths = [200, 1, 130], torch.tensor([0, 0, 2, 1, 1]), torch.tensor([140, 3, 300, 60, 0])
    layout = torch.tensor(prompts), owners, lengths
    N = sum(prompts) + int(lengths.sum())
    shapes = (N, heads, size), (N, heads // shared, size), (N, heads // shared, size)
    torch.manual_seed(0)
    inputs = [torch.randn(shape, device=DEVICE).to(dtype).requires_grad_() for shape in shapes]
    return layout, inputs, torch.randn(shapes[0], device=DEVICE).to(dtype)


def exact_attention(layout: Any, inputs: list[Tensor], scale: float, window: int) -> Tensor:
    """In float64, over all N x N pairs of tokens."""
    query, key, value = (x.double() for x in inputs)
    tokens = torch.arange(len(query), device=DEVICE)
    seen = training_flex.visible(*layout, DEVICE)(tokens, tokens, tokens[:, None], tokens[None])
    place = PackedAttention(layout[0].tolist(), layout[1], layout[2], DEVICE).positions_N
    if window:
        seen = seen & (place[:, None] - place[None] < window)
    times = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(times, 1) for x in (key, value))
    scores = (torch.einsum("qhd,khd->hqk", query, key) * scale).masked_fill(~seen, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize(("heads", "shared", "size"), [(4, 2, 64), (16, 2, 128), (2, 1, 256)])
def test_flash_attention_is_the_exact_attention(heads: int, shared: int, size: int, window: int) -> None:
    layout, inputs, gradient = attention_case(BFLOAT16, heads, shared, size)
    assert training_varlen.unsupported(*inputs) is None
    found = training_varlen.attention(*inputs, VarlenLayout(*layout, DEVICE), 0.1, window)
    expected = exact_attention(layout, inputs, 0.1, window)
    assert error(found, expected) < 0.01
    ours, exact = (torch.autograd.grad(x, inputs, gradient.to(x.dtype)) for x in (found, expected))
    for one, other in zip(ours, exact, strict=True):
        assert one.dtype == BFLOAT16 and error(one, other) < 0.02


def test_gradients_of_copies_are_summed_in_float32() -> None:
    """One prompt token with 511 completions: in bfloat16 a sum of ones would stay at 256."""
    layout = VarlenLayout(torch.tensor([1]), torch.zeros(511).long(), torch.ones(511).long(), DEVICE)
    ones = torch.ones(1 + 2 * 511, 2, 64, dtype=BFLOAT16, device=DEVICE)
    sums = layout.sum_copies(ones)
    assert sums.dtype == BFLOAT16 and float(sums[0, 0, 0]) == 512
    assert (sums[1:] == 1).all()


# --- models in bfloat16


@pytest.mark.parametrize("architecture", MODELS)
def test_bfloat16_is_as_exact_as_transformers(architecture: str, characters: Any) -> None:
    """Against the same weights in float32, one row at a time: no further from them than transformers in bfloat16, times two."""
    module = tiny(architecture, characters, BFLOAT16)
    exact = copy.deepcopy(module).float()
    model = LanguageModel(module)
    _, batch = random_batch(len(characters))
    print(architecture, model.backends(), model.fallback())
    if architecture in PLAIN:
        assert model.decoder.packs(), model.decoder.reasons
    exact_BT = row_by_row(exact, batch)
    plain_BT = row_by_row(module, batch)
    ours_BT, _ = model.completion_logprobs(batch.to(DEVICE))
    ours_BT = ours_BT.to(exact_BT.device)
    slack = 0.05 if architecture == "qwen3_moe" else 0.002  # a token near a tie may go to another expert
    assert error(ours_BT, exact_BT) < 2 * error(plain_BT, exact_BT) + slack
    expected = gradients(exact, weighted(exact_BT))
    plain = gradients(module, weighted(plain_BT))
    ours = gradients(module, weighted(ours_BT))
    for (name, _), one, other, right in zip(module.named_parameters(), ours, plain, expected, strict=True):
        if float(right.abs().max()) > 1e-6:
            assert error(one, right) < 2 * error(other, right) + 10 * slack, name


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("settings", [{}, {"max_rows": 8, "group_size": 6}], ids=["at once", "joining"])
def test_samples_have_the_learners_logprobs(
    architecture: str, settings: dict[str, Any], characters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding steps beyond a window of the cache's tokens, on captured graphs, with rows that end and rows that join."""
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(1), replay(graph))[1])
    model = LanguageModel(tiny(architecture, characters, BFLOAT16))
    print(architecture, model.backends(), model.fallback())
    if architecture in PLAIN:
        assert model.decoder.packs(), model.decoder.reasons
        assert model.why_not_decoding() is None
        assert "CUDA graphs" in model.backends()["decoding"]
    replays.clear()
    prompts, groups = sampled(model, characters, **settings)
    batch = as_batch(prompts, groups)
    with torch.no_grad():
        logprobs_BT = model.completion_logprobs(batch.to(DEVICE))[0].cpu()
    gap_N = (logprobs_BT - batch.rollout_logprobs_BT).abs()[batch.mask_BT]
    print(f"{len(gap_N)} tokens, {len(replays)} graph replays, gap mean {float(gap_N.mean()):.4f}, max {float(gap_N.max()):.4f}")
    assert int(batch.lengths_B.max()) > 1 and float(gap_N.mean()) < 0.05
    if architecture in PLAIN:
        assert len(replays) >= int(batch.lengths_B.max()) - 1


def test_a_rollouts_memory_goes_back(characters: Any) -> None:
    """Cache and graphs are freed with the rollout, without Python's search for cycles, and do not add up."""
    model = LanguageModel(tiny("qwen3", characters, BFLOAT16))
    sampled(model, characters)
    gc.collect()
    before = torch.cuda.memory_allocated()
    gc.disable()
    try:
        for _ in range(3):
            sampled(model, characters)
        assert torch.cuda.memory_allocated() - before < 2**20
    finally:
        gc.enable()


def learner(model: LanguageModel, **settings: Any) -> LocalLearner:
    usual: dict[str, Any] = {
        "learning_rate": 1e-3,
        "minibatches": 1,
        "warmup_steps": 0,
        "schedule": "constant",
        "betas": [0.9, 0.999],
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "micro_batch_tokens": 300,
        "precision": "float32",
        "checkpointing": False,
        "share_prompts": True,
        "old_logprobs": "sampler",
        "max_bad_updates": 5,
    }
    section: Any = SimpleNamespace(**{**usual, **settings})
    return LocalLearner(model, named("dapo", overlong_cache=0.0), section, updates=10, temperature=1.0, max_tokens=140)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("kind", ["bfloat16 weights", "autocast"])
def test_an_update_is_that_of_a_cpu_in_float32(kind: str, checkpointing: bool, characters: Any) -> None:
    _, batch = random_batch(len(characters))
    module = tiny("qwen3", characters, BFLOAT16 if kind == "bfloat16 weights" else FLOAT32)
    exact = learner(LanguageModel(copy.deepcopy(module).float().cpu(), "torch"))
    old_BT = exact._logprobs(exact.model, batch)[0]
    batch = replace(batch, old_logprobs_BT=old_BT)
    precision = "float32" if kind == "bfloat16 weights" else "bfloat16"
    ours = learner(LanguageModel(module), precision=precision, checkpointing=checkpointing)
    before = [parameter.clone() for parameter in module.parameters()]
    found, expected = ours.update(batch).step, exact.update(batch).step
    print(found, expected)
    assert ours.version == 1
    assert found["loss"] == pytest.approx(expected["loss"], abs=0.02)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.05)
    assert any((old != new).any() for old, new in zip(before, module.parameters(), strict=True))


# --- float32, through flex attention, whose kernels are compiled first (also for the update under autocast)


@pytest.mark.parametrize(("heads", "shared", "size"), [(4, 2, 64)])
def test_flex_attention_is_the_exact_attention(heads: int, shared: int, size: int) -> None:
    layout, inputs, gradient = attention_case(FLOAT32, heads, shared, size)
    assert "not torch.float32" in str(training_varlen.unsupported(*inputs))
    packed = PackedAttention(layout[0].tolist(), layout[1], layout[2], DEVICE)
    found, expected = packed(0, *inputs, 0.1), exact_attention(layout, inputs, 0.1, 0)
    assert error(found, expected) < 3e-5
    ours, exact = (torch.autograd.grad(x, inputs, gradient.to(x.dtype)) for x in (found, expected))
    for one, other in zip(ours, exact, strict=True):
        assert error(one, other) < 3e-5


@pytest.mark.parametrize("architecture", MODELS)
def test_float32_is_each_row_alone(architecture: str, characters: Any) -> None:
    module = tiny(architecture, characters, FLOAT32)
    model = LanguageModel(module)
    print(architecture, model.backends(), model.fallback())
    if architecture in PLAIN:
        assert model.decoder.packs(), model.decoder.reasons
    _, batch = random_batch(len(characters))
    expected_BT = row_by_row(module, batch)
    ours_BT = model.completion_logprobs(batch.to(DEVICE))[0].to(expected_BT.device)
    torch.testing.assert_close(ours_BT.detach(), expected_BT.detach(), rtol=0, atol=2e-4)
    expected = gradients(module, weighted(expected_BT))
    ours = gradients(module, weighted(ours_BT))
    for (name, _), one, other in zip(module.named_parameters(), ours, expected, strict=True):
        if float(other.abs().max()) > 1e-6:
            assert error(one, other) < 1e-3, name


@pytest.mark.parametrize("architecture", PLAIN)
def test_float32_samples_have_the_learners_logprobs(architecture: str, characters: Any) -> None:
    model = LanguageModel(tiny(architecture, characters, FLOAT32))
    assert model.why_not_decoding() is None
    prompts, groups = sampled(model, characters)
    batch = as_batch(prompts, groups)
    with torch.no_grad():
        logprobs_BT = model.completion_logprobs(batch.to(DEVICE))[0].cpu()
    torch.testing.assert_close(logprobs_BT, batch.rollout_logprobs_BT, rtol=0, atol=1e-3)


@pytest.mark.parametrize("top_p", [0.3, 0.95])
def test_truncated_sampling_is_replayed_as_on_a_cpu(top_p: float, characters: Any) -> None:
    """The sampler's log-probabilities over its kept sets are the learner's, whose gradients are those of a CPU."""
    model = LanguageModel(tiny("qwen3", characters, FLOAT32))
    prompts, groups = sampled(model, characters, top_p=top_p)
    batch = replace(as_batch(prompts, groups), kept=tuple(row.kept for group in groups for row in group))
    on_cpu = LanguageModel(copy.deepcopy(model.module).cpu())
    ours_BT, _ = model.completion_logprobs(batch.to(DEVICE))
    theirs_BT, _ = on_cpu.completion_logprobs(batch)
    torch.testing.assert_close(ours_BT.detach().cpu(), batch.rollout_logprobs_BT, rtol=0, atol=1e-3)
    torch.testing.assert_close(ours_BT.detach().cpu(), theirs_BT.detach(), rtol=0, atol=1e-3)
    ours, theirs = gradients(model.module, weighted(ours_BT)), gradients(on_cpu.module, weighted(theirs_BT))
    for mine, other in zip(ours, theirs, strict=True):
        assert error(mine.cpu(), other) < 1e-3


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_adapters_are_sampled_trained_and_switched_off(dtype: torch.dtype, characters: Any) -> None:
    """Captured decoding steps call the layers with adapters, and see them after an update; the base keeps its bits."""
    pytest.importorskip("peft")
    from groupwise.models.adapters import add_adapters

    module = tiny("qwen3", characters, dtype)
    model = LanguageModel(add_adapters(module, SimpleNamespace(rank=4, alpha=8.0, targets=[]), seed=0))
    assert all(p.dtype == FLOAT32 and p.device == DEVICE for p in model.parameters() if p.requires_grad)
    before = {name: p.detach().clone() for name, p in model.module.named_parameters() if not p.requires_grad}
    prompts, batch = random_batch(model.config.vocab_size)
    batch = batch.to(DEVICE)
    with torch.no_grad():
        start = model.completion_logprobs(batch)[0]
        for name, parameter in model.module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
        moved = model.completion_logprobs(batch)[0]
        with model.adapters_off():
            assert torch.equal(model.completion_logprobs(batch)[0], start)
    assert not torch.allclose(moved, start, atol=1e-2)
    sampler = NativeSampler(model, characters)
    groups = generate_all(sampler, requests(prompts, 8, Sampling(max_tokens=40), 0))
    sampled = as_batch(prompts, groups).to(DEVICE)
    with torch.no_grad():
        gap = (model.completion_logprobs(sampled)[0] - sampled.rollout_logprobs_BT).abs()[sampled.mask_BT]
    assert float(gap.mean()) < (1e-4 if dtype == FLOAT32 else 0.05)
    after = {name: p for name, p in model.module.named_parameters() if not p.requires_grad}
    assert all(torch.equal(after[name], value) for name, value in before.items())
