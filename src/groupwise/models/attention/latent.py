"""Latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) in generation, with its compressed KV cache.

Keys and values of all heads are projections of one latent vector c per token, and of one rotary key that the heads share. In
generation the projections are absorbed: a query goes through the key projection instead, q . (W_k c) = (W_k^T q) . c, and the
attention output, a weighted sum of latents, through the value projection. So attention runs over one key-value head whose keys
are [c, rotary key] and whose values are c, and the cache keeps those.
"""

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor

from groupwise.models.blocked_weights import is_blocked
from groupwise.models.patches import is_observed

_latents: ContextVar[dict[Any, Tensor]] = ContextVar("groupwise_latents")
"""The latents [N, r] of the attention layer under way."""
SIZES = ("qk_nope_head_dim", "v_head_dim", "kv_lora_rank")


def latent_layers(decoder: Any) -> list[Any]:
    """The decoder's layers of latent attention."""
    return [module for module in decoder.modules() if all(hasattr(module, name) for name in ("kv_b_proj", *SIZES))]


def latent_forwards(layers: list[Any]) -> list[tuple[Any, Callable[..., Tensor]]]:
    """Forwards for their projections from latents to keys and values, which note the latents for `absorbed`.

    Only for projections that are plain linear layers without hooks or adapters.
    """
    return [(layer.kv_b_proj, partial(_project, layer)) for layer in layers if _is_plain(layer.kv_b_proj)]


def _is_plain(projection: Any) -> bool:
    # A blocked copy of its weight may run it while a rollout runs.
    free = type(projection) is torch.nn.Linear and projection.bias is None
    return free and (is_blocked(projection) or not is_observed(projection))


def _project(layer: Any, latent: Tensor) -> Tensor:
    _latents.set({layer: latent.reshape(-1, latent.shape[-1])})
    return torch.nn.functional.linear(latent, layer.kv_b_proj.weight)


def absorbed(layer: Any, run: Callable[[Tensor, Tensor, Tensor], Tensor], query_1HND: Tensor, key_1HND: Tensor) -> Tensor | None:
    """The attention output [1, N, H, v] over latents; None if the layer has noted none, as outside generation.

    `run`: the attention of (query [1, H, N, X], key [1, 1, N, X], value [1, 1, N, r]) -> [1, N, H, r].
    """
    latent_Nr = _latents.get({}).get(layer)
    if latent_Nr is None:
        return None
    _latents.set({})
    nope = layer.qk_nope_head_dim
    weight_HXr = layer.kv_b_proj.weight.view(query_1HND.shape[1], -1, layer.kv_lora_rank)
    to_keys_Hnr, to_values_Hvr = weight_HXr[:, :nope], weight_HXr[:, nope:]
    query_HNr = query_1HND[0, :, :, :nope] @ to_keys_Hnr
    query_1HNX = torch.cat([query_HNr, query_1HND[0, :, :, nope:]], -1)[None]
    key_11NX = torch.cat([latent_Nr, key_1HND[0, 0, :, nope:]], -1)[None, None]
    output_HNr = run(query_1HNX, key_11NX, latent_Nr[None, None])[0].transpose(0, 1)
    output_HNv: Tensor = output_HNr @ to_values_Hvr.transpose(1, 2)
    return output_HNv.transpose(0, 1)[None]
