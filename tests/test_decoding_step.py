"""A decoding step in one C++ call: what it computes, and which decoders it is for."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.kernels.blocked import blocked_matmul_kernel, to_blocked
from groupwise.models import new_module
from groupwise.models.attention.decoding_step import OneCallStep, Plan, PlanFinder
from groupwise.models.attention.layers import head_size
from groupwise.models.backend import BACKENDS
from groupwise.models.decoder import Decoder
from groupwise.rollouts.native import NativeSampler
from tests.conftest import ARCHITECTURES, SIZES, need_kernels, owned, packs, tiny_model
from tests.test_sampler import groups_of, sample, spoken


@pytest.fixture(autouse=True)
def _kernels() -> None:
    need_kernels()


def matmul(x: Tensor, weight_NK: Tensor, bias: Tensor | None) -> Tensor:
    kernel = blocked_matmul_kernel()
    assert kernel is not None
    return kernel(x, to_blocked(weight_NK), bias, len(weight_NK))


def plan(decoder: Any) -> Plan | None:
    """Found anew, as by a model that is made of the module now."""
    return PlanFinder(Decoder(decoder, 17, BACKENDS["auto"])).find()


@pytest.mark.parametrize("rows", [1, 7, 48, 49, 130])
@pytest.mark.parametrize(("K", "N"), [(1, 1), (20, 31), (192, 64), (1030, 33)])
@pytest.mark.parametrize("biased", [True, False])
def test_a_blocked_matmul_is_the_matmul(rows: int, K: int, N: int, biased: bool) -> None:
    x, weight, bias = torch.randn(rows, K), torch.randn(N, K), torch.randn(N) if biased else None
    wide = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    found = matmul(x, weight, bias)
    torch.testing.assert_close(found.double(), wide, rtol=0, atol=2e-7 * K * float(wide.abs().max()) / K**0.5 + 1e-6)
    assert torch.equal(matmul(x[rows // 2 :][:1], weight, bias)[0], found[rows // 2]), "a row is the same bits when it is alone"


def test_a_blocked_matmul_is_the_same_bits_with_any_number_of_threads() -> None:
    x, weight, threads, found = torch.randn(2, 90, 70), torch.randn(200, 70), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(matmul(x, weight, None))
    finally:
        torch.set_num_threads(threads)
    assert found[0].shape == (2, 90, 200)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


ODD = {**SIZES, "hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 50}
PLAIN: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", **ARCHITECTURES["qwen3"]},
    "llama": {"model_type": "llama", **SIZES},
    "a bias in attention": {"model_type": "llama", **SIZES, "attention_bias": True},
    "a bias of heads alone": {"model_type": "qwen2", **SIZES},
    "mistral without a window": {"model_type": "mistral", **SIZES, "sliding_window": None},
    "a window": {"model_type": "mistral", **SIZES, "sliding_window": 4},
    "a window in some layers": {
        "model_type": "qwen2",
        **SIZES,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "odd sizes": {"model_type": "llama", **ODD},
    "scaled rotations": {
        "model_type": "llama",
        **SIZES,
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64},
    },
}


def random_model(architecture: dict[str, Any], tokenizer: Any) -> Any:
    """Every weight random, also those that a model has as ones or zeros at first."""
    model = new_module(architecture, tokenizer, seed=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.5 if parameter.dim() == 1 else 0.2))
    return model


@pytest.mark.parametrize("name", PLAIN)
def test_steps_are_the_decoders_own_forward_in_float64(name: str, tokenizer: Any) -> None:
    """Prompts of 5 and 1 tokens with three rows each, four steps, rows that leave after the second."""
    model = random_model(PLAIN[name], tokenizer)
    assert packs(model) and plan(model.base_model) is not None
    wide = copy.deepcopy(model.base_model).double()
    prompts = [torch.tensor([3, 12, 4, 15, 9]), torch.tensor([7])]
    with torch.inference_mode():
        state = owned(model).decoding_cache(2, 5, 6, 4)
        state.prefill(prompts, [3, 3])
        rows = [prompts[i // 3] for i in range(6)]
        for step in range(4):
            tokens_R = torch.randint(3, 17, (len(rows),))
            rows = [torch.cat([row, token[None]]) for row, token in zip(rows, tokens_R, strict=True)]
            hidden_RH = state.step(tokens_R)
            for row, hidden in zip(rows, hidden_RH, strict=True):
                expected = wide(input_ids=row[None], use_cache=False).last_hidden_state[0, -1]
                # A yarn's and a rotary table's cosines are float32 in both.
                torch.testing.assert_close(hidden.double(), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
            if step == 1:
                order_R = state.keep(torch.tensor([True, False, True, True, False, True]))
                rows = [rows[i] for i in order_R.tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sliding_window_in_one_layer_and_caches_in_other_dtypes(dtype: torch.dtype, tokenizer: Any) -> None:
    """Three rows of two prompts, whose tokens are in the cache; the reference has the same weights and the window."""
    sliding = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    module = random_model({**PLAIN["a bias of heads alone"], **sliding}, tokenizer).base_model
    windowed, found = copy.deepcopy(module).double(), plan(module)
    assert found is not None and windowed.config.layer_types == ["full_attention", "sliding_attention"]
    K, size = module.config.num_key_value_heads, head_size(module.config)
    step = OneCallStep(module, found, 20, 4, cache_dtype=dtype)
    # Prompts and completions are told apart only by where their keys are: a prompt is run as rows, and its keys are moved.
    row_caches = [torch.full((2, 4, K, 9, size), torch.nan, dtype=dtype) for _ in range(2)]
    prompt_caches = [torch.full((2, 3, K, 7, size), torch.nan, dtype=dtype) for _ in range(2)]
    caches = torch.tensor(
        [[row.data_ptr(), *(x.data_ptr() for x in prompt)] for row, prompt in zip(row_caches, prompt_caches, strict=True)]
    )
    tokens_RT = torch.randint(3, 17, (3, 10))
    tokens_RT[1, :4] = tokens_RT[0, :4]
    lengths_P = torch.tensor([0, 0])
    prompts_R, order_R, starts_P = torch.tensor([0, 0, 1]), torch.arange(3), torch.tensor([0, 2, 3])
    written_R = torch.zeros(3, dtype=torch.long)
    with torch.inference_mode():
        for t in range(10):
            if t == 4:  # the first four tokens of each row become its prompt
                for row, prompt in zip(row_caches, prompt_caches, strict=True):
                    prompt[:, :2, :, :4] = row[:, [0, 2], :, :4]
                lengths_P, written_R = lengths_P + 4, written_R - 4
            written_R = written_R + 1
            layout = written_R, lengths_P, prompts_R, order_R, starts_P
            hidden_RH = step(tokens_RT[:, t], caches, layout, (4, 2, K, 9, 7, 2))
            expected = windowed(input_ids=tokens_RT[:, : t + 1], use_cache=False).last_hidden_state[:, -1]
            tolerance = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
            torch.testing.assert_close(hidden_RH.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["gemma", "gemma2", "qwen3_moe"])
def test_others_run_module_by_module(name: str, tokenizer: Any) -> None:
    model = tiny_model(name, tokenizer)
    sample(model, tokenizer)
    assert plan(model.base_model) is None


@pytest.mark.parametrize(
    "architecture",
    [
        {"model_type": "granite", **SIZES, "residual_multiplier": 0.5},
        {"model_type": "llama", **SIZES, "mlp_bias": True},
        {"model_type": "llama", **SIZES, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
        {"model_type": "llama", **SIZES, "hidden_act": "gelu"},
    ],
    ids=["a factor on what is added", "a bias of products", "rotations that change with length", "another gate"],
)
def test_decoders_that_only_look_plain_are_not(architecture: dict[str, Any], tokenizer: Any) -> None:
    model = random_model(architecture, tokenizer)
    assert plan(model.base_model) is None
    sample(model, tokenizer)


def hook(model: Any) -> Callable[[], None]:
    return model.base_model.layers[1].mlp.register_forward_hook(lambda *_: None).remove


def foreign_forward(model: Any) -> Callable[[], None]:
    layer = model.base_model.layers[0].self_attn.o_proj
    layer.forward = lambda x: type(layer).forward(layer, x)
    return lambda: vars(layer).pop("forward")


def hook_on_all(model: Any) -> Callable[[], None]:
    return model.base_model.register_forward_hook(lambda *_: None).remove


@pytest.mark.parametrize("put", [hook, hook_on_all, foreign_forward])
def test_hooks_and_forwards_inside_a_decoder_are_not_bypassed(put: Callable[[Any], Callable[[], None]], tokenizer: Any) -> None:
    model = tiny_model("qwen3", tokenizer)
    before = sample(model, tokenizer)
    assert plan(model.base_model) is not None
    take_away = put(model)
    assert plan(model.base_model) is None
    assert spoken(sample(model, tokenizer)) == spoken(before)
    take_away()
    assert plan(model.base_model) is not None


def test_what_comes_later_is_seen(tokenizer: Any) -> None:
    """A copy in another precision, an adapter in a layer's place, a layer whose weight is made of others."""
    model = tiny_model("qwen3", tokenizer)
    assert plan(model.base_model) is not None
    assert plan(copy.deepcopy(model).base_model) is not None
    assert plan(copy.deepcopy(model).to(torch.bfloat16).base_model) is None

    class Adapter(torch.nn.Linear):
        pass

    adapted = copy.deepcopy(model)
    adapted.base_model.layers[1].mlp.up_proj = Adapter(32, 48, bias=False)
    assert plan(adapted.base_model) is None
    torch.nn.utils.parametrizations.weight_norm(model.base_model.layers[0].self_attn.v_proj)
    assert plan(model.base_model) is None


def wider_layer(model: Any) -> None:
    for name, shape in (("gate_proj", (32, 64)), ("up_proj", (32, 64)), ("down_proj", (64, 32))):
        setattr(model.base_model.layers[1].mlp, name, torch.nn.Linear(*shape, bias=False))


def fewer_heads(model: Any) -> None:
    attention = model.base_model.layers[1].self_attn
    attention.q_proj, attention.o_proj = torch.nn.Linear(32, 16, bias=False), torch.nn.Linear(16, 32, bias=False)
    attention.num_key_value_groups = 1


def fewer_layers(model: Any) -> None:
    model.base_model.layers = model.base_model.layers[:1]


def own_parameter(model: Any) -> None:
    """As in Doge, where it is one at first."""
    model.base_model.layers[1].residual = torch.nn.Parameter(torch.ones(32))


def rough_embedding(model: Any) -> None:
    model.get_input_embeddings().to(torch.bfloat16)


def rough_norm(model: Any) -> None:
    model.base_model.layers[0].post_attention_layernorm.to(torch.bfloat16)


@pytest.mark.parametrize("change", [wider_layer, fewer_heads, fewer_layers, own_parameter, rough_embedding, rough_norm])
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_kernel_reads_what_is_there(change: Callable[[Any], None], when: str, tokenizer: Any) -> None:
    """Other shapes, dtypes and parameters than the kernel is told of, before the decoder is first tried and after."""
    model = tiny_model("llama", tokenizer)
    if when == "after":
        assert plan(model.base_model) is not None
    change(model)
    assert plan(model.base_model) is None


def test_a_row_is_the_same_bits_in_any_batch_and_with_any_number_of_threads(tokenizer: Any) -> None:
    """Forty rows of one prompt, more than one thread takes; alone; and 1, 2 and 3 threads."""
    model = tiny_model("qwen3", tokenizer)
    assert plan(model.base_model) is not None
    threads, found = torch.get_num_threads(), []
    tokens_R = torch.randint(3, 17, (40,))

    def last(rows: slice) -> Tensor:
        with torch.inference_mode():
            state = owned(model).decoding_cache(1, 3, 40, 3)
            state.prefill([torch.tensor([5, 9, 4])], [len(tokens_R[rows])])
            for _ in range(3):
                hidden_RH = state.step(tokens_R[rows])
        return hidden_RH.clone()

    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(last(slice(None)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(last(slice(33, 34))[0], found[0][33])


def test_a_hook_hears_each_token(tokenizer: Any) -> None:
    model = tiny_model("qwen3", tokenizer)
    heard: list[int] = []
    model.base_model.layers[0].mlp.register_forward_hook(lambda _module, x, _output: heard.append(x[0].shape[1]))
    groups = sample(model, tokenizer)
    assert sum(heard) >= sum(len(completion.tokens) for group in groups for completion in group)


def test_weights_are_those_of_the_moment(tokenizer: Any) -> None:
    """Between two rollouts an optimiser changes the weights in place."""
    model = tiny_model("llama", tokenizer)
    sampler = NativeSampler(owned(model), tokenizer)

    def text() -> list[str]:
        return [c.text for group in groups_of(sampler, 4, max_tokens=8) for c in group]

    first = text()
    with torch.no_grad():
        for parameter in model.base_model.layers.parameters():
            parameter.mul_(-1)
    changed = text()
    assert changed != first
    fresh = copy.deepcopy(model)
    sampler = NativeSampler(owned(fresh), tokenizer)
    assert text() == changed
