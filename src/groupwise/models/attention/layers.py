"""A decoder's layers on our CPU kernels: RMSNorm, SwiGLU, and what attention does to its queries and keys (QK-norm, RoPE).

A layer is recognised by the names of its submodules, as most Hugging Face decoders have them, and is taken only if the kernels
compute what it computes: each is tried once against its own forward. All in float32; inputs of another dtype take the layer's
own forward.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from groupwise.kernels.compiled import unavailable
from groupwise.kernels.layers import layer_kernels, rms_norm, rope, swiglu
from groupwise.models.attention.attend import PLAIN, AttentionForm, current_attend
from groupwise.models.patches import has_own_forward, is_observed

TOLERANCE = 1e-4
"""How far a layer may be from its own forward, relative to the largest number of its output."""
NormForm = tuple[float, float]
"""An RMSNorm's epsilon, and what is added to its weight: 0, or 1 in Gemma."""


@dataclass(frozen=True, slots=True)
class LayerForward:
    """A forward on our kernels for one module."""

    module: Any
    forward: partial[Any]
    bypassed: tuple[Any, ...] = ()
    """Submodules whose weights it uses without calling them."""

    @property
    def usable(self) -> bool:
        """Whether nobody has put a forward on the module, or hooks on what would be bypassed, since it was tried."""
        return not has_own_forward(self.module) and not any(map(is_observed, self.bypassed))


def head_size(config: Any) -> int:
    """The size of an attention head, which some configurations leave to be derived."""
    return getattr(config, "head_dim", None) or int(config.hidden_size // config.num_attention_heads)


def matches(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether two ways of computing a tensor agree, relative to its largest number; False where all of it is zero."""
    most = float(theirs.abs().max())
    return most > 0 and ours.dtype == theirs.dtype and bool(torch.allclose(ours, theirs, rtol=0, atol=tolerance * most))


@torch.no_grad()
@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def layer_forwards(decoder: Any) -> tuple[list[LayerForward], list[str]]:
    """The forwards that fit this decoder, found by trial while it is `attending`; and for the others, why they do not.

    On a GPU, RMSNorms alone run otherwise: through PyTorch's fused kernel, where transformers has six.
    """
    if decoder.device.type != "cpu":
        return fused_norms(decoder)
    if layer_kernels() is None:
        return [], [f"layers run as transformers has them: {unavailable('layers')}"]
    found, reasons = [], []
    for name, module in decoder.named_modules():
        if has_own_forward(module):
            continue
        try:
            forward = _forward_for(decoder, module)
        except Exception as error:  # third-party code, called with our inputs, may raise anything
            reasons.append(f"{name} ({type(module).__name__}) runs as transformers has it: {type(error).__name__}: {error}")
            continue
        if forward is not None:
            found.append(forward)
        elif _looks_alike(module):
            reasons.append(f"{name} ({type(module).__name__}) computes something else than our kernels")
    return found, reasons


def _is_norm(module: Any) -> bool:
    return type(module).__name__.endswith("RMSNorm")


def _is_attention(module: Any) -> bool:
    return all(getattr(module, name, None) is not None for name in ("q_proj", "k_proj", "v_proj", "o_proj", "scaling"))


def _looks_alike(module: Any) -> bool:
    return _is_norm(module) or hasattr(module, "gate_proj") or _is_attention(module)


def fused_norms(decoder: Any) -> tuple[list[LayerForward], list[str]]:
    """PyTorch's fused RMSNorm for the decoder's norms that compute the same, tried on the CPU; and why a trial failed."""
    found, reasons = [], []
    for name, module in decoder.named_modules():
        if not _is_norm(module) or has_own_forward(module):
            continue
        try:
            form = _norm_form(module, _rms_norm)
        except Exception as error:  # third-party code, called with our inputs, may raise anything
            reasons.append(f"{name} ({type(module).__name__}) runs as transformers has it: {type(error).__name__}: {error}")
            continue
        if form is not None:
            found.append(LayerForward(module, partial(_fused_norm, module, *form)))
    return found, reasons


def _rms_norm(x: Tensor, weight: Tensor, epsilon: float, offset: float) -> Tensor:
    return torch.nn.functional.rms_norm(x, weight.shape, (weight + offset if offset else weight).to(x.dtype), epsilon)


def _fused_norm(module: Any, epsilon: float, offset: float, x: Tensor) -> Tensor:
    return _rms_norm(x, module.weight, epsilon, offset)


def _forward_for(decoder: Any, module: Any) -> LayerForward | None:
    if _is_norm(module):
        form = _norm_form(module)
        return form and LayerForward(module, partial(_norm, module, *form))
    if hasattr(module, "gate_proj"):
        same = all(matches(_mlp(module, x), module(x)) for x in _trial_inputs(module.gate_proj))
        return LayerForward(module, partial(_mlp, module), tuple(module.children())[3:]) if same else None
    if _is_attention(module):
        forms = _attention_forms(decoder, module)
        norms = tuple(norm for norm in qk_norms(module) if norm is not None)
        return LayerForward(module, partial(_attention, module, forms), norms) if forms else None
    return None


def _trial_inputs(layer: Any) -> list[Tensor]:
    """Six tokens [1, 6, H] of a usual magnitude, and of magnitudes that a clamp inside a layer would cut."""
    x_1NH = torch.randn(1, 6, layer.in_features, generator=torch.Generator().manual_seed(0))
    return [x_1NH * size for size in (1, 30, 1000)]


def _norm_form(module: Any, norm: Callable[[Tensor, Tensor, float, float], Tensor] = rms_norm) -> NormForm | None:
    """None if it is not such a norm, which `norm` computes."""
    epsilon = float(getattr(module, "variance_epsilon", None) or module.eps)
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(module.weight.shape, generator=random)
    x = torch.randn(8, len(weight), generator=random) * torch.logspace(-4, 3, 8)[:, None]  # so small that epsilon counts
    theirs = torch.func.functional_call(module, {"weight": weight}, (x,))
    return next(((epsilon, offset) for offset in (0.0, 1.0) if matches(norm(x, weight, epsilon, offset), theirs)), None)


def _norm(module: Any, epsilon: float, offset: float, x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or module.weight.dtype != torch.float32:
        output: Tensor = type(module).forward(module, x)
        return output
    return rms_norm(x, module.weight, epsilon, offset)


def _mlp(module: Any, x: Tensor) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    inner = swiglu(gate, up) if gate.dtype == torch.float32 else torch.nn.functional.silu(gate) * up
    output: Tensor = module.down_proj(inner)
    return output


def qk_norms(module: Any) -> tuple[Any, Any]:
    """The norms of an attention layer's queries and keys; None where it has none."""
    return getattr(module, "q_norm", None), getattr(module, "k_norm", None)


def _attention_forms(decoder: Any, module: Any) -> list[NormForm | None] | None:
    """The forms of its QK-norms, where it has them; None if our forward computes something else."""
    norms = qk_norms(module)
    forms = [_norm_form(norm) if norm is not None else None for norm in norms]
    if any(form is None and norm is not None for form, norm in zip(forms, norms, strict=True)):
        return None
    token = current_attend.set(TrialAttend())
    try:
        same = True
        for x_1NH in _trial_inputs(module.q_proj):
            position_embeddings = rotary_embeddings(decoder, module, x_1NH, 37 * torch.arange(x_1NH.shape[1])[None])
            theirs, *others = module(hidden_states=x_1NH, position_embeddings=position_embeddings, attention_mask=None)
            ours, _ = _attention(module, forms, hidden_states=x_1NH, position_embeddings=position_embeddings)
            same = same and len(others) == 1 and matches(ours, theirs)
    finally:
        current_attend.reset(token)
    return forms if same else None


def rotary_embeddings(decoder: Any, layer: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for an attention layer; some decoders have other frequencies in layers of another type."""
    by_type = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
    kind = [getattr(layer, "layer_type", None) or decoder.config.layer_types[layer.layer_idx]] if by_type else []
    found: tuple[Tensor, Tensor] = decoder.rotary_emb(x, positions, *kind)
    return found


class TrialAttend:
    """An `Attend` for trials: cheap, and dependent on queries, keys, values, the scale, the form and the order of tokens."""

    def __call__(
        self, layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scale: float, form: AttentionForm = PLAIN
    ) -> Tensor:
        times = query_NHD.shape[1] // key_NKD.shape[1]
        of_form = form.window + form.softcap + (0 if form.sinks_H is None else form.sinks_H[:, None])
        return query_NHD * scale + (key_NKD + 2 * value_NKD).cumsum(0).repeat_interleave(times, 1) * (1 + of_form)

    def mix(self, layer: Any, forward: Callable[..., Tensor], hidden_NH: Tensor) -> Tensor:
        raise NotImplementedError("layers are tried one at a time, and recurrent ones have no kernel")


def form_of(module: Any) -> AttentionForm:
    """What an attention layer adds to plain attention, by the names that transformers' layers give it; tried with the layer."""
    window = module.sliding_window if hasattr(module, "sliding_window") else getattr(module.config, "sliding_window", None)
    softcap, sinks = getattr(module, "attn_logit_softcapping", None), getattr(module, "sinks", None)
    if not (window or softcap) and sinks is None:
        return PLAIN
    return AttentionForm(window=window or 0, softcap=softcap or 0.0, sinks_H=sinks)


def _attention(
    module: Any,
    forms: list[NormForm | None],
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **others: Any,
) -> tuple[Tensor, None]:
    query_norm, key_norm = (
        (norm.weight, *form) if form else (None, 0.0, 0.0) for norm, form in zip(qk_norms(module), forms, strict=True)
    )
    if any(x is not None and x.dtype != torch.float32 for x in (hidden_states, query_norm[0], key_norm[0])):
        output: tuple[Tensor, None] = type(module).forward(module, hidden_states, position_embeddings, **others)
        return output
    x_NH, (cos_ND, sin_ND) = hidden_states[0], (x[0].float() for x in position_embeddings)
    query_NX, key_NX, value_NX = module.q_proj(x_NH), module.k_proj(x_NH), module.v_proj(x_NH)
    query_NHD = rope(query_NX.float(), cos_ND, sin_ND, *query_norm)
    key_NKD = rope(key_NX.float(), cos_ND, sin_ND, *key_norm)
    value_NKD = value_NX.view(key_NKD.shape)
    attended_NHD = current_attend.get()(module.layer_idx, query_NHD, key_NKD, value_NKD, module.scaling, form_of(module))
    return module.o_proj(attended_NHD.flatten(1))[None], None
