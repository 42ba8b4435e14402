"""What decoders are tried on: that trials find what they are for, and leave nothing behind."""

from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.errors import UserError
from groupwise.models import LanguageModel, new_module
from groupwise.models.trials import no_constants, small_windows
from tests.conftest import SIZES, owned, tiny_model
from tests.test_learner import random_batch
from tests.zoo import build


def test_windows_of_any_name_are_small_within_and_as_they_were_after() -> None:
    module = build("gpt_neo")
    module.config.local_attention, module.config.attention_window, module.config.max_window_layers = 256, [64], 28
    module.transformer.h[0].window_size = 128
    with small_windows(module.transformer):
        assert (module.config.local_attention, module.transformer.h[0].window_size) == (6, 6)
        assert module.config.max_window_layers == 28, "a count of layers is no window"
    assert (module.config.local_attention, module.transformer.h[0].window_size) == (256, 128)


def test_constant_parameters_are_random_within_and_the_same_bits_after(tokenizer: Any) -> None:
    module = tiny_model("qwen3", tokenizer)
    before = {name: (parameter.data_ptr(), parameter.clone()) for name, parameter in module.named_parameters()}
    norm = module.model.norm.weight
    with no_constants(module):
        assert len(norm.unique()) > 1
    with pytest.raises(RuntimeError, match="on the way"), no_constants(module):
        raise RuntimeError("on the way")
    assert all((p.data_ptr(), True) == (before[n][0], torch.equal(p, before[n][1])) for n, p in module.named_parameters())


def test_a_module_that_is_not_causal_is_refused_when_it_is_first_used(tokenizer: Any) -> None:
    """Also where the module was given and not loaded: a decoder whose mask lets every token see all."""
    module = tiny_model("llama", tokenizer)
    module.config.is_causal = False
    for layer in module.model.layers:
        layer.self_attn.is_causal = False
    model = LanguageModel(module)
    with pytest.raises(UserError, match="cannot be trained exactly: a token's hidden state depends on later tokens"):
        model.completion_logprobs(random_batch(module))
    with pytest.raises(UserError, match="cannot be trained exactly"):
        model.decoding_cache(1, 3, 4, 5)


def test_a_trial_that_is_interrupted_is_made_again(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = owned(tiny_model("qwen3", tokenizer)).decoder
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "_why_not_packed", lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            decoder.packs()
    assert decoder.packs()


def test_a_backward_pass_that_fails_is_a_reason(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = owned(tiny_model("qwen3", tokenizer)).decoder
    run = decoder._rows_and_gradient
    calls: list[int] = []

    def second_fails(function: Any) -> list[Tensor]:
        calls.append(1)
        if len(calls) % 2 == 0:
            raise RuntimeError("modified by an inplace operation")
        return run(function)

    monkeypatch.setattr(decoder, "_rows_and_gradient", second_fails)
    assert not decoder.packs()
    assert "its own backward pass fails: RuntimeError: modified" in decoder.reasons["packed"]


@pytest.mark.parametrize("nested", [False, True], ids=["one for all layers", "one for each type of layer"])
def test_the_length_to_which_rope_is_fixed_is_the_original_one(nested: bool, tokenizer: Any) -> None:
    long = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 20}
    long |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    module = new_module({"model_type": "llama", **SIZES, "rope_parameters": long}, tokenizer, 1)
    if nested:
        module.config.rope_parameters = {"full_attention": long, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    model = owned(module)
    assert model.decoder.position_limit == 20
    with pytest.raises(UserError, match="a sequence of 21 tokens exceeds 20"):
        model.decoder.check_length(21)


def test_a_hook_that_comes_and_goes_changes_what_the_cache_holds() -> None:
    module = build("deepseek_v3")
    model = LanguageModel(module)

    def heads() -> set[int]:
        assert model.why_not_decoding() is None
        return {shape.kv_heads for shape in model.decoder.shapes.values()}

    assert heads() == {1}
    hooks = [layer.self_attn.kv_b_proj.register_forward_hook(lambda *_: None) for layer in module.model.layers]
    assert heads() != {1}
    for hook in hooks:
        hook.remove()
    assert heads() == {1}


def test_states_of_recurrent_layers_count_as_memory() -> None:
    model = LanguageModel(build("mamba2"))
    assert model.why_not_decoding() is None and not model.decoder.shapes
    cache = model.decoding_cache(1, 3, 2, 4)
    with torch.inference_mode():
        cache.prefill([torch.tensor([3, 4, 5])], [2])
    of_layers: Any = cache._states.values()  # type: ignore[union-attr]
    held = [state for states in of_layers for state in (*states.conv.values(), *states.recurrent.values())]
    assert model.decoder.state_elements * 2 == sum(state.numel() for state in held)


def test_damaged_weights_are_named(tokenizer: Any) -> None:
    module = tiny_model("qwen3", tokenizer)
    with torch.no_grad():
        module.model.norm.weight[3] = torch.nan
    with pytest.raises(UserError, match="the logits of Qwen3ForCausalLM are not finite, so its weights are damaged"):
        LanguageModel(module).check_logits()


def test_a_module_first_used_under_autocast_is_checked_without_it(tokenizer: Any) -> None:
    model = LanguageModel(tiny_model("qwen3", tokenizer))
    with torch.autocast("cpu", torch.bfloat16):
        model.completion_logprobs(random_batch(model.module))
