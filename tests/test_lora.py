"""LoRA: what is trained, sampled, referred to, saved and exported is W + s B A, and W stays as it is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from groupwise.algorithms import named
from groupwise.config import CriticSection, LearnerSection, LoraSection
from groupwise.errors import UserError
from groupwise.learner.critic import Critic
from groupwise.learner.local import LocalLearner
from groupwise.models import LanguageModel, new_module
from groupwise.models.adapters import add_adapters, is_lora, linear_weight
from groupwise.models.checkpoint import fingerprint
from groupwise.models.value import ValueModel
from groupwise.rollouts.native import NativeSampler
from tests.conftest import ARCHITECTURES, need_kernels, owned, tiny_model
from tests.test_cli import run
from tests.test_learner import plain_logprobs, random_batch
from tests.test_sampler import as_batch, groups_of, sample, spoken
from tests.zoo import build
from tests.zoo import tokenizer as zoo_tokenizer

HEAD = ["q_proj", "v_proj", "down_proj", "lm_head"]


def adapted(module: Any, *, trained: bool = True, backend: Any = "auto", **settings: Any) -> LanguageModel:
    """A model with adapters on it; `trained`: which already change what it computes."""
    outer = add_adapters(module, LoraSection(**{"rank": 4, "alpha": 8.0, **settings}), seed=0)
    if trained:
        move(outer)
    return LanguageModel(outer, backend)


def move(outer: Any, seed: int = 3, size: float = 0.2) -> None:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in outer.named_parameters():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=random))


def lora(architecture: str, tokenizer: Any, **settings: Any) -> LanguageModel:
    return adapted(tiny_model(architecture, tokenizer), **settings)


def base_bits(model: LanguageModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.module.named_parameters() if not p.requires_grad}


def by_hand(model: LanguageModel) -> dict[str, Tensor]:
    """W + (alpha / rank) B A in float64, by the paper's equation 3, of each adapted layer."""
    found = {}
    for name, layer in model.module.named_modules():
        if is_lora(layer):
            A, B = (inner["default"].weight.detach().double() for inner in (layer.lora_A, layer.lora_B))
            found[name] = layer.base_layer.weight.detach().double() + 8.0 / 4 * B @ A
    return found


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_new_adapters_change_nothing_and_are_float32(architecture: str, tokenizer: Any) -> None:
    module = tiny_model(architecture, tokenizer).to(torch.bfloat16)
    batch = random_batch(module)
    with torch.no_grad():
        before = owned(module).completion_logprobs(batch)[0]
        model = adapted(module, trained=False)
        assert torch.equal(model.completion_logprobs(batch)[0], before)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.dtype == torch.float32 for parameter in trained)
    assert model.dtype == torch.bfloat16
    assert "rank 4, alpha 8" in str(model.describe_adapters())


def test_the_sum_is_the_papers(tokenizer: Any) -> None:
    model = lora("qwen3", tokenizer)
    layers = {name: layer for name, layer in model.module.named_modules() if is_lora(layer)}
    expected = by_hand(model)
    assert len(expected) == 2 * 7
    for name, layer in layers.items():
        torch.testing.assert_close(linear_weight(layer).double(), expected[name], rtol=0, atol=1e-6)
        with model.adapters_off():
            assert torch.equal(linear_weight(layer), layer.base_layer.weight)


@pytest.mark.parametrize("targets", [[], HEAD])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_training_sees_the_adapters_on_the_fast_path(architecture: str, targets: list[str], tokenizer: Any) -> None:
    targets = [name for name in targets if architecture != "qwen3_moe" or name != "down_proj"]
    without, model = owned(tiny_model(architecture, tokenizer)), lora(architecture, tokenizer, targets=targets)
    batch = random_batch(model.module)
    with torch.no_grad():
        found, expected = model.completion_logprobs(batch)[0], plain_logprobs(model.outer, batch)
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
        base = without.completion_logprobs(batch)[0]
        assert not torch.allclose(found, base, atol=1e-2)
        with model.adapters_off():
            assert torch.equal(model.completion_logprobs(batch)[0], base), "the base, to the bit"
    assert model.backends()["training"] == without.backends()["training"]


@pytest.mark.parametrize("targets", [[], HEAD])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("backend", ["auto", "torch", "transformers"])
def test_sampling_sees_the_adapters(architecture: str, targets: list[str], backend: str, tokenizer: Any) -> None:
    targets = [name for name in targets if architecture != "qwen3_moe" or name != "down_proj"]
    model = lora(architecture, tokenizer, targets=targets, backend=backend)
    before = base_bits(model)
    rollout = as_batch(groups_of(NativeSampler(model, tokenizer), 8))
    with torch.no_grad():
        torch.testing.assert_close(rollout.rollout_logprobs_BT, plain_logprobs(model.outer, rollout), rtol=0, atol=1e-4)
    assert all(torch.equal(before[name], value) for name, value in base_bits(model).items())
    with model.adapters_off():
        off = groups_of(NativeSampler(model, tokenizer), 8)
    assert spoken(off) == spoken(sample(tiny_model(architecture, tokenizer), tokenizer, backend=backend))
    assert spoken(off) != spoken(groups_of(NativeSampler(model, tokenizer), 8))


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma"])
def test_a_decoding_step_stays_one_call(architecture: str, tokenizer: Any) -> None:
    need_kernels()
    model = lora(architecture, tokenizer)
    assert model.backends()["decoding"] == owned(tiny_model(architecture, tokenizer)).backends()["decoding"]
    assert LanguageModel(model.outer, "kernels").fallback() is None


@pytest.mark.parametrize("name", ["deepseek_v2", "gpt2", "qwen3_next", "mamba2", "falcon_h1", "gpt_oss", "gptj", "phi3"])
def test_other_kinds_of_layers_with_adapters(name: str) -> None:
    """Latent attention, transposed layers, recurrent layers, experts, a model that runs padded, fused projections."""
    tokenizer, module = zoo_tokenizer(), build(name)
    module.eval()
    model = adapted(module)
    batch = random_batch(model.module)
    with torch.no_grad():
        torch.testing.assert_close(model.completion_logprobs(batch)[0], plain_logprobs(model.outer, batch), rtol=0, atol=1e-4)
        rollout = as_batch(groups_of(NativeSampler(model, tokenizer), 8))
        torch.testing.assert_close(rollout.rollout_logprobs_BT, plain_logprobs(model.outer, rollout), rtol=0, atol=1e-4)


def test_rounded_sampling_sees_the_adapters(tokenizer: Any) -> None:
    model = lora("qwen3", tokenizer)
    groups = groups_of(NativeSampler(model, tokenizer, dtype=torch.bfloat16), 8)
    rollout = as_batch(groups)
    with torch.no_grad():
        gap = (rollout.rollout_logprobs_BT - plain_logprobs(model.outer, rollout)).abs()[rollout.mask_BT]
        with model.adapters_off():
            of_base = (rollout.rollout_logprobs_BT - plain_logprobs(model.outer, rollout)).abs()[rollout.mask_BT]
    assert gap.mean() < 0.05 < 0.3 < of_base.mean()


def learner_of(model: LanguageModel, algorithm: str = "dapo", critic: Critic | None = None, **settings: Any) -> LocalLearner:
    section = LearnerSection(**{"learning_rate": 1e-2, **settings})
    return LocalLearner(model, named(algorithm), section, updates=60, temperature=1.0, max_tokens=16, critic=critic)


def test_fifty_steps_with_samples_between_leave_the_bases_bits(tokenizer: Any) -> None:
    model = lora("qwen3", tokenizer, trained=False)
    before, mark = base_bits(model), fingerprint(model.module)
    learner, sampler = learner_of(model, "grpo"), NativeSampler(model, tokenizer)
    batch = as_batch(groups_of(sampler, 4))
    start = learner.compute_logprobs(batch)[0].ref_logprobs_BT
    for step in range(50):
        learner.update(random_batch(model.module, seed=step))
        sampler.load(learner.weights(), learner.version)
        if step % 10 == 0:
            groups_of(sampler, 4, seed=step)
    assert all(torch.equal(before[name], value) for name, value in base_bits(model).items())
    assert fingerprint(model.module) == mark
    after, _ = learner.compute_logprobs(batch)
    assert start is not None and after.ref_logprobs_BT is not None
    assert torch.equal(after.ref_logprobs_BT, start), "the reference is the base, and needs no copy of it"
    assert not torch.allclose(after.old_logprobs_BT, start, atol=1e-2)
    assert learner.reference is model


@pytest.mark.parametrize("targets", [[], HEAD])
def test_gradients_are_autograds_of_the_sum_also_checkpointed(targets: list[str], tokenizer: Any) -> None:
    """Against the loss's gradient through W + s B A put together as one matrix, in the model's own forward."""
    model = lora("llama", tokenizer, targets=targets)
    batch = random_batch(model.module)
    weights_BT = torch.randn(batch.tokens_BT.shape, generator=torch.Generator().manual_seed(1)) * batch.mask_BT
    named_parameters = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
    found = {}
    for checkpointing in (False, True):
        with model.running(checkpointing=checkpointing):
            (model.completion_logprobs(batch)[0] * weights_BT).sum().backward()
        found[checkpointing] = {name: p.grad.clone() for name, p in named_parameters.items()}
        model.outer.zero_grad()
    plain = tiny_model("llama", tokenizer)
    sums = {
        f"{name}.weight": layer.base_layer.weight.detach() + 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        for name, layer in model.module.named_modules()
        if is_lora(layer)
    }
    expected_BT = plain_logprobs(lambda **inputs: torch.func.functional_call(plain, sums, (), inputs), batch)
    expected = torch.autograd.grad((expected_BT * weights_BT).sum(), list(named_parameters.values()))
    for gradients in found.values():
        for gradient, wanted in zip(gradients.values(), expected, strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


def test_adapters_and_moments_resume_bit_for_bit_and_the_base_is_not_written(tmp_path: Path, tokenizer: Any) -> None:
    def fresh(**settings: Any) -> LocalLearner:
        return learner_of(lora("qwen3", tokenizer, trained=False, **settings))

    whole, first, second = fresh(), fresh(), fresh()
    for step in range(4):
        whole.update(random_batch(whole.model.module, seed=step))
    for step in range(2):
        first.update(random_batch(first.model.module, seed=step))
    first.save(tmp_path)
    move(second.model.outer)
    second.load(tmp_path)
    for step in range(2, 4):
        second.update(random_batch(second.model.module, seed=step))
    ours, theirs = (dict(learner.model.module.named_parameters()) for learner in (whole, second))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    written = load_file(tmp_path / "model.safetensors")
    assert written and all("lora_" in name for name in written)
    with pytest.raises(UserError, match=r"rank 4, alpha 8.*cannot change in a run"):
        fresh(alpha=16.0).load(tmp_path)
    other = fresh()
    with torch.no_grad():
        next(p for p in other.model.parameters() if not p.requires_grad).view(-1)[5] += 1e-3
    with pytest.raises(UserError, match="another base model"):
        other.load(tmp_path)


def test_the_critic_has_adapters_of_its_own_on_the_same_base(tmp_path: Path, tokenizer: Any) -> None:
    model = lora("qwen3", tokenizer, trained=False)
    with_base = {id(p) for p in model.parameters() if not p.requires_grad}
    twin = model.with_shared_base()
    assert {id(p) for p in twin.parameters() if not p.requires_grad} == with_base
    assert not {id(p) for p in twin.parameters() if p.requires_grad} & {id(p) for p in model.parameters()}
    critic = Critic(twin, CriticSection(learning_rate=1e-2), LearnerSection(), updates=9)
    batch = random_batch(model.module)
    batch = replace(batch, values_BT=torch.zeros(batch.tokens_BT.shape), returns_BT=torch.ones(batch.tokens_BT.shape))
    policy = [p.detach().clone() for p in model.parameters()]
    learner = learner_of(model, "ppo", critic=critic, learning_rate=0.0)
    losses = [learner.update(batch).step["critic/loss"] for _ in range(9)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(old, new) for old, new in zip(policy, model.parameters(), strict=True))
    assert any(p.detach().abs().sum() > 0 for name, p in twin.module.named_parameters() if "lora_B" in name)
    state = critic.values_of.state_dict()
    assert {name.split(".")[0] for name in state} == {"decoder", "head"}
    assert all("lora_" in name or name.startswith("head.") for name in state)
    learner.save(tmp_path)
    again = Critic(model.with_shared_base(), CriticSection(learning_rate=1e-2), LearnerSection(), updates=9)
    learner_of(model, "ppo", critic=again).load(tmp_path)
    assert torch.equal(again.values(batch), critic.values(batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", [[], HEAD])
def test_exports_load_in_transformers_and_in_peft(
    tmp_path: Path, tied: bool, targets: list[str], dtype: torch.dtype, tokenizer: Any
) -> None:
    settings = {"model_type": "llama", **ARCHITECTURES["llama"], "tie_word_embeddings": tied}
    module = new_module(settings, tokenizer, seed=1)
    module.to(dtype).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = LanguageModel.load(str(tmp_path / "base"), lora=LoraSection(rank=4, alpha=8.0, targets=targets), seed=0)
    move(model.outer)
    before = base_bits(model)
    batch = random_batch(model.module)
    metrics = model.export(tmp_path / "merged", tokenizer)
    assert model.export(tmp_path / "adapter", tokenizer, merge=False) == {}
    assert all(torch.equal(before[name], value) for name, value in base_bits(model).items())
    with torch.no_grad():
        expected = plain_logprobs(model.outer, batch)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
        assert merged.dtype == dtype, "that of the directory it was loaded from"
        tolerance = 5e-5 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(plain_logprobs(merged.float(), batch), expected, rtol=0, atol=tolerance)
        tokens = torch.arange(32)[None] * 7 % model.config.vocab_size
        gap = float((merged(input_ids=tokens).logits - model.module(input_ids=tokens).logits).abs().max())
        assert metrics["export/merge_gap"] == pytest.approx(gap, abs=2e-6)
        alone = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
        torch.testing.assert_close(plain_logprobs(alone, batch), expected, rtol=0, atol=5e-5)
        ours = LanguageModel.load(str(tmp_path / "adapter"))
        torch.testing.assert_close(plain_logprobs(ours.module, batch), expected, rtol=0, atol=5e-5)
        assert ours.stored_dtype == dtype
    assert not any(name.startswith("model.") for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


def test_adapters_on_adapters_are_exported_merged_only(tmp_path: Path, tokenizer: Any) -> None:
    """Alone they would name the base without the first adapters, and so compute something else."""
    tiny_model("qwen3", tokenizer).save_pretrained(tmp_path / "base")
    first = LanguageModel.load(str(tmp_path / "base"), lora=LoraSection(rank=4, alpha=8.0), seed=0)
    move(first.outer)
    first.export(tmp_path / "first", tokenizer, merge=False)
    second = LanguageModel.load(str(tmp_path / "first"), lora=LoraSection(rank=4, alpha=8.0), seed=1)
    move(second.outer, seed=9)
    with pytest.raises(UserError, match="first holds adapters itself, which are merged into its base"):
        second.export(tmp_path / "second", tokenizer, merge=False)
    second.export(tmp_path / "merged", tokenizer)
    batch = random_batch(second.module)
    with torch.no_grad():
        expected = plain_logprobs(second.outer, batch)
        merged = LanguageModel.load(str(tmp_path / "merged"))
        torch.testing.assert_close(plain_logprobs(merged.module, batch), expected, rtol=0, atol=5e-5)
    text = f"[model]\npath = '{tmp_path / 'first'}'\n[model.lora]\nexport = 'adapter'\n"
    (tmp_path / "r.toml").write_text(text)
    result = run("check", tmp_path / "r.toml")
    assert result.exit_code == 2 and "line 4, model.lora.export:" in result.stderr and "Export 'merged'" in result.stderr


@pytest.mark.parametrize(
    ("values", "others"),
    [
        ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]),
        ([[1.0, 2.0], [3.0, 4.0]], [[3.0, 4.0], [1.0, 2.0]]),
        ([[1.0, 2.0], [2.0, 1.0]], [[2.0, 1.0], [1.0, 2.0]]),  # rows of equal sums
        ([[1.0, 2.0], [3.0, 4.0]], [[2.0, 1.0], [4.0, 3.0]]),
        (1.0, 2.0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bases_fingerprint_sees_the_order(values: Any, others: Any, dtype: torch.dtype) -> None:
    def mark(value: Any) -> str:
        module = torch.nn.Module()
        module.register_parameter("w", torch.nn.Parameter(torch.tensor(value, dtype=dtype), requires_grad=False))
        return fingerprint(module)

    assert mark(values) == mark(values) != mark(others)


def test_the_bases_fingerprint_sees_an_exchange_between_chunks() -> None:
    weight = torch.randn(3, 2**20)
    found = []
    for order in ([0, 1, 2], [2, 1, 0]):
        module = torch.nn.Module()
        module.register_parameter("w", torch.nn.Parameter(weight[order], requires_grad=False))
        found.append(fingerprint(module))
    assert found[0] != found[1]


def test_a_compiled_decoder_follows_the_adapters(tokenizer: Any) -> None:
    """`model.compile = true` with [model.lora]: training with adapters on and off, and updates."""
    plain, model = lora("llama", tokenizer), lora("llama", tokenizer)
    model.compile()
    batch = random_batch(model.module)
    with torch.no_grad():
        on = model.completion_logprobs(batch)[0]
        torch.testing.assert_close(on, plain_logprobs(plain.outer, batch), rtol=0, atol=5e-5)
        with model.adapters_off():
            off = model.completion_logprobs(batch)[0]
        base = plain_logprobs(tiny_model("llama", tokenizer), batch)
        torch.testing.assert_close(off, base, rtol=0, atol=5e-5)
        assert torch.equal(model.completion_logprobs(batch)[0], on)
    for each in (plain, model):
        learner_of(each).update(batch)
    with torch.no_grad():
        moved = model.completion_logprobs(batch)[0]
        assert not torch.allclose(moved, on, atol=1e-4)
        torch.testing.assert_close(moved, plain_logprobs(plain.outer, batch), rtol=0, atol=5e-4)


def test_adapters_that_are_no_sum_run_as_they_are_and_are_not_merged(tmp_path: Path, tokenizer: Any) -> None:
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=True)
    model = LanguageModel(peft.get_peft_model(tiny_model("qwen3", tokenizer), config).eval())
    rollout = as_batch(groups_of(NativeSampler(model, tokenizer), 8))
    with torch.no_grad():
        torch.testing.assert_close(rollout.rollout_logprobs_BT, plain_logprobs(model.outer, rollout), rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="cannot be merged"):
        model.export(tmp_path, tokenizer)


def test_hooks_inside_an_adapted_layer_are_called(tokenizer: Any) -> None:
    model = lora("qwen3", tokenizer)
    layer = next(layer for layer in model.module.modules() if is_lora(layer))
    layer.lora_A["default"].register_forward_hook(lambda *call: 2 * call[2])
    rollout = as_batch(groups_of(NativeSampler(model, tokenizer), 8))
    with torch.no_grad():
        torch.testing.assert_close(rollout.rollout_logprobs_BT, plain_logprobs(model.outer, rollout), rtol=0, atol=1e-4)


def test_a_target_that_is_no_linear_layer_is_refused_with_the_nearest(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"'q_prj' names no linear layer of the model; did you mean 'q_proj'"):
        lora("qwen3", tokenizer, targets=["q_prj"])
    with pytest.raises(UserError, match=r"'embed_tokens' names no linear layer"):
        lora("qwen3", tokenizer, targets=["embed_tokens"])


def test_a_value_model_in_bfloat16_has_a_head_in_float32(tokenizer: Any) -> None:
    model = adapted(tiny_model("qwen3", tokenizer).to(torch.bfloat16), trained=False)
    values = ValueModel(model)
    assert values.values(random_batch(model.module), share_prompts=True).dtype == torch.float32
    assert values.state_dict()["head.weight"].dtype == torch.float32


def test_adapters_that_are_merged_already_are_refused(tokenizer: Any) -> None:
    outer = lora("qwen3", tokenizer).outer
    outer.merge_adapter()
    with pytest.raises(UserError, match="unmerge_adapter"):
        LanguageModel(outer)
