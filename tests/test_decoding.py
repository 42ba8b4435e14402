"""The KV cache of generation and its attention, with the compiled kernel and without."""

import asyncio
import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.kernels.decode_attention import decode_kernel
from groupwise.models.attention.decoding import DecodingCache
from groupwise.models.attention.decoding_step import PlanFinder
from groupwise.models.backend import BACKENDS
from groupwise.models.decoder import Decoder, HeadShape
from groupwise.rollouts.base import Sampling, requests
from groupwise.rollouts.driver import wait_for
from groupwise.rollouts.native import NativeSampler
from tests.conftest import forget_kernels, need_kernels, owned, tiny_model

KERNELS = ["compiled", "plain"]


def attention(query_D: Tensor, keys_TD: Tensor, values_TD: Tensor, scale: float) -> Tensor:
    """softmax(q k / sqrt(d)) v of one query, from "Attention is all you need", section 3.2.1."""
    weights_T = (keys_TD @ query_D * scale).exp()
    return (weights_T / weights_T.sum()) @ values_TD


def filled(kernel: str, dtype: torch.dtype, heads: int, shared: int, size: int) -> DecodingCache:
    """Three prompts of 1, 40 and 64 tokens with 21, 1 and 6 rows, in an order that is not theirs, and a layer to spare."""
    if kernel == "compiled":
        need_kernels()
        assert decode_kernel(size, dtype) is not None
    torch.manual_seed(size)
    config = SimpleNamespace()
    module = torch.nn.ParameterList([torch.empty(0, dtype=dtype)])
    module.config, module.device, module.dtype = config, torch.device("cpu"), dtype
    backend = replace(BACKENDS["torch"], attention_kernels=kernel == "compiled")
    decoder = Decoder(module, 10, backend)
    decoder.shapes = dict.fromkeys((0, 1), HeadShape(heads // shared, size))
    state = DecodingCache(decoder, PlanFinder(decoder), 4, 64, 30, 9, fixed=False)
    state.lengths_P = torch.tensor([1, 40, 64])
    state.prompt_R = torch.tensor([0] * 21 + [1] + [2] * 6)[torch.randperm(28)]
    state.written_R = torch.randint(1, 10, (28,))
    stack = state.stacks[0]
    for cache in (stack.prompt_keys, stack.prompt_values, stack.row_cache):
        cache.copy_(torch.randn(cache.shape))
    state._assign_slots()
    state._at = state._layout()
    return state


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("heads", "shared", "size"), [(3, 1, 64), (4, 4, 128), (6, 2, 8), (2, 1, 20), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_is_attention_over_prompt_and_row(kernel: str, heads: int, shared: int, size: int, dtype: torch.dtype) -> None:
    state = filled(kernel, dtype, heads, shared, size)
    stack = state.stacks[0]
    before = stack.row_cache.clone()
    query = torch.randn(28, heads, size).to(dtype)
    key, value = (torch.randn(28, heads // shared, size).to(dtype) for _ in range(2))
    output_RHD = state(1, query, key, value, scale=0.3)
    assert output_RHD.dtype == dtype
    for row, (prompt, written) in enumerate(zip(state.prompt_R.tolist(), state.written_R.tolist(), strict=True)):
        length = int(state.lengths_P[prompt])
        for head in range(heads):
            of = head // shared
            own_keys, own_values = before[1, :, row, of, : written - 1].double()
            keys = torch.cat([stack.prompt_keys[1, prompt, of, :length].double(), own_keys, key[row, of][None].double()])
            values = torch.cat([stack.prompt_values[1, prompt, of, :length].double(), own_values, value[row, of][None].double()])
            expected = attention(query[row, head].double(), keys, values, 0.3)
            tolerance = 1e-5 if dtype == torch.float32 else 0.05
            torch.testing.assert_close(output_RHD[row, head].double(), expected, rtol=tolerance, atol=tolerance)

    spare = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 4), value=torch.nan) for x in (query, key, value)]
    assert torch.equal(state(1, *spare, scale=0.3)[:28], output_RHD), "rows that fill up the batch change nothing"
    rows = torch.arange(28)
    before[1, 0, rows, :, state.written_R - 1] = key
    before[1, 1, rows, :, state.written_R - 1] = value
    assert torch.equal(stack.row_cache, before), "the newest keys and values are written, and nothing else"


@pytest.mark.parametrize("kernel", KERNELS)
def test_far_scores_neither_overflow_nor_vanish(kernel: str) -> None:
    """Scores around +-10,000: all weight on the largest, wherever it lies."""
    state = filled(kernel, torch.float32, 1, 1, 8)
    key = torch.zeros(28, 1, 8)
    key[..., 0] = 1e4
    value = torch.randn(28, 1, 8)
    for sign in (1.0, -1.0):
        query = torch.zeros(28, 1, 8)
        query[..., 0] = sign
        output_RHD = state(0, query, key, value, scale=1.0)
        assert torch.isfinite(output_RHD).all()
        assert torch.allclose(output_RHD[:, 0], value[:, 0]) == (sign > 0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_that_leave_take_nothing_with_them(kernel: str) -> None:
    """The rows that stay attend to what they did before, whatever slot they now have."""
    state = filled(kernel, torch.float32, 2, 2, 16)
    query, key, value = torch.randn(28, 2, 16), torch.randn(28, 1, 16), torch.randn(28, 1, 16)
    before = state(0, query, key, value, scale=0.25)
    keep_R = (torch.arange(28) % 3 != 0) & (state.prompt_R != 1)
    order_R = state.keep(keep_R)
    state._at = state._layout()
    assert sorted(order_R.tolist()) == keep_R.nonzero()[:, 0].tolist()
    assert len(state.lengths_P) == 2
    after = state(0, query[order_R], key[order_R], value[order_R], scale=0.25)
    torch.testing.assert_close(after, before[order_R])


def test_without_a_compiler_generation_says_so_and_works(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.test_sampler import sample, spoken

    with_kernels = sample(tiny_model("qwen3", tokenizer), tokenizer)
    model = tiny_model("qwen3", tokenizer)
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setenv("CXX", "no-such-compiler")
        forget_kernels()
        without = sample(model, tokenizer)
        assert "attention runs in PyTorch instead of C++" in str(owned(model).fallback())
    forget_kernels()
    for name in ("decode_attention", "sample", "layers", "packed_attention", "blocked"):
        assert f"kernels of {name}.cpp are unavailable" in caplog.text
    assert "no-such-compiler" in caplog.text
    assert spoken(with_kernels) == spoken(without)


def test_blocked_weights_compute_the_same_and_leave_nothing_behind(any_model: Any) -> None:
    need_kernels()
    # Of all layers, also of a decoder whose steps run in one call.
    model = owned(any_model, replace(BACKENDS["auto"], one_call_step=False))
    hidden = torch.randn(1, 5, any_model.config.hidden_size)
    layers = [module for module in any_model.modules() if type(module) is torch.nn.Linear]
    inputs = [torch.randn(1, 5, layer.in_features) for layer in layers]
    expected = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    with model.blocked_weights():
        assert any("forward" in vars(layer) for layer in layers)
        with torch.inference_mode():
            found = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
        # With gradients enabled the layers are as they were.
        any_model.get_output_embeddings()(hidden).sum().backward()
        assert any_model.get_output_embeddings().weight.grad is not None
    any_model.zero_grad()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not any("forward" in vars(layer) for layer in layers)


def test_the_model_is_as_it_was_between_two_steps_and_after_a_rollout_that_is_given_up(tokenizer: Any) -> None:
    module = tiny_model("qwen3", tokenizer)
    sampler = NativeSampler(owned(module), tokenizer)
    asked = requests([torch.tensor([3, 4]), torch.tensor([5])], 2, Sampling(max_tokens=6), 0)

    def is_patched() -> bool:
        return any("forward" in vars(inner) for inner in module.modules())

    async def give_up() -> None:
        tasks = [asyncio.ensure_future(sampler.generate(request)) for request in asked]
        assert not any(task.done() for task in tasks)
        for _ in range(6):
            await asyncio.sleep(0)
            assert not is_patched()
        assert sampler.health()["rows"] > 0
        raise KeyError("a reward failed")

    with pytest.raises(KeyError):
        wait_for(give_up())
    assert not is_patched()
    assert sampler.health()["rows"] == sampler.health()["waiting"] == 0
