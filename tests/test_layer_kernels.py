"""A decoder's layers on compiled kernels: each kernel against its formula in float64, and which layers are taken."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, CohereConfig, Olmo2Config, OlmoConfig

from groupwise.kernels import layers
from groupwise.models.attention.layers import fused_norms
from groupwise.models.backend import BACKENDS
from groupwise.models.decoder import Decoder
from tests.conftest import need_kernels, owned, packs, tiny_model
from tests.test_sampler import as_batch, sample


@pytest.fixture(autouse=True)
def _kernels() -> None:
    need_kernels()


def close(ours: Tensor, wide: Tensor) -> None:
    """As near as float32 comes to sums of some hundred numbers."""
    torch.testing.assert_close(ours.double(), wide, rtol=1e-5, atol=2e-6 * float(wide.abs().max()) + 1e-30)


def with_gradients(function: Any, *inputs: Tensor) -> list[Tensor]:
    """The output, and the gradient of a random sum of it with respect to each input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), leaves)]


def root_mean_square_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float) -> Tensor:
    """Zhang and Sennrich 2019, equation 4; Gemma's weight counts from one."""
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * (weight + offset)


def turned(x_NHD: Tensor, angles_ND: Tensor) -> Tensor:
    """Su et al. 2021, section 3.2.2, pair by pair: dimensions i and i + D/2 turn by the i-th angle."""
    half = x_NHD.shape[-1] // 2
    pairs = torch.complex(x_NHD[..., :half], x_NHD[..., half:])
    pairs = pairs * torch.polar(torch.ones_like(angles_ND), angles_ND)[:, None]
    return torch.cat([pairs.real, pairs.imag], -1)


@pytest.mark.parametrize("shape", [(1, 2), (3, 20), (2, 7, 64), (700, 192)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e4])
def test_norm_is_its_formula(shape: tuple[int, ...], offset: float, size: float) -> None:
    x, weight = size * torch.randn(shape), torch.randn(shape[-1])
    ours = with_gradients(lambda *z: layers.rms_norm(*z, 1e-5, offset), x, weight)
    wide = with_gradients(lambda *z: root_mean_square_norm(*z, 1e-5, offset), x.double(), weight.double())
    for one, other in zip(ours, wide, strict=True):
        close(one, other)


def test_norm_by_hand() -> None:
    # The mean square of 3 and 4 is 12.5; without epsilon both are divided by its root.
    found = layers.rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, -2.0]), 0.0, 0.0)
    torch.testing.assert_close(found, torch.tensor([[3.0, -8.0]]) / 12.5**0.5)


@pytest.mark.parametrize(("N", "heads", "size"), [(1, 1, 2), (5, 3, 20), (300, 3, 64)])
@pytest.mark.parametrize("normed", [True, False])
def test_rotation_is_its_formula(N: int, heads: int, size: int, normed: bool) -> None:
    x, weight, angles = torch.randn(N, heads * size), torch.randn(size), 100 * torch.rand(N, size // 2).double()
    cos, sin = (torch.cat([f(angles)] * 2, -1).float() for f in (torch.cos, torch.sin))

    def formula(x: Tensor, weight: Tensor) -> Tensor:
        heads_NHD = x.view(N, heads, size)
        return turned(root_mean_square_norm(heads_NHD, weight, 1e-6, 1.0) if normed else heads_NHD + 0 * weight, angles)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return layers.rope(x, cos, sin, weight if normed else None, 1e-6, 1.0) + 0 * weight

    for one, other in zip(with_gradients(ours, x, weight), with_gradients(formula, x.double(), weight.double()), strict=True):
        close(one, other)


def test_rotation_undoes_itself() -> None:
    x, angles = torch.randn(9, 3 * 64), torch.rand(9, 32)
    cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
    there = layers.rope(x, cos, sin, None, 0.0, 0.0)
    torch.testing.assert_close(layers.rope(there.flatten(1), cos, -sin, None, 0.0, 0.0).flatten(1), x)


@pytest.mark.parametrize("shape", [(1, 1), (2, 7, 33), (90, 768)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 60.0])
def test_swiglu_is_its_formula(shape: tuple[int, ...], size: float) -> None:
    gate, up = size * torch.randn(shape), torch.randn(shape)
    ours = with_gradients(layers.swiglu, gate, up)
    wide = with_gradients(lambda g, u: g / (1 + (-g).exp()) * u, gate.double(), up.double())  # Shazeer 2020, section 2
    for one, other in zip(ours, wide, strict=True):
        close(one, other)


def test_swiglu_far_out() -> None:
    gate = torch.tensor([[0.0, 1e4, -1e4, 88.0, -88.0]])
    assert layers.swiglu(gate, torch.ones(1, 5))[0].tolist() == pytest.approx([0.0, 1e4, 0.0, 88.0, 0.0], abs=1e-30)
    assert layers.swiglu(torch.tensor([[torch.nan]]), torch.ones(1, 1)).isnan().all()


def test_parts_of_wider_products_are_read_where_they_lie() -> None:
    wide, cos, sin = torch.randn(6, 300), torch.rand(6, 20), torch.rand(6, 20)
    gate, up = wide.split(150, -1)
    queries, _ = wide.split([240, 60], -1)
    with torch.inference_mode():
        assert torch.equal(layers.swiglu(gate, up), layers.swiglu(gate.contiguous(), up.contiguous()))
        rotations = [layers.rope(x, cos, sin, None, 0.0, 0.0) for x in (queries, queries.contiguous())]
    assert torch.equal(*rotations)


def test_the_same_bits_whatever_the_number_of_threads() -> None:
    x, weight, angles = torch.randn(500, 192), torch.randn(192), torch.rand(500, 64)
    wide = torch.randn(2, 3, 4099)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            of_norm = with_gradients(lambda *z: layers.rms_norm(*z, 1e-6, 0.0), x, weight)
            of_rotation = with_gradients(lambda *z: layers.rope(z[0], angles, angles, z[1], 1e-6, 0.0), x, weight[:64])
            of_swiglu = with_gradients(layers.swiglu, wide[0], wide[1])
            found.append(of_norm + of_rotation + of_swiglu)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def taken(decoder: Any) -> dict[str, int]:
    """How many layers of each class run on kernels."""
    names = [type(module).__name__ for module, _ in Decoder(decoder, 17, BACKENDS["auto"]).forwards()]
    assert not any("forward" in vars(module) for module in decoder.modules())
    return {name: names.count(name) for name in names}


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("qwen3", {"Qwen3RMSNorm": 9, "Qwen3MLP": 2, "Qwen3Attention": 2}),
        ("llama", {"LlamaRMSNorm": 5, "LlamaMLP": 2, "LlamaAttention": 2}),
        ("gemma", {"GemmaRMSNorm": 5, "GemmaAttention": 2}),  # whose products are gated by another function
        ("qwen3_moe", {"Qwen3MoeRMSNorm": 9, "Qwen3MoeAttention": 2}),  # whose experts are no modules
    ],
)
def test_which_layers_are_taken(architecture: str, expected: dict[str, int], tokenizer: Any) -> None:
    assert taken(tiny_model(architecture, tokenizer).base_model) == expected


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 20}


def test_layers_that_only_look_alike_are_left() -> None:
    # Cohere turns neighbouring dimensions with each other; OLMo 2 norms all heads together; OLMo can cut large numbers off.
    assert taken(AutoModel.from_config(CohereConfig(**SIZES, pad_token_id=0))) == {"CohereMLP": 1}
    assert taken(AutoModel.from_config(Olmo2Config(**SIZES, pad_token_id=0))) == {"Olmo2MLP": 1, "Olmo2RMSNorm": 5}
    assert taken(AutoModel.from_config(OlmoConfig(**SIZES, pad_token_id=0))) == {"OlmoMLP": 1, "OlmoAttention": 1}
    assert taken(AutoModel.from_config(OlmoConfig(**SIZES, pad_token_id=0, clip_qkv=8.0))) == {"OlmoMLP": 1}


def test_a_third_party_forward_stays_and_is_called(tokenizer: Any) -> None:
    model = tiny_model("qwen3", tokenizer)
    batch = as_batch(sample(model, tokenizer))
    layer, calls = model.base_model.layers[1].mlp, []
    layer.forward = lambda x: calls.append(x) or type(layer).forward(layer, x)  # as accelerate's hooks do
    expected, _ = owned(model).completion_logprobs(batch)
    assert calls and "forward" in vars(layer)
    sample(model, tokenizer)
    assert "forward" in vars(layer)
    del layer.forward
    torch.testing.assert_close(owned(model).completion_logprobs(batch)[0], expected, rtol=0, atol=1e-5)


def test_a_layer_called_in_another_way_than_in_its_trial_costs_the_kernels_and_not_the_packing(tokenizer: Any) -> None:
    model = tiny_model("llama", tokenizer)

    class Positional(type(model.base_model.layers[0])):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, position_embeddings: Any, past_key_values: Any, **others: Any) -> Tensor:
            normed = self.input_layernorm(hidden_states)
            attended, _ = self.self_attn(normed, position_embeddings, others.pop("attention_mask"), past_key_values, **others)
            hidden_states = hidden_states + attended
            return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    for layer in model.base_model.layers:
        layer.__class__ = Positional
    decoder = owned(model).decoder
    assert decoder.packs()
    assert not decoder.layers()
    assert "packed sequences" in decoder.reasons["layers"]


def test_a_trial_under_autocast_finds_what_it_finds_without(tokenizer: Any) -> None:
    model = tiny_model("qwen3", tokenizer)
    with torch.autocast("cpu", torch.bfloat16):
        assert packs(model)
    assert taken(model.base_model) == {"Qwen3RMSNorm": 9, "Qwen3MLP": 2, "Qwen3Attention": 2}


def test_a_layer_whose_weights_are_all_zero_proves_nothing(tokenizer: Any) -> None:
    decoder = tiny_model("gemma", tokenizer).base_model
    torch.nn.init.zeros_(decoder.layers[0].mlp.down_proj.weight)
    torch.nn.init.zeros_(decoder.layers[1].self_attn.o_proj.weight)
    assert taken(decoder) == {"GemmaRMSNorm": 5, "GemmaAttention": 1}


def test_logprobs_and_gradients_are_those_without_kernels(any_model: Any, tokenizer: Any) -> None:
    if not packs(any_model):
        pytest.skip("its attention falls back to padded batches, and its layers with it")
    batch = as_batch(sample(any_model, tokenizer))

    def run(backend: str) -> list[Tensor]:
        any_model.zero_grad()
        logprobs_BT, _ = owned(any_model, backend).completion_logprobs(batch)
        (logprobs_BT * torch.linspace(-1, 1, logprobs_BT.numel()).view(logprobs_BT.shape)).sum().backward()
        return [logprobs_BT.detach(), *(p.grad.clone() for p in any_model.parameters())]

    ours, theirs = run("kernels"), run("torch")
    any_model.zero_grad()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()) + 1e-12)


def test_other_precisions_go_the_layers_own_way(tokenizer: Any) -> None:
    model = tiny_model("qwen3", tokenizer)
    batch = as_batch(sample(model, tokenizer))
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = owned(model).completion_logprobs(batch)
    model.to(torch.bfloat16)
    wide = owned(model)
    assert wide.decoder.packs()  # tried before, since the trial of layers runs kernels
    with mock.patch.object(layers, "_run", side_effect=AssertionError("kernels are for float32")):
        found, _ = wide.completion_logprobs(batch)
    # Two roundings of the same log-probabilities to bfloat16's 8 bits.
    torch.testing.assert_close(found, rough, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma"])
def test_pytorchs_fused_norm_is_each_norm_of_a_decoder(architecture: str, tokenizer: Any) -> None:
    """As on a GPU. Gemma adds 1 to the weight. In bfloat16 the fused kernel rounds once, transformers' norm twice."""
    decoder = tiny_model(architecture, tokenizer).base_model
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    found = {layer.module: layer.forward for layer in fused_norms(decoder)[0]}
    norms = [module for module in decoder.modules() if type(module).__name__.endswith("RMSNorm")]
    assert norms and found.keys() == set(norms)
    for norm in norms:
        x = torch.randn(5, 3, len(norm.weight), requires_grad=True)
        ours, theirs = found[norm](x), norm(x)
        torch.testing.assert_close(ours, theirs)
        inputs = x, norm.weight
        for mine, expected in zip(
            torch.autograd.grad(ours.sin().sum(), inputs), torch.autograd.grad(theirs.sin().sum(), inputs), strict=True
        ):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
        low = x.detach().bfloat16()
        torch.testing.assert_close(found[norm](low), norm.bfloat16()(low), rtol=2e-2, atol=2e-2)
        norm.float()
