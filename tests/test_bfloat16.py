"""Linear layers in bfloat16 on a CPU: rounded inputs and weights, float32 sums, in the learner and in the sampler."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.kernels import blocked_bf16, compiled
from groupwise.kernels.blocked_bf16 import blocked_matmul_bf16, to_blocked_bf16, why_not_bf16
from groupwise.kernels.compiled import library, unavailable
from groupwise.models import Backend, LanguageModel, head
from groupwise.models.attention.decoding import DecodingCache
from groupwise.models.bfloat16 import RoundedWeights, rounded_forwards
from groupwise.models.head import token_logprobs
from groupwise.models.patches import patched
from groupwise.rollouts.native import NativeSampler
from tests.conftest import forget_kernels, need_kernels, owned, tiny_model
from tests.test_head import model_of
from tests.test_learner import gradients_of, random_batch
from tests.test_sampler import PROMPTS, as_batch, groups_of
from tests.zoo import build
from tests.zoo import tokenizer as zoo_tokenizer

needs_bf16 = pytest.mark.skipif(why_not_bf16() is not None, reason=why_not_bf16() or "")


def rounded(x: Tensor) -> Tensor:
    """In float64, so that products and sums of such numbers are as good as exact."""
    return x.detach().to(torch.bfloat16).double()


@needs_bf16
@pytest.mark.parametrize("rows", [1, 7, 48, 61, 130])
@pytest.mark.parametrize(("K", "N"), [(2, 1), (20, 31), (192, 64), (2050, 33)])
@pytest.mark.parametrize("biased", [True, False])
def test_a_matmul_is_that_of_the_rounded_inputs_with_float32_sums(rows: int, K: int, N: int, biased: bool) -> None:
    x, weight, bias = torch.randn(rows, K), torch.randn(N, K), torch.randn(N) if biased else None
    wide = rounded(x) @ rounded(weight).T + (0 if bias is None else bias.double())
    blocked = to_blocked_bf16(weight)
    found = blocked_matmul_bf16(x.bfloat16(), blocked, bias, N)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wide, rtol=0, atol=2e-7 * K**0.5 * float(wide.abs().max()) + 1e-6)
    alone = blocked_matmul_bf16(x[rows // 2 :][:1].bfloat16(), blocked, bias, N)
    assert torch.equal(alone[0], found[rows // 2]), "a row is the same bits when it is alone"


@needs_bf16
def test_a_matmul_is_the_same_bits_with_any_number_of_threads() -> None:
    x, weight, threads, found = torch.randn(2, 90, 70).bfloat16(), torch.randn(200, 70), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(blocked_matmul_bf16(x, to_blocked_bf16(weight), None, 200))
    finally:
        torch.set_num_threads(threads)
    assert found[0].shape == (2, 90, 200)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_bf16
def test_the_gradients_of_a_layer_are_those_of_the_rounded_tensors() -> None:
    layer, x, gradient = torch.nn.Linear(30, 20), torch.randn(3, 50, 30, requires_grad=True), torch.randn(3, 50, 20)
    with patched(rounded_forwards([layer], RoundedWeights())):
        layer(x).backward(gradient)
    assert x.grad is not None and layer.weight.grad is not None and layer.bias.grad is not None
    wide = {
        "x": rounded(gradient) @ rounded(layer.weight),
        "weight": torch.einsum("btn,btk->nk", rounded(gradient), rounded(x)),
        "bias": gradient.double().sum((0, 1)),
    }
    for name, found in {"x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}.items():
        assert found.dtype == torch.float32
        # Sums are float32; what the layer returns is rounded to bfloat16 once, by half a unit in the last of 8 bits.
        assert ((found.double() - wide[name]).abs() <= 2**-8 * wide[name].abs() + 1e-5).all(), name


@needs_bf16
def test_an_input_is_rounded_once_for_several_layers_and_again_when_it_has_changed() -> None:
    copies, x = RoundedWeights(), torch.ones(4)
    first = copies.input(x)
    assert copies.input(x) is first
    x += 1
    assert copies.input(x).tolist() == [2, 2, 2, 2]


@needs_bf16
@pytest.mark.parametrize("at_once", [40, 32 * 64, 2**20])
def test_the_output_layer_takes_the_softmax_of_float32_logits(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """In blocks of 32 columns or of all; rounding the logits themselves to bfloat16 would be wrong by 0.01."""
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", {"cpu": at_once})
    torch.manual_seed(0)
    layer, hidden, targets = torch.nn.Linear(64, 333), 4 * torch.randn(32, 64), torch.randint(333, (32,))
    exact_NV = torch.log_softmax((rounded(hidden) @ rounded(layer.weight).T + layer.bias.double()) / 0.7, -1)
    logprobs, entropy = token_logprobs(model_of(layer), hidden, targets, 0.7, rounded=RoundedWeights())
    torch.testing.assert_close(logprobs.double(), exact_NV[range(32), targets], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(exact_NV.exp() * exact_NV).sum(-1), rtol=0, atol=1e-4)


@needs_bf16
@pytest.mark.parametrize("settings", [{}, {"checkpointing": True}, {"share_prompts": False}])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen3_moe"])
def test_gradients_in_bfloat16_are_near_those_in_float32(tokenizer: Any, architecture: str, settings: dict[str, Any]) -> None:
    model = tiny_model(architecture, tokenizer)
    assert owned(model).bfloat16.why_not() is None
    batch = random_batch(model)
    exact, rough = (
        torch.cat([g.flatten() for g in gradients_of(model, batch, precision=p, **settings)]) for p in ("float32", "bfloat16")
    )
    assert rough.dtype == torch.float32
    assert 1e-4 < (rough - exact).norm() / exact.norm() < 0.1
    assert not any("forward" in vars(module) for module in model.modules())


@needs_bf16
def test_checkpointing_recomputes_the_same_bits(tokenizer: Any) -> None:
    model = tiny_model("qwen3", tokenizer)
    batch = random_batch(model)
    for share in (True, False):
        once, twice = (
            gradients_of(model, batch, precision="bfloat16", checkpointing=c, share_prompts=share) for c in (False, True)
        )
        for mine, theirs in zip(once, twice, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@needs_bf16
@pytest.mark.parametrize(("architecture", "one_call"), [("qwen3", True), ("qwen3", False), ("llama", True), ("qwen3_moe", False)])
def test_sampler_and_learner_in_bfloat16_hardly_differ(tokenizer: Any, architecture: str, one_call: bool) -> None:
    """Both round at the same places; where float32 sums differ in their last bit, now and then an input rounds the other way."""
    module = tiny_model(architecture, tokenizer)
    model = LanguageModel(module, Backend(one_call_step=one_call))
    sampler = NativeSampler(model, tokenizer, dtype=torch.bfloat16)
    assert sampler.model.decoder.bf16_step and sampler.model.dtype == torch.float32
    completion = groups_of(sampler, 4)[0][0]
    assert ("one C++ call" in sampler.model.backends()["decoding"]) == one_call
    assert sampler.model.decoder.packs() and sampler.model.why_not_decoding() is None, "trials while it decodes are in float32"
    tokens = torch.cat([PROMPTS[0], completion.tokens])

    def logprobs(model: Any) -> Tensor:
        logits = model(input_ids=tokens[None]).logits[0].float()
        return torch.log_softmax(logits, -1)[len(PROMPTS[0]) - 1 : -1].gather(1, completion.tokens[:, None])[:, 0]

    with torch.no_grad():
        exact = logprobs(module)
        with patched(rounded_forwards(list(module.modules()), RoundedWeights())):
            same = logprobs(module)
    gaps = [float((completion.logprobs - other).abs().mean()) for other in (same, exact)]
    assert 0 < gaps[1] < 0.1
    assert gaps[0] < 0.02
    assert not any("forward" in vars(inner) for inner in module.modules())


@needs_bf16
@pytest.mark.parametrize("name", ["falcon_h1", "qwen3_next", "zamba2"])
def test_recurrent_models_agree_too(name: str) -> None:
    """Their Linear layers run in bfloat16; zamba2 trains in packed sequences and generates without a cache of ours."""
    model = LanguageModel(build(name))
    assert model.bfloat16.why_not() is None
    sampler = NativeSampler(model, zoo_tokenizer(), dtype=torch.bfloat16)
    batch = as_batch(groups_of(sampler, 4))
    assert ("layer by layer" in sampler.model.backends()["decoding"]) == (name != "zamba2")

    def gap(precision: str, share_prompts: bool = True) -> float:
        with torch.no_grad(), model.running(precision=precision):
            logprobs_BT, _ = model.completion_logprobs(batch, share_prompts=share_prompts)
        return float((logprobs_BT - batch.rollout_logprobs_BT)[batch.mask_BT].abs().mean())

    assert 1e-3 < gap("float32") < 0.1
    assert max(gap("bfloat16"), gap("bfloat16", share_prompts=False)) < 0.1 * gap("float32")


@needs_bf16
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_in_one_call_is_that_of_the_layers_with_any_cache_dtype(tokenizer: Any, cache_dtype: torch.dtype) -> None:
    module, found = tiny_model("qwen3", tokenizer), []
    tokens_R = torch.tensor([3, 4, 5, 3])
    for one_call in (True, False):
        model = LanguageModel(module, Backend(one_call_step=one_call)).in_dtype(torch.bfloat16)
        with torch.inference_mode(), model.blocked_weights():
            cache = model.decoding_cache(2, 7, 4, 9, dtype=cache_dtype)
            assert isinstance(cache, DecodingCache) and (cache._one_call is not None) == one_call
            assert all(stack.row_cache.dtype == stack.prompt_keys.dtype == cache_dtype for stack in cache.stacks)
            cache.prefill(PROMPTS[:2], [2, 2])
            found.append(torch.stack([cache.step(tokens_R + step).clone() for step in range(8)]))
    # Where float32 sums differ in their last bit, now and then a number rounds the other way.
    differences = (found[0] - found[1]).abs()
    assert float(differences.mean()) < 2e-3 * float(found[1].abs().mean())
    assert float(differences.max()) < 0.05 * float(found[1].abs().max())


@needs_bf16
def test_trials_inside_a_learner_or_a_sampler_are_exact(tokenizer: Any) -> None:
    module = tiny_model("qwen3", tokenizer)
    for training in (True, False):
        model = owned(module) if training else owned(module).in_dtype(torch.bfloat16)
        decoder = model.decoder
        with model.running(precision="bfloat16") if training else model.blocked_weights():
            assert decoder.linears
            assert decoder.why_not_causal() is None and decoder.why_not_trainable() is None
            assert model.caches.why_not_exact(fixed=False) is None and model.caches.why_not_exact(fixed=True) is None
            decoder._tried = None
            assert decoder.packs() and decoder.linears


@needs_bf16
def test_keys_in_16_bits_beside_rounded_weights_are_no_fallback(tokenizer: Any) -> None:
    """The queries are float32, and for these there are kernels; for a model in bfloat16 there are none with float16 keys."""
    module = tiny_model("qwen3", tokenizer)
    assert owned(module).fallback(torch.bfloat16, torch.float16) is None
    assert "no C++ kernels" in str(owned(module.to(torch.bfloat16)).fallback(torch.bfloat16, torch.float16))


@needs_bf16
def test_a_completion_does_not_depend_on_what_else_is_in_the_batch(tokenizer: Any) -> None:
    module = tiny_model("qwen3", tokenizer)

    def first(group_size: int) -> Any:
        return groups_of(NativeSampler(owned(module), tokenizer, dtype=torch.bfloat16), group_size)[0][0]

    one, other = first(2), first(7)
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.logprobs, other.logprobs)


@needs_bf16
def test_copies_are_made_anew_when_weights_change(tokenizer: Any) -> None:
    """Within `held` they are not: that is its promise."""
    module = tiny_model("qwen3", tokenizer)
    model, batch = owned(module), random_batch(module)

    def logprobs() -> Tensor:
        with torch.no_grad(), model.running(precision="bfloat16"):
            return model.completion_logprobs(batch)[0]

    before = logprobs()
    with model.bfloat16.held():
        assert torch.equal(logprobs(), before)
        with torch.no_grad():
            module.lm_head.weight.mul_(-1)
        assert torch.equal(logprobs(), before)
    assert not torch.allclose(logprobs(), before, atol=0.1)


def test_without_the_instructions_pytorch_runs_and_the_reason_is_given(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    need_kernels()
    monkeypatch.setattr(compiled, "_COMPILE", [*compiled._COMPILE, "-mno-avx512bf16"])
    forget_kernels()
    try:
        assert library("blocked_bf16") is None and "no AVX-512 BF16" in str(unavailable("blocked_bf16"))
        module = tiny_model("qwen3", tokenizer)
        model = owned(module)
        assert "no AVX-512 BF16" in str(model.bfloat16.why_not())
        sampler = NativeSampler(model, tokenizer, dtype=torch.bfloat16)
        assert sampler.model.dtype == torch.bfloat16 and len(groups_of(sampler, 2)[0]) == 2
        batch = random_batch(module)
        assert all(g.isfinite().all() for g in gradients_of(module, batch, precision="bfloat16"))
    finally:
        monkeypatch.undo()
        forget_kernels()
    assert (blocked_bf16.bf16_kernels() is None) == (why_not_bf16() is not None)


@needs_bf16
def test_other_models_are_told_why_not(tokenizer: Any) -> None:
    module = tiny_model("qwen3", tokenizer)
    assert "torch.bfloat16" in str(owned(copy.deepcopy(module).to(torch.bfloat16)).bfloat16.why_not())
    for backend in ("torch", Backend(blocked_weights=False)):
        assert "without C++" in str(LanguageModel(module, backend).bfloat16.why_not())
