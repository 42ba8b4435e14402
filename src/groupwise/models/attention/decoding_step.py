"""A decoding step through all of a decoder's layers in one C++ call (`groupwise.kernels.decode_step`), for pre-norm decoders.

Pre-norm: each layer adds to its input the attention output of its norm, and then the SwiGLU MLP of the norm of that, where all
parts run on our kernels (`layers`). A decoder is tried once: whether its layers, and all of it, are such sums.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from groupwise.kernels.blocked import BLOCK, to_blocked
from groupwise.kernels.blocked_bf16 import to_blocked_bf16
from groupwise.kernels.decode_attention import decode_kernel
from groupwise.kernels.decode_step import LAYER_WEIGHTS, step_kernel
from groupwise.models.adapters import is_linear, linear_weight
from groupwise.models.attention.layers import NormForm, TrialAttend, form_of, head_size, matches, qk_norms
from groupwise.models.attention.registry import attending
from groupwise.models.decoder import Decoder
from groupwise.models.patches import is_observed

TAKES = "it takes layers of the form x + attention(norm(x)), then x + SwiGLU(norm(x))"


@dataclass(frozen=True, slots=True)
class Plan:
    """What the layers of a pre-norm decoder have in common."""

    norm: NormForm
    """Of all norms but QK-norms."""
    qk_norm: NormForm
    """Of QK-norms; if there are none, anything."""


class PlanFinder:
    """Finds out whether a decoder is such: by trial when its modules change, and before each use whether the kernel may run."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._modules: list[Any] = []
        self._plan: Plan | None = None

    def find(self, cache_dtype: torch.dtype | None = None) -> Plan | None:
        """The plan for a KV cache in a dtype (None: float32).

        None if the decoder is no such decoder, or if hooks, adapters or third-party forwards inside it would be bypassed.
        """
        decoder = self._decoder
        if not (decoder.backend.one_call_step and decoder.on_cpu) or decoder.compiled:
            return None
        modules = list(decoder.module.modules())
        if [id(module) for module in modules] != [id(module) for module in self._modules]:
            self._modules, self._plan = modules, self._try()
        # Other dtypes, parametrisations, hooks and forwards may have come since the trial.
        usable = (
            self._plan is not None
            and not any(map(is_observed, modules))
            and fits_the_kernel(decoder.module, cache_dtype, bf16_weights=decoder.bf16_step)
        )
        if self._plan is not None and not usable:
            decoder.reasons["one-call step"] = "hooks, forwards or weights inside the decoder would be bypassed"
        elif usable:
            decoder.reasons.pop("one-call step", None)
        return self._plan if usable else None

    def _try(self) -> Plan | None:
        try:
            with self._decoder.exact():
                plan = _plan_of(self._decoder)
        except Exception as error:  # third-party modules may lack or raise anything
            self._decoder.reasons["one-call step"] = f"{TAKES}: {type(error).__name__}"
            return None
        if plan is None:
            self._decoder.reasons["one-call step"] = f"{TAKES}, with uniform norms and fixed RoPE"
        return plan


def _plan_of(decoder: Decoder) -> Plan | None:
    module, forms = decoder.module, {layer.module: layer.forward.args[1:] for layer in decoder.layers()}
    if _children(module) != {"embed_tokens", "layers", "norm", "rotary_emb"} or not _is_fixed(module.rotary_emb):
        return None
    if any(_children(layer) != {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"} for layer in module.layers):
        return None
    norms = {forms[module.norm]}
    qk_forms: set[NormForm | None] = set()
    for layer in module.layers:
        norms |= {forms[layer.input_layernorm], forms[layer.post_attention_layernorm]}
        qk_forms |= {*forms[layer.self_attn][0]}
        if layer.mlp not in forms:
            return None
    attention = [form_of(layer.self_attn) for layer in module.layers]
    if any(form.sinks_H is not None for form in attention):
        return None
    scales = {(layer.self_attn.scaling, form.softcap) for layer, form in zip(module.layers, attention, strict=True)}
    uniform = len(norms) == len(qk_forms) == len(scales) == 1
    if not (uniform and fits_the_kernel(module) and _is_sum_of_parts(decoder)):
        return None
    return Plan(norm=norms.pop(), qk_norm=qk_forms.pop() or (0.0, 0.0))


def _children(module: Any) -> set[str]:
    return {name for name, _ in module.named_children()}


def _is_fixed(rotary: Any) -> bool:
    """Whether the rotary embedding of a position does not depend on the sequence's length."""
    return "dynamic" not in rotary.rope_type and rotary.rope_type != "longrope"


def fits_the_kernel(module: Any, cache_dtype: torch.dtype | None = None, *, bf16_weights: bool = False) -> bool:
    """Whether the decoder's weights are those that the kernel reads, and no others, in the shapes and the dtype that it reads.

    `cache_dtype`: of the KV cache (None: float32). `bf16_weights`: matrices are rounded to bfloat16 when they are copied.
    """
    config, size = module.config, head_size(module.config)
    query_width, key_width = config.num_attention_heads * size, config.num_key_value_heads * size
    every = {id(parameter): parameter for parameter in module.parameters()}
    layers = [_parts(layer) for layer in module.layers]
    read = [module.embed_tokens, module.norm, *(part for parts in layers for part in parts)]
    widths = [query_width, key_width, key_width, config.hidden_size]
    return (
        len(layers) == config.num_hidden_layers
        and {id(parameter) for part in read for parameter in part.parameters()} == every.keys()
        and all(parameter.dtype == torch.float32 for parameter in every.values())
        and len({layer.mlp.gate_proj.out_features for layer in module.layers}) == 1
        and all(_linears_fit(*parts[:7], widths=widths) for parts in layers)
        and not (bf16_weights and (config.hidden_size % 2 or query_width % 2))
        and step_kernel(size, cache_dtype or torch.float32, bf16_weights=bf16_weights) is not None
        and decode_kernel(size, torch.float32, cache_dtype) is not None
    )


def _parts(layer: Any) -> list[Any]:
    """A layer's seven linear layers, then its norms."""
    attention, mlp = layer.self_attn, layer.mlp
    linears = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj
    norms = layer.input_layernorm, layer.post_attention_layernorm, *qk_norms(attention)
    return [*linears, *(norm for norm in norms if norm is not None)]


def _linears_fit(*linears: Any, widths: list[int]) -> bool:
    """Whether they are linear layers, those of attention of these widths, with biases in attention only."""
    plain = all(map(is_linear, linears))
    biased = [linear.bias is not None for linear in linears]
    return plain and [x.out_features for x in linears[:4]] == widths and len(set(biased[:3])) == 1 and not any(biased[4:])


@torch.no_grad()
@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def _is_sum_of_parts(decoder: Decoder) -> bool:
    module = decoder.module
    tokens = torch.arange(6)[None] % module.embed_tokens.num_embeddings
    positions = 37 * torch.arange(6)[None]
    x = module.embed_tokens(tokens)
    position_embeddings = module.rotary_emb(x, positions)
    at = {"attention_mask": None, "position_embeddings": position_embeddings}
    with attending(module, TrialAttend(), decoder.forwards()):
        for layer in module.layers:
            attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(x), **at)
            inner = layer.mlp(layer.post_attention_layernorm(x + attended))
            theirs = layer(x, position_ids=positions, use_cache=False, **at)
            if not (attended.any() and inner.any() and matches(attended + inner, theirs - x)):
                return False
            x = theirs
        output = module(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
        return matches(module.norm(x), output)


class OneCallStep:
    """The kernel with a blocked copy of a pre-norm decoder's matrices, adapters included; other weights are read in place."""

    def __init__(
        self,
        module: Any,
        plan: Plan,
        positions: int,
        rows: int,
        cache_dtype: torch.dtype,
        *,
        bf16_weights: bool = False,
    ) -> None:
        """For sequences of up to `positions` tokens, prompt and completion together, and up to `rows` of them at once.

        Args:
            cache_dtype: of the KV cache, one for which `step_kernel` compiles.
            bf16_weights: the copies are in bfloat16, and so are the inputs of their matmuls.
        """
        kernel = step_kernel(head_size(module.config), cache_dtype, bf16_weights=bf16_weights)
        assert kernel is not None
        self._kernel, self._plan, self._module = kernel, plan, module
        self._layers = [_blocked_weights(layer, to_blocked_bf16 if bf16_weights else to_blocked) for layer in module.layers]
        pointers = [[0 if w is None else w.data_ptr() for w in (layer[name] for name in LAYER_WEIGHTS)] for layer in self._layers]
        self._pointers = torch.tensor(pointers)
        self._norm = module.norm.weight.detach().contiguous()
        forms = [form_of(layer.self_attn) for layer in module.layers]
        self._softcap, self._windows = forms[0].softcap, torch.tensor([form.window for form in forms])
        self._scale, self._heads = module.layers[0].self_attn.scaling, module.config.num_attention_heads
        self.resize(positions, rows)

    def resize(self, positions: int, rows: int) -> None:
        """Grow the buffers for longer sequences or more rows."""
        weight, size, K = (
            self._module.embed_tokens.weight,
            head_size(self._module.config),
            self._module.config.num_key_value_heads,
        )
        cos, sin = self._module.rotary_emb(weight[:1, None], torch.arange(positions)[None])
        self._cos_sin = cos[0].contiguous(), sin[0].contiguous()
        inner = _inner_size(self._module.layers[0].mlp)
        widths = weight.shape[1], (self._heads + 2 * K) * size, self._heads * size, inner
        self._buffers = [weight.new_empty(rows, width) for width in widths]

    def __call__(self, tokens_R: Tensor, caches: Tensor, layout: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
        """Run one more token of each row; returns hidden states [R, H], which the next call overwrites.

        Args:
            tokens_R: the tokens, int64.
            caches: int64 [layers, 3] on the CPU: of each layer the addresses (`data_ptr()`) of its row_cache, prompt_keys and
                prompt_values, contiguous tensors of `cache_dtype`.
            layout: the other tensors of the C++ struct Cache, all int64: written, prompt_lengths, prompts, order, starts.
            sizes: its numbers: row_capacity, P, K, T, L, max_rows.
        """
        x_RH = self._module.embed_tokens(tokens_R)
        forms = *self._plan.norm[::-1], *self._plan.qk_norm[::-1]
        tensors = x_RH, *self._buffers, self._pointers, self._norm, *self._cos_sin, caches, self._windows, *layout
        model = *x_RH.shape, self._buffers[-1].shape[1], self._heads, len(self._layers)
        self._kernel(*tensors, self._scale, self._softcap, *forms, *model, *sizes)
        hidden_RH: Tensor = self._buffers[0][: len(tokens_R)]
        return hidden_RH


def _blocked_weights(layer: Any, to_blocked: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A layer's weights by the names of `LAYER_WEIGHTS`."""
    attention, mlp = layer.self_attn, layer.mlp
    qkv = attention.q_proj, attention.k_proj, attention.v_proj
    vectors = {"norm": layer.input_layernorm.weight, "mlp_norm": layer.post_attention_layernorm.weight}
    for name, norm in zip(("query_norm", "key_norm"), qk_norms(attention), strict=True):
        vectors[name] = getattr(norm, "weight", None)
    vectors["qkv_bias"] = None if qkv[0].bias is None else torch.cat([x.bias for x in qkv])
    vectors["out_bias"] = attention.o_proj.bias
    weights = {name: None if vector is None else vector.detach().contiguous() for name, vector in vectors.items()}
    weights["qkv"] = to_blocked(torch.cat([linear_weight(x) for x in qkv]))
    weights["out"] = to_blocked(linear_weight(attention.o_proj))
    half, pad = BLOCK // 2, _inner_size(mlp) - mlp.gate_proj.out_features
    gate, up = (torch.nn.functional.pad(linear_weight(x), (0, 0, 0, pad)) for x in (mlp.gate_proj, mlp.up_proj))
    # Each block has half a block of gate next to half a block of up, so that SwiGLU needs no second pass.
    weights["gate_up"] = to_blocked(
        torch.stack([gate.view(-1, half, gate.shape[1]), up.view(-1, half, up.shape[1])], 1).flatten(0, 2)
    )
    weights["down"] = to_blocked(torch.nn.functional.pad(linear_weight(mlp.down_proj), (0, pad)))
    return weights


def _inner_size(mlp: Any) -> int:
    """The width between an MLP's matrices, filled up with zeros to a multiple of half a block."""
    return -(-int(mlp.gate_proj.out_features) // (BLOCK // 2)) * (BLOCK // 2)
