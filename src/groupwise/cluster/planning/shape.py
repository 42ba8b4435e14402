"""The sizes of a model that memory and time depend on, read from its configuration: no weights are loaded."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from groupwise.errors import UserError
from groupwise.models.loading import MOST_LAYERS

FULL, WINDOW = ("full_attention",), ("sliding_attention", "chunked_attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedLayer:
    """What an attention layer's KV cache keeps."""

    native: int
    """Numbers per token in the native sampler, which pads values to the size of keys and keeps what is outside a window too."""
    vllm: int
    """Numbers per token in vLLM."""
    window: int
    """Tokens that a sliding window keeps; 0: all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Counts are of numbers, not bytes; those "per token" of one packed token."""

    parameters: int
    """Of the whole model, a matrix shared by embedding and output layer counted once."""
    active: int
    """Of these, those that a token is multiplied with: without the embedding, of a mixture only the chosen experts."""
    routed: int
    """Of the experts among which a router chooses."""
    chosen: float
    """A token's share of these."""
    vocabulary: int
    hidden: int
    layers: int
    linear: int
    """Of the decoder's linear layers, of which adapters and rounded copies are made."""
    linear_widths: int
    """Inputs plus outputs of these layers, summed: a LoRA adapter of rank r has r times as many parameters."""
    head: int
    """Of the output matrix."""
    root: int
    """Outside the decoder layers, the output matrix included: FSDP2's root group."""
    largest_layer: int
    largest_matrix: int
    """Of one that is not embedding or output layer."""
    attention: int
    """Kept per token and layer for attention's backward pass."""
    attended: int
    """Of an attention layer's output, before its last projection."""
    mlp_width: int
    """Between an MLP's matrices, over all the experts of a token."""
    experts: int
    """Experts that run a token; 0: no mixture."""
    heads: int
    cache: tuple[CachedLayer, ...]
    state: int
    """Numbers in the states of recurrent layers, per row."""
    positions: int
    """The longest sequence; 0: not said."""

    def adapter(self, rank: int) -> int:
        """Parameters of LoRA adapters on all linear layers of the decoder."""
        return rank * self.linear_widths

    def read(self, rows: int) -> float:
        """Parameters that a step over so many tokens is expected to read: of a mixture the experts that one of them chooses, each
        expert as often as any other."""
        return self.active + self.routed * ((1 - (1 - self.chosen) ** rows) - self.chosen)

    def cached(self, tokens: int, *, vllm: bool = False) -> int:
        """Numbers that the KV cache keeps of a sequence of so many tokens."""
        if vllm:
            return sum(layer.vllm * (min(tokens, layer.window) if layer.window else tokens) for layer in self.cache)
        return sum(layer.native for layer in self.cache) * tokens


def shape_of(config: Any, *, trust_remote_code: bool = False) -> ModelShape:
    """
    Raises:
        UserError: transformers cannot make the model that the configuration describes.
    """
    text = config.get_text_config()
    if not 0 < int(getattr(text, "num_hidden_layers", 0) or 0) <= MOST_LAYERS:
        raise UserError(f"the model's configuration has no number of layers from 1 to {MOST_LAYERS:,}")
    try:
        with torch.device("meta"):  # shapes without memory
            module = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except Exception as error:  # third-party configurations and model code may raise anything
        raise UserError(f"the model's configuration cannot be used: {type(error).__name__}: {str(error)[:200]}") from error
    return _measure(module, text)


def _measure(module: Any, text: Any) -> ModelShape:
    sizes = {id(parameter): parameter.numel() for parameter in module.parameters()}
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    layers = _decoder_layers(module, int(text.num_hidden_layers))
    inside = {id(parameter): parameter.numel() for layer in layers for parameter in layer.parameters()}
    linears = [m for layer in layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    outside = [id(parameter) for part in (head, embedding) if part is not None for parameter in part.parameters()]
    matrices = [parameter.numel() for layer in layers for parameter in layer.parameters() if parameter.dim() == 2]
    total, of_head = sum(sizes.values()), text.vocab_size * text.hidden_size
    chosen, width, routed, share = _experts(text, layers)
    embedded = 0 if set(outside) and len(set(outside)) < len(outside) else of_head
    return ModelShape(
        parameters=total,
        active=total - embedded - routed + round(routed * share),
        routed=routed,
        chosen=share,
        vocabulary=text.vocab_size,
        hidden=text.hidden_size,
        layers=int(text.num_hidden_layers),
        linear=sum(m.in_features * m.out_features for m in linears),
        linear_widths=sum(m.in_features + m.out_features for m in linears),
        head=of_head,
        root=total - sum(inside.values()),
        largest_layer=max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers),
        largest_matrix=max(matrices, default=0),
        attention=_attention(text, any(name.endswith("q_norm") for name, _ in module.named_modules())),
        attended=_head_sizes(text)[0] if not getattr(text, "kv_lora_rank", None) else _head_sizes(text)[2],
        mlp_width=width,
        experts=chosen,
        heads=int(text.num_attention_heads),
        cache=_cache(text),
        state=_state(text),
        positions=int(getattr(text, "max_position_embeddings", 0) or 0),
    )


def _decoder_layers(module: Any, count: int) -> list[Any]:
    """The largest list of as many modules as the configuration has layers."""
    lists: list[list[Any]] = [list(found) for found in module.modules() if isinstance(found, torch.nn.ModuleList)]
    lists = [found for found in lists if len(found) == count]
    if not lists:
        raise UserError(f"{type(module).__name__} has no list of {count} layers, so its memory cannot be planned")
    return max(lists, key=lambda found: sum(parameter.numel() for layer in found for parameter in layer.parameters()))


def _experts(text: Any, layers: list[Any]) -> tuple[int, int, int, float]:
    """Experts per token, the MLP width that a token goes through, parameters of routed experts, and a token's share of these."""
    count = next((n for key in ("num_local_experts", "num_experts", "n_routed_experts") if (n := getattr(text, key, None))), 0)
    dense = int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    if not count:
        return 0, dense, 0, 0.0
    chosen = int(getattr(text, "num_experts_per_tok", None) or 1)
    width = int(getattr(text, "moe_intermediate_size", None) or dense)
    shared = int(getattr(text, "shared_expert_intermediate_size", None) or (getattr(text, "n_shared_experts", None) or 0) * width)
    routed = sum(
        parameter.numel()
        for layer in layers
        for name, parameter in layer.named_parameters()
        if "experts" in name and "shared" not in name
    )
    return chosen, chosen * width + shared, routed, chosen / int(count)


def _head_sizes(text: Any) -> tuple[int, int, int]:
    """Widths of all heads' queries, keys and values together."""
    heads = int(text.num_attention_heads)
    if getattr(text, "kv_lora_rank", None):
        key = int(text.qk_nope_head_dim) + int(text.qk_rope_head_dim)
        return heads * key, heads * key, heads * int(text.v_head_dim)
    size = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    shared = int(getattr(text, "num_key_value_heads", None) or heads)
    return heads * size, shared * size, shared * size


def _attention(text: Any, qk_norm: bool) -> int:
    query, key, value = _head_sizes(text)
    output = query if not getattr(text, "kv_lora_rank", None) else value
    return query + key + value + output + int(text.num_attention_heads) + (query + key if qk_norm else 0)


def _cache(text: Any) -> tuple[CachedLayer, ...]:
    _, key, value = _head_sizes(text)
    kinds = list(getattr(text, "layer_types", None) or ["full_attention"] * int(text.num_hidden_layers))
    native, vllm = key + value, key + value
    if rank := getattr(text, "kv_lora_rank", None):
        vllm = int(rank) + int(text.qk_rope_head_dim)
        native = 2 * vllm
    window = int(getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None) or 0)
    return tuple(
        CachedLayer(native=native, vllm=vllm, window=window if kind in WINDOW else 0) for kind in kinds if kind in FULL + WINDOW
    )


def _state(text: Any) -> int:
    """Of gated delta rules, whose sizes the configuration names; states of other recurrent layers are small and not counted."""
    kinds = list(getattr(text, "layer_types", None) or [])
    heads, key, value = (
        int(getattr(text, name, None) or 0) for name in ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
    )
    return kinds.count("linear_attention") * heads * key * value
