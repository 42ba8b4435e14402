"""Attention in training: no padding through the model, and each prompt's keys read once for its group."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from groupwise.attention import flexible
from groupwise.attention.blocks import BlockAttention, Blocks
from groupwise.attention.interface import run_packed
from groupwise.kernels.packed import Rows, attention, has_kernel


def packs(model: Any) -> bool:
    """Whether this model's attention can run here: tried against the model's own forward, once for a device and a dtype."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if model.device.type not in ("cpu", "cuda") or layers != {"full_attention"}:
        return False
    tried, works = getattr(model, "_groupwise_packs", (None, False))
    if tried != (model.device, model.dtype):
        works = _trial(model)
        if not works and getattr(model.base_model, "_groupwise_fused", None):
            # Each layer is right by itself, but may be called in another way than in its trial.
            model.base_model._groupwise_fused = []
            works = _trial(model)
        model._groupwise_packs = (model.device, model.dtype), works
    return bool(works)


TRIED = {"cpu": (2, 4), "cuda": (100, 200)}
"""Tokens of a prompt and of a completion: few, but on a GPU enough for flex attention to take the kernels that training takes."""


def _trial(model: Any) -> bool:
    prompt, row = TRIED[model.device.type]
    tokens = torch.arange(prompt + row, device=model.device) % model.config.get_text_config().vocab_size
    layout = Packed([prompt], torch.tensor([0]), torch.tensor([row]), model.device)
    try:
        ours = _output_and_gradient(model, lambda decoder: run_packed(decoder, tokens, layout.positions_N, layout))
    except Exception:  # whatever a stranger's forward makes of a flat batch, or a GPU's compiler of attention
        return False
    theirs = _output_and_gradient(model, lambda decoder: decoder(input_ids=tokens[None], use_cache=False).last_hidden_state[0])
    return all(close(one, other) for one, other in zip(ours, theirs, strict=True))


def _output_and_gradient(model: Any, run: Callable[[Any], Tensor]) -> list[Tensor]:
    """The gradient, with respect to some parameter that has one, on a GPU only: flex attention has a kernel of its own for it."""
    trained = [p for p in model.base_model.parameters() if p.requires_grad and _has_own_backward(model.device)][:1]
    with torch.inference_mode(False), torch.set_grad_enabled(bool(trained)), torch.autocast(model.device.type, enabled=False):
        output = run(model.base_model)
        weighted = output.float() * torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape)
        return [output.detach(), *(torch.autograd.grad(weighted.sum(), trained) if trained else ())]


def _has_own_backward(device: torch.device) -> bool:
    return device.type != "cpu"


def close(ours: Tensor, theirs: Tensor) -> bool:
    """As near as two ways of computing the same come in their dtype."""
    tolerance = max(1e-3, 10 * torch.finfo(theirs.dtype).eps)
    return bool(torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max())))


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
    def block_mask(self) -> BlockMask:
        return flexible.block_mask(flexible.sees(*self._lengths, self._device), len(self.positions_N), self._device)

    @cached_property
    def blocks(self) -> Blocks:
        return Blocks(*self._lengths, self._device)

    def __call__(self, layer: int, query_NHD: Tensor, key_NKD: Tensor, value_NKD: Tensor, scale: float) -> Tensor:
        # Under autocast queries and keys, and only they, come in float32.
        query, key, value = (x.contiguous().to(value_NKD.dtype) for x in (query_NHD, key_NKD, value_NKD))
        if query.device.type != "cpu":
            return flexible.attention(query, key, value, self.block_mask, scale)
        if has_kernel(query, key, value):
            return attention(query, key, value, self.rows, scale)
        output_NHD: Tensor = BlockAttention.apply(query, key, value, self.blocks, scale)  # type: ignore[no-untyped-call]
        return output_NHD
