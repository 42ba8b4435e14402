"""What users may have put on a module before it comes: it survives and is honoured, or is refused with the reason."""

from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.algorithms import named
from groupwise.config import LearnerSection
from groupwise.errors import UserError
from groupwise.learner.local import LocalLearner
from groupwise.models import BACKENDS, LanguageModel, new_module
from tests.conftest import need_kernels, owned, tiny_model
from tests.test_learner import gradients_of, plain_logprobs, random_batch
from tests.test_sampler import as_batch, sample


def hooked(part: str) -> Any:
    """A forward hook that doubles the output of a part."""

    def put(module: Any) -> None:
        target = module.get_submodule(part)
        target.register_forward_hook(
            lambda _module, _inputs, output: (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2
        )

    return put


def own_forward(part: str) -> Any:
    """A forward on the module itself that doubles the output, as some libraries patch them."""

    def put(module: Any) -> None:
        target = module.get_submodule(part)
        before = target.forward
        target.forward = lambda *inputs, **named: before(*inputs, **named) * 2

    return put


def parametrised(module: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(module.base_model.layers[0].mlp.up_proj)


PUT = {
    "hook on a layer's MLP": hooked("model.layers.1.mlp"),
    "hook on an activation inside SwiGLU": hooked("model.layers.1.mlp.act_fn"),
    "hook on a norm of queries": hooked("model.layers.0.self_attn.q_norm"),
    "hook on attention": hooked("model.layers.0.self_attn"),
    "hook on the embedding": hooked("model.embed_tokens"),
    "hook on the output layer": hooked("lm_head"),
    "forward on a linear layer": own_forward("model.layers.0.mlp.down_proj"),
    "forward on a norm": own_forward("model.layers.1.input_layernorm"),
    "forward on the embedding": own_forward("model.embed_tokens"),
    "forward on the output layer": own_forward("lm_head"),
    "parametrisation": parametrised,
}


@pytest.mark.parametrize("name", PUT)
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_and_forwards_are_honoured_in_training_and_generation_and_stay(name: str, when: str, tokenizer: Any) -> None:
    module = tiny_model("qwen3", tokenizer)
    plain = owned(tiny_model("qwen3", tokenizer)).completion_logprobs(random_batch(module))[0]
    model = owned(module)
    if when == "after":
        model.decoder.packs()
        sample(module, tokenizer)
    PUT[name](module)
    forwards = {inner: vars(inner)["forward"] for inner in module.modules() if "forward" in vars(inner)}
    batch = random_batch(module)
    with torch.no_grad():
        found, expected = model.completion_logprobs(batch)[0], plain_logprobs(module, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
    if name != "parametrisation":
        assert not torch.allclose(found, plain, atol=1e-2), "it changes what the model computes"
    rollout = as_batch(sample(module, tokenizer))
    with torch.no_grad():
        torch.testing.assert_close(rollout.rollout_logprobs_BT, plain_logprobs_of(module, rollout), rtol=0, atol=1e-4)
    gradients_of(module, batch, checkpointing=True)
    assert {inner: vars(inner)["forward"] for inner in module.modules() if "forward" in vars(inner)} == forwards


def plain_logprobs_of(module: Any, batch: Any) -> Tensor:
    return plain_logprobs(module, batch)


def test_hooks_of_parameters_see_their_gradients(tokenizer: Any) -> None:
    module = tiny_model("qwen3", tokenizer)
    seen: list[Tensor] = []
    module.get_input_embeddings().weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    gradients_of(module, random_batch(module))
    assert len(seen) == 1 and float(seen[0].abs().sum()) > 0


@pytest.mark.parametrize("what", ["hook", "forward", "compiled in place", "compiled", "no language model"])
def test_what_would_be_bypassed_is_refused_with_the_reason(what: str, tokenizer: Any) -> None:
    module = tiny_model("qwen3", tokenizer)
    if what == "hook":
        module.register_forward_hook(lambda *_: None)
    elif what == "forward":
        module.forward = module.forward
    elif what == "compiled in place":
        module.compile()
    elif what == "compiled":
        module = torch.compile(module)
    else:
        module = module.base_model.layers[0]
    reason = {"no language model": "is not a transformers causal", "compiled": "set model.compile = true"}.get(what, "bypassed")
    with pytest.raises(UserError, match=reason):
        LanguageModel(module)


def with_lora(module: Any) -> Any:
    """A peft model around it, with adapters that already change what it computes."""
    import peft

    adapted = peft.get_peft_model(module, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return adapted.eval()


def test_peft_adapters_train_and_are_switched_off_for_the_reference(tokenizer: Any) -> None:
    module = tiny_model("qwen3", tokenizer)
    base = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    batch = random_batch(module)
    with torch.no_grad():
        without = owned(module).completion_logprobs(batch)[0]
        adapted = with_lora(module)
        model = LanguageModel(adapted)
        found, expected = model.completion_logprobs(batch)[0], plain_logprobs(adapted, batch)
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
        assert not torch.allclose(found, without, atol=1e-2)
        with model.adapters_off():
            assert torch.equal(model.completion_logprobs(batch)[0], without), "the base model, to the bit"
        assert torch.equal(model.completion_logprobs(batch)[0], found)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    assert trained and len(trained) < len(list(adapted.parameters()))

    rollout = as_batch(sample_of(model, tokenizer))
    with torch.no_grad():
        torch.testing.assert_close(rollout.rollout_logprobs_BT, plain_logprobs(adapted, rollout), rtol=0, atol=1e-4)
    settings = LearnerSection(learning_rate=1e-2)
    learner = LocalLearner(model, named("dapo"), settings, updates=3, temperature=1.0, max_tokens=16)
    before = [parameter.detach().clone() for parameter in trained]
    learner.update(batch)
    assert any(not torch.equal(old, new) for old, new in zip(before, trained, strict=True))
    after = {name.replace(".base_layer", ""): parameter for name, parameter in adapted.get_base_model().named_parameters()}
    assert all(torch.equal(after[name], value) for name, value in base.items()), "the base's weights stay as they were"


def test_switching_frozen_adapters_off_and_on_leaves_them_frozen(tokenizer: Any) -> None:
    model = LanguageModel(with_lora(tiny_model("qwen3", tokenizer))).freeze()
    with model.adapters_off():
        pass
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_prompt_learning_is_refused(tokenizer: Any) -> None:
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UserError, match="prompt learning"):
        LanguageModel(peft.get_peft_model(tiny_model("qwen3", tokenizer), config))


def test_a_trial_inside_inference_mode_finds_what_it_finds_outside(tokenizer: Any) -> None:
    model = owned(tiny_model("qwen3", tokenizer))
    with torch.inference_mode():
        assert model.decoder.packs()


def sample_of(model: LanguageModel, tokenizer: Any) -> Any:
    from groupwise.rollouts.native import NativeSampler
    from tests.test_sampler import groups_of

    return groups_of(NativeSampler(model, tokenizer), 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_computes_the_same_and_says_what_it_runs(backend: str, tokenizer: Any) -> None:
    need_kernels()
    module = tiny_model("qwen3", tokenizer)
    model, batch = owned(module, backend), random_batch(module)
    with torch.no_grad():
        torch.testing.assert_close(model.completion_logprobs(batch)[0], plain_logprobs(module, batch), rtol=0, atol=2e-5)
    groups, auto = sample_of(model, tokenizer), sample(module, tokenizer)
    assert [c.text for group in groups for c in group] == [c.text for group in auto for c in group]
    training, decoding = model.backends()["training"], model.backends()["decoding"]
    expected = {
        "auto": ("packed sequences, attention kernels in C++", "one C++ call per step"),
        "kernels": ("packed sequences, attention kernels in C++", "one C++ call per step"),
        "torch": ("packed sequences, PyTorch's attention", "layer by layer, PyTorch's attention"),
        "transformers": (
            "padded batches, transformers' attention: a prompt is run once for each of its completions",
            "in padded batches, transformers' attention and cache",
        ),
    }[backend]
    assert (training, decoding) == expected


def test_a_strict_backend_refuses_to_fall_back(tokenizer: Any) -> None:
    module = new_module({"model_type": "gptj", "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, tokenizer, 1)
    with pytest.raises(UserError, match=r"model.backend = 'kernels': GPTJ.* runs padded batches .*: packed sequences give other"):
        owned(module, "kernels")
    with pytest.raises(UserError, match="there is no backend 'kernel'; did you mean 'kernels'"):
        owned(tiny_model("qwen3", tokenizer), "kernel")


def test_the_reason_of_a_fallback_is_kept(tokenizer: Any) -> None:
    module = tiny_model("llama", tokenizer)

    class Failing(type(module.base_model.layers[0].mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] in (6, 82):  # in the layer's trial and the decoder's
                raise RuntimeError("no 82 tokens here")
            return super().forward(x)

    for layer in module.base_model.layers:
        layer.mlp.__class__ = Failing
    model = owned(module)
    assert "RuntimeError: no 82 tokens here" in str(model.fallback())
