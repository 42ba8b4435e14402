"""A decoder's layers on our kernels (`groupwise.kernels.layers`): norms, gated products, and what attention does to its queries.

A layer is known by the names of its parts, as most Hugging Face decoders have them, and is taken only if it does what the
kernels do: each is tried once against its own forward. All in float32; what comes in another dtype goes the layer's own way.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from groupwise.attention.attend import current_attend
from groupwise.kernels.layers import gated, kernels, norm, rotated

_EXACT = 1e-4
"""How far a layer may be from its own forward, relative to the largest number of its output."""


@contextmanager
def fused(decoder: Any) -> Iterator[None]:
    """Within: the layers that fit run on our kernels. For a decoder whose attention calls back to an `Attend`."""
    found = fitting(decoder)
    # A compiler must see the decoder's own layers; and a forward that somebody else has put in place stays there.
    usable = decoder._compiled_call_impl is None
    layers = [(layer, forward) for layer, forward in found if usable and "forward" not in vars(layer)]
    try:
        for layer, forward in layers:
            vars(layer)["forward"] = forward  # by way of Module.__setattr__ it would take 2 % of a generation
        yield
    finally:
        for layer, _ in layers:
            vars(layer).pop("forward", None)  # the class's own is seen again


def fitting(decoder: Any) -> list[tuple[Any, partial[Any]]]:
    """Layers, and what may take the place of their forward; found out once, while `attending`."""
    if decoder.device.type != "cpu":
        return []
    if not hasattr(decoder, "_groupwise_fused"):
        decoder._groupwise_fused = _fitting(decoder)
    found: list[tuple[Any, partial[Any]]] = decoder._groupwise_fused
    return found


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or int(config.hidden_size // config.num_attention_heads)


@torch.no_grad()
@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def _fitting(decoder: Any) -> list[tuple[Any, partial[Any]]]:
    found: list[tuple[Any, partial[Any]]] = []
    if kernels() is None:
        return found
    for module in decoder.modules():
        # A forward that somebody else has put in place stays there.
        if "forward" in vars(module):
            continue
        try:
            if type(module).__name__.endswith("RMSNorm") and (form := _form_of_norm(module)):
                found.append((module, partial(_norm, module, *form)))
            elif hasattr(module, "gate_proj") and all(alike(_gated(module, x), module(x)) for x in _inputs(module.gate_proj)):
                found.append((module, partial(_gated, module)))
            elif hasattr(module, "q_proj") and (forms := _forms_in_attention(decoder, module)):
                found.append((module, partial(_attention, module, forms)))
        except Exception:  # whatever a stranger's layer makes of the trial: then it stays as it is
            continue
    return found


def _inputs(layer: Any) -> list[Tensor]:
    """Six tokens [1, 6, H] of a usual size, and of sizes that a limit on a layer's numbers would cut."""
    x_1NH = torch.randn(1, 6, layer.in_features, generator=torch.Generator().manual_seed(0))
    return [x_1NH * size for size in (1, 30, 1000)]


def alike(ours: Tensor, theirs: Tensor) -> bool:
    most = float(theirs.abs().max())
    return most > 0 and ours.dtype == theirs.dtype and bool(torch.allclose(ours, theirs, rtol=0, atol=_EXACT * most))


Form = tuple[float, float]
"""A norm's epsilon, and what is added to its weight: 0, or 1 in Gemma."""


def _form_of_norm(module: Any) -> Form | None:
    """None if it is not such a norm."""
    epsilon = float(getattr(module, "variance_epsilon", None) or module.eps)
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(module.weight.shape, generator=random)
    x = torch.randn(8, len(weight), generator=random) * torch.logspace(-4, 3, 8)[:, None]  # so small that epsilon counts
    theirs = torch.func.functional_call(module, {"weight": weight}, (x,))
    return next(((epsilon, offset) for offset in (0.0, 1.0) if alike(norm(x, weight, epsilon, offset), theirs)), None)


def _norm(module: Any, epsilon: float, offset: float, x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or module.weight.dtype != torch.float32:
        output: Tensor = type(module).forward(module, x)
        return output
    return norm(x, module.weight, epsilon, offset)


def _gated(module: Any, x: Tensor) -> Tensor:
    gate, up = module.gate_proj(x), module.up_proj(x)
    product = gated(gate, up) if gate.dtype == torch.float32 else torch.nn.functional.silu(gate) * up
    output: Tensor = module.down_proj(product)
    return output


def _forms_in_attention(decoder: Any, module: Any) -> list[Form | None] | None:
    """The forms of the norms of its queries and of its keys, where it has them; None if ours is not what it does."""
    norms = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    forms = [_form_of_norm(found) if found is not None else None for found in norms]
    if any(form is None and found is not None for form, found in zip(forms, norms, strict=True)):
        return None
    token = current_attend.set(stand_in)
    try:
        same = True
        for x_1NH in _inputs(module.q_proj):
            turned = decoder.rotary_emb(x_1NH, 37 * torch.arange(x_1NH.shape[1])[None])
            theirs, *others = module(hidden_states=x_1NH, position_embeddings=turned, attention_mask=None)
            ours, _ = _attention(module, forms, hidden_states=x_1NH, position_embeddings=turned)
            same = same and len(others) == 1 and alike(ours, theirs)
    finally:
        current_attend.reset(token)
    return forms if same else None


def stand_in(layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scale: float) -> Tensor:
    """For an `Attend`: something that depends on all of them, and on each token's place."""
    times = query_NHD.shape[1] // key_NKD.shape[1]
    return query_NHD * scale + (key_NKD + 2 * value_NKD).cumsum(0).repeat_interleave(times, 1)


def _attention(
    module: Any, forms: list[Form | None], hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **others: Any
) -> tuple[Tensor, None]:
    of_queries, of_keys = (
        (getattr(module, name).weight, *form) if form else (None, 0.0, 0.0)
        for name, form in zip(("q_norm", "k_norm"), forms, strict=True)
    )
    if any(x is not None and x.dtype != torch.float32 for x in (hidden_states, of_queries[0], of_keys[0])):
        output: tuple[Tensor, None] = type(module).forward(module, hidden_states, position_embeddings, **others)
        return output
    x_NH, (cos_ND, sin_ND) = hidden_states[0], (x[0].float() for x in position_embeddings)
    query_NX, key_NX, value_NX = module.q_proj(x_NH), module.k_proj(x_NH), module.v_proj(x_NH)
    query_NHD = rotated(query_NX.float(), cos_ND, sin_ND, *of_queries)
    key_NKD = rotated(key_NX.float(), cos_ND, sin_ND, *of_keys)
    value_NKD = value_NX.view(key_NKD.shape)
    gathered_NHD = current_attend.get()(module.layer_idx, query_NHD, key_NKD, value_NKD, module.scaling)
    return module.o_proj(gathered_NHD.flatten(1))[None], None
