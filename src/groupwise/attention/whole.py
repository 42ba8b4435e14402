"""A step of generation through all of a decoder's layers in one call (`groupwise.kernels.step`), for plain decoders.

Plain: each layer adds to its input what attention makes of its norm, and then what a gated product makes of the norm of that; all
of them parts that run on kernels (`fused`). A decoder is tried once: whether its layers, and all of it, are sums of these parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from groupwise.attention.fused import Form, alike, fitting, head_size, stand_in
from groupwise.attention.interface import attending
from groupwise.kernels.decode import decode_kernel
from groupwise.kernels.panels import PANEL, in_panels
from groupwise.kernels.step import LAYER, step_kernel


@dataclass(frozen=True, slots=True)
class Plan:
    """What its layers have in common."""

    norms: Form
    """Of all norms but those of heads."""
    heads: Form
    """Of the norms of queries and keys; if there are none, anything."""


def plan(decoder: Any) -> Plan | None:
    """None if the decoder is not plain, or if somebody would be passed over who has to be called at its parts."""
    if decoder.device.type != "cpu" or decoder._compiled_call_impl is not None:
        return None
    parts = list(decoder.modules())
    if [id(part) for part in parts] != [id(part) for part in getattr(decoder, "_groupwise_plan", ((),))[0]]:
        decoder._groupwise_plan = parts, _plan(decoder)
    found: Plan | None = decoder._groupwise_plan[1]
    # Adapters, parametrisations and other dtypes may have come since.
    usable = found is not None and not any(map(_is_watched, parts)) and _fits_the_kernel(decoder)
    return found if usable else None


def _is_watched(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _plan(decoder: Any) -> Plan | None:
    with attending(decoder, stand_in):
        fits = {module: forward.args[1:] for module, forward in fitting(decoder)}
    try:
        if _names(decoder) != {"embed_tokens", "layers", "norm", "rotary_emb"} or not _fixed(decoder.rotary_emb):
            return None
        if any(_names(layer) != {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"} for layer in decoder.layers):
            return None
        forms = {fits[decoder.norm]}
        heads: set[Form | None] = set()
        for layer in decoder.layers:
            forms |= {fits[layer.input_layernorm], fits[layer.post_attention_layernorm]}
            heads |= {*fits[layer.self_attn][0]}
            fits[layer.mlp]  # or it is no gated product that the kernel knows
        uniform = len(forms) == len(heads) == len({layer.self_attn.scaling for layer in decoder.layers}) == 1
        if not (uniform and _fits_the_kernel(decoder) and _is_sum_of_parts(decoder)):
            return None
    except Exception:  # whatever a stranger's decoder lacks or makes of the trial: then it runs module by module
        return None
    return Plan(norms=forms.pop(), heads=heads.pop() or (0.0, 0.0))


def _names(module: Any) -> set[str]:
    return {name for name, _ in module.named_children()}


def _fixed(rotary: Any) -> bool:
    """Whether a place's rotation is the same however long the sequence is."""
    return "dynamic" not in rotary.rope_type and rotary.rope_type != "longrope"


def _fits_the_kernel(decoder: Any) -> bool:
    """Whether its weights are those that the kernel reads, and no others, of the sizes and the dtype that it reads."""
    config, size = decoder.config, head_size(decoder.config)
    heads, shared = config.num_attention_heads * size, config.num_key_value_heads * size
    every = {id(parameter): parameter for parameter in decoder.parameters()}
    layers = [_parts(layer) for layer in decoder.layers]
    read = [decoder.embed_tokens, decoder.norm, *(part for parts in layers for part in parts)]
    return (
        len(layers) == config.num_hidden_layers
        and {id(parameter) for part in read for parameter in part.parameters()} == every.keys()
        and all(parameter.dtype == torch.float32 for parameter in every.values())
        and len({layer.mlp.gate_proj.out_features for layer in decoder.layers}) == 1
        and all(_products_fit(*parts[:7], sizes=[heads, shared, shared, config.hidden_size]) for parts in layers)
        and step_kernel(size) is not None
        and decode_kernel(size, torch.float32) is not None
    )


def _parts(layer: Any) -> list[Any]:
    """Its seven products and its norms."""
    attention, mlp = layer.self_attn, layer.mlp
    products = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
    norms = layer.input_layernorm, layer.post_attention_layernorm, *_head_norms(attention)
    return [*products, *(norm for norm in norms if norm is not None)]


def _products_fit(*products: Any, sizes: list[int]) -> bool:
    """Whether they are plain, attention's of these sizes, and have no bias but in attention."""
    plain = all(type(product) is torch.nn.Linear for product in products)
    biased = [product.bias is not None for product in products]
    return plain and [x.out_features for x in products[:4]] == sizes and len(set(biased[:3])) == 1 and not any(biased[4:])


def _head_norms(attention: Any) -> tuple[Any, Any]:
    return getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)


@torch.no_grad()
@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def _is_sum_of_parts(decoder: Any) -> bool:
    tokens = torch.arange(6)[None] % decoder.embed_tokens.num_embeddings
    positions = 37 * torch.arange(6)[None]
    x = decoder.embed_tokens(tokens)
    turned = decoder.rotary_emb(x, positions)
    with attending(decoder, stand_in):
        for layer in decoder.layers:
            attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(x), position_embeddings=turned, attention_mask=None)
            product = layer.mlp(layer.post_attention_layernorm(x + attended))
            theirs = layer(x, attention_mask=None, position_ids=positions, position_embeddings=turned, use_cache=False)
            if not (attended.any() and product.any() and alike(attended + product, theirs - x)):
                return False
            x = theirs
        whole = decoder(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
        return alike(decoder.norm(x), whole)


class Whole:
    """The kernel with a copy of the matrices of a plain decoder's layers as they are now; other weights are read in place."""

    def __init__(self, decoder: Any, plan: Plan, places: int, rows: int) -> None:
        """For so many tokens of prompt and row together, and so many rows at once."""
        size = head_size(decoder.config)
        kernel = step_kernel(size)
        assert kernel is not None
        self._kernel, self._plan, self._decoder = kernel, plan, decoder
        self._layers = [_weights(layer) for layer in decoder.layers]
        pointers = [[0 if w is None else w.data_ptr() for w in (layer[name] for name in LAYER)] for layer in self._layers]
        self._pointers = torch.tensor(pointers)
        self._norm = decoder.norm.weight.detach().contiguous()
        weight, K = decoder.embed_tokens.weight, decoder.config.num_key_value_heads
        cos, sin = decoder.rotary_emb(weight[:1, None], torch.arange(places)[None])
        self._turns = cos[0].contiguous(), sin[0].contiguous()
        self._scale, self._heads = decoder.layers[0].self_attn.scaling, decoder.config.num_attention_heads
        inner = self._layers[0]["down"].shape[1]
        widths = weight.shape[1], (self._heads + 2 * K) * size, self._heads * size, inner
        self._room = [weight.new_empty(rows, width) for width in widths]
        """Of y, heads, gathered and inner of step.cpp."""

    def __call__(self, tokens_R: Tensor, cache: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """Run one more token of each row; returns hidden states [R, H], which the next call overwrites.

        `cache` and `sizes`: the tensors and the numbers of decode.h's Cache, without the layer.
        """
        x_RH = self._decoder.embed_tokens(tokens_R)
        forms = *self._plan.norms[::-1], *self._plan.heads[::-1]
        tensors = x_RH, *self._room, self._pointers, self._norm, *self._turns, *cache
        model = *x_RH.shape, self._room[-1].shape[1], self._heads, len(self._layers)
        self._kernel(*tensors, self._scale, *forms, *model, *sizes)
        hidden_RH: Tensor = self._room[0][: len(tokens_R)]
        return hidden_RH


def _weights(layer: Any) -> dict[str, Any]:
    """Of a layer, by the names of `LAYER`."""
    attention, mlp = layer.self_attn, layer.mlp
    heads = attention.q_proj, attention.k_proj, attention.v_proj
    vectors = {"norm": layer.input_layernorm.weight, "second_norm": layer.post_attention_layernorm.weight}
    for name, norm in zip(("query_norm", "key_norm"), _head_norms(attention), strict=True):
        vectors[name] = getattr(norm, "weight", None)
    vectors["heads_bias"] = None if heads[0].bias is None else torch.cat([x.bias for x in heads])
    vectors["out_bias"] = attention.o_proj.bias
    found = {name: None if vector is None else vector.detach().contiguous() for name, vector in vectors.items()}
    found["heads"] = in_panels(torch.cat([x.weight for x in heads]))
    found["out"] = in_panels(attention.o_proj.weight)
    half, pad = PANEL // 2, -mlp.gate_proj.out_features % (PANEL // 2)
    gate, up = (torch.nn.functional.pad(x.weight, (0, 0, 0, pad)) for x in (mlp.gate_proj, mlp.up_proj))
    # Half a panel of the one beside half a panel of the other.
    found["gate_up"] = in_panels(
        torch.stack([gate.view(-1, half, gate.shape[1]), up.view(-1, half, up.shape[1])], 1).flatten(0, 2)
    )
    found["down"] = in_panels(torch.nn.functional.pad(mlp.down_proj.weight, (0, pad)))
    return found
