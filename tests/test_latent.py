"""Latent attention in generation: absorbed projections are the attention over expanded keys and values, from a small cache."""

from typing import Any

import pytest
import torch
from torch import Tensor

from groupwise.models import LanguageModel
from groupwise.models.attention import latent
from groupwise.rollouts.native import NativeSampler
from tests.test_sampler import as_batch, groups_of
from tests.zoo import build


def expanded(layer: Any, query: Tensor, latents: Tensor, rotary_key: Tensor, scale: float) -> Tensor:
    """DeepSeek-V2, equations 9 to 11, head by head and token by token, without any absorption."""
    H, N, nope = query.shape[0], len(latents), layer.qk_nope_head_dim
    of_heads = layer.kv_b_proj.weight.view(H, -1, layer.kv_lora_rank)
    output = torch.zeros(N, H, layer.v_head_dim, dtype=query.dtype)
    for h in range(H):
        keys = torch.cat([latents @ of_heads[h, :nope].T, rotary_key], -1)
        values = latents @ of_heads[h, nope:].T
        for n in range(N):
            weights = torch.softmax(keys[: n + 1] @ query[h, n] * scale, 0)
            output[n, h] = weights @ values[: n + 1]
    return output


def test_absorbed_projections_give_the_attention_over_expanded_keys_and_values() -> None:
    H, N, nope, rope, v, r, scale = 3, 7, 4, 2, 5, 6, 0.3
    projection = torch.nn.Linear(r, H * (nope + v), bias=False).double()
    layer = torch.nn.Module()
    layer.kv_b_proj, layer.qk_nope_head_dim, layer.v_head_dim, layer.kv_lora_rank = projection, nope, v, r
    query, latents, rotary_key = (torch.randn(*shape).double() for shape in ((H, N, nope + rope), (N, r), (N, rope)))
    key = torch.cat([torch.randn(H, N, nope).double(), rotary_key.expand(H, N, rope)], -1)  # only the rotary part is read

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert key.shape == (1, 1, N, r + rope) and torch.equal(value[0, 0], latents)
        scores = query[0] @ key[0].transpose(1, 2) * scale
        scores = scores.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf)
        return (scores.softmax(-1) @ value[0]).transpose(0, 1)[None]

    assert latent.absorbed(layer, attention, query[None], key[None]) is None, "outside generation nothing is absorbed"
    latent._project(layer, latents)
    found = latent.absorbed(layer, attention, query[None], key[None])
    assert found is not None
    torch.testing.assert_close(found[0], expanded(layer, query, latents, rotary_key, scale))
    assert latent.absorbed(layer, attention, query[None], key[None]) is None, "latents are used once"


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "glm4_moe_lite"])
def test_the_cache_holds_latents_and_the_sampler_agrees_with_the_learner(name: str, tokenizer: Any) -> None:
    model = LanguageModel(build(name))
    config = model.config
    cache = model.decoding_cache(1, 3, 4, 5)
    assert {(shape.kv_heads, shape.size) for shape in model.decoder.shapes.values()} == {
        (1, config.kv_lora_rank + config.qk_rope_head_dim)
    }
    assert cache.continues  # type: ignore[union-attr]
    batch = as_batch(groups_of(NativeSampler(model, tokenizer), 8))
    with torch.no_grad():
        torch.testing.assert_close(model.completion_logprobs(batch)[0], batch.rollout_logprobs_BT, rtol=0, atol=1e-4)


def test_a_hook_on_the_projection_is_called_with_expanded_keys(tokenizer: Any) -> None:
    module = build("deepseek_v3")
    called: list[int] = []
    projection = module.model.layers[0].self_attn.kv_b_proj
    projection.register_forward_hook(lambda *_: called.append(1))
    model = LanguageModel(module)
    assert projection not in {layer for layer, _ in latent.latent_forwards(model.decoder.latent)}
    groups_of(NativeSampler(model, tokenizer), 2)
    assert called
