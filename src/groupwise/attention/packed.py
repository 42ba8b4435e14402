"""Attention in training: no padding through the model, and each prompt's keys read once for its group."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from groupwise.attention.blocks import BlockAttention, Blocks
from groupwise.attention.interface import run_packed
from groupwise.kernels.packed import Rows, attention, has_kernel


def packs(model: Any) -> bool:
    """Whether this model's attention can run here: tried on a few tokens against the model's own forward."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if model.device.type != "cpu" or layers != {"full_attention"} or getattr(model, "_groupwise_packs", None) is False:
        return False
    if not hasattr(model, "_groupwise_packs"):
        model._groupwise_packs = _trial(model)
        if not model._groupwise_packs and getattr(model.base_model, "_groupwise_fused", None):
            # Each layer is right by itself, but may be called in another way than in its trial.
            model.base_model._groupwise_fused = []
            model._groupwise_packs = _trial(model)
    return bool(model._groupwise_packs)


@torch.no_grad()
@torch.autocast("cpu", enabled=False)  # type: ignore[untyped-decorator]
def _trial(model: Any) -> bool:
    decoder = model.base_model
    tokens = torch.arange(6, device=model.device) % model.config.get_text_config().vocab_size
    layout = Packed([2], torch.tensor([0]), torch.tensor([4]), model.device)
    try:
        ours = run_packed(decoder, tokens, layout.positions_N, layout)
    except (NotImplementedError, AttributeError, LookupError, TypeError, RuntimeError, ValueError):
        return False  # whatever a stranger's forward makes of a flat batch
    theirs = decoder(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
    close = max(1e-3, 10 * torch.finfo(theirs.dtype).eps)
    return bool(torch.allclose(ours, theirs, rtol=close, atol=close * float(theirs.abs().max())))


class Packed:
    """Attention in training: prompts first, then completions, all flat; a completion looks at its prompt and at itself."""

    def __init__(self, prompt_lengths: list[int], group_ids_R: Tensor, lengths_R: Tensor, device: Any) -> None:
        """The layout of P prompts and R completions, of `lengths_R` tokens each, whose prompts `group_ids_R` names."""
        self._lengths = torch.tensor(prompt_lengths), group_ids_R.cpu(), lengths_R.cpu()
        self._device = device
        starts = self._lengths[0][self._lengths[1]].tolist()
        positions = [torch.arange(n) for n in prompt_lengths]
        positions += [start + torch.arange(n) for start, n in zip(starts, lengths_R.tolist(), strict=True)]
        self.positions_N = torch.cat(positions).to(device)

    @cached_property
    def rows(self) -> Rows:
        return Rows(*self._lengths)

    @cached_property
    def blocks(self) -> Blocks:
        return Blocks(*self._lengths, self._device)

    def __call__(self, layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scale: float) -> Tensor:
        # Under autocast queries and keys, and only they, come in float32.
        query, key, value = (x.contiguous().to(value_NKD.dtype) for x in (query_NHD, key_NKD, value_NKD))
        if has_kernel(query, key, value):
            return attention(query, key, value, self.rows, scale)
        output_NHD: Tensor = BlockAttention.apply(query, key, value, self.blocks, scale)  # type: ignore[no-untyped-call]
        return output_NHD
