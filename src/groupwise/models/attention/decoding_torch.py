"""Attention of one decoding step in PyTorch: the fallback of `kernels.decode_attention` for other devices and without a compiler.

S query heads share a key-value head. A row's cache has capacity for T tokens, a prompt's for L.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from groupwise.models.attention.attend import PLAIN, AttentionForm


@dataclass(frozen=True, slots=True)
class StepLayout:
    """The rows of a decoding step and their prompts, with `width` slots for the rows of each prompt."""

    written_R: Tensor
    """Tokens of each row whose keys are in the cache, the current one included."""
    prompt_R: Tensor
    """The prompt of each row."""
    slot_R: Tensor
    """Each row's slot among prompts x width; beyond them for a row that only fills up the batch."""
    lengths_P: Tensor
    """Tokens of each prompt."""
    width: int
    window: int
    """Tokens of the rows' cache that are read; at least as many as any row has."""
    masks: dict[int, Tensor] = field(default_factory=dict)
    """What `hidden` has returned in this step, by sliding window: the layers of a step share it."""

    def hidden(self, L: int, sliding_window: int) -> Tensor:
        """bool [R, L + window]: the tokens of a prompt's cache and of a row's that the row's newest token does not see."""
        if sliding_window not in self.masks:
            device = self.written_R.device
            prompt_L, row_T = torch.arange(L, device=device), torch.arange(self.window, device=device)
            lengths_R = self.lengths_P[self.prompt_R]
            hidden_RX = torch.cat([prompt_L >= lengths_R[:, None], row_T >= self.written_R[:, None]], 1)
            if sliding_window:
                first_R1 = (self.written_R - sliding_window)[:, None]  # the first visible token, counted from the row's first
                hidden_RX |= torch.cat([prompt_L - lengths_R[:, None] < first_R1, row_T < first_R1], 1)
            self.masks[sliding_window] = hidden_RX
        return self.masks[sliding_window]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.written_R, self.prompt_R, self.slot_R, self.lengths_P

    def padded(self, rows: int, prompts: int, width: int, window: int) -> "StepLayout":
        """The same rows and others that only fill up the batch, whose cache entries must belong to no row."""
        spare, pad = rows - len(self.prompt_R), torch.nn.functional.pad
        slot_R = self.slot_R + self.prompt_R * (width - self.width)
        return StepLayout(
            written_R=pad(self.written_R, (0, spare), value=1),
            prompt_R=pad(self.prompt_R, (0, spare)),
            slot_R=pad(slot_R, (0, spare), value=prompts * width),
            lengths_P=pad(self.lengths_P, (0, prompts - len(self.lengths_P))),
            width=width,
            window=window,
        )

    def by_prompt(self, x_RKSX: Tensor) -> Tensor:
        """Rows of a prompt next to each other, [P, K, width * S, X]; zeros where a prompt has fewer rows than `width`."""
        slots = x_RKSX.new_zeros(len(self.lengths_P) * self.width + 1, *x_RKSX.shape[1:])
        slots[self.slot_R] = x_RKSX
        return torch.unflatten(slots[:-1], 0, (-1, self.width)).transpose(1, 2).flatten(2, 3)

    def by_row(self, x_PKQX: Tensor) -> Tensor:
        slots = torch.unflatten(x_PKQX, 2, (self.width, -1)).transpose(1, 2).flatten(0, 1)
        return slots[self.slot_R.clamp(max=len(slots) - 1)]


def attend_newest(
    at: StepLayout,
    row_cache: Tensor,
    prompt_keys_PKLD: Tensor,
    prompt_values_PKLD: Tensor,
    query_RHD: Tensor,
    key_RKD: Tensor,
    value_RKD: Tensor,
    scale: float,
    form: AttentionForm = PLAIN,
) -> Tensor:
    """The attention output of each row's newest token, [R, H, D]. Writes its key and value to `row_cache` [2, rows, K, T, D].

    The caches may have another dtype than the rest. What they hold beyond a row's or a prompt's tokens must be finite, since 0
    times NaN is NaN.
    """
    R, K = key_RKD.shape[:2]
    device, L = key_RKD.device, prompt_keys_PKLD.shape[2]
    rows_R = torch.arange(R, device=device)
    for cache, new in zip(row_cache, (key_RKD, value_RKD), strict=True):
        cache[rows_R, :, at.written_R - 1] = new.to(cache.dtype)
    keys_RKTD, values_RKTD = row_cache[:, :R, :, : at.window]
    P = len(at.lengths_P)

    query_RKSD = torch.unflatten(query_RHD, 1, (K, -1))
    of_prompt = at.by_row(_scores(at.by_prompt(query_RKSD), prompt_keys_PKLD[:P]))
    scores_RKST = torch.cat([of_prompt, _scores(query_RKSD, keys_RKTD)], -1) * scale
    if form.softcap:
        scores_RKST = form.softcap * torch.tanh(scores_RKST / form.softcap)
    scores_RKST.masked_fill_(at.hidden(L, form.window)[:, None, None], -torch.inf)
    weights_RKST = _softmax(scores_RKST, form.sinks_H).to(query_RHD.dtype)
    output_RKSD: Tensor = weights_RKST[..., L:] @ values_RKTD.to(query_RHD.dtype)
    output_RKSD += at.by_row(at.by_prompt(weights_RKST[..., :L]) @ prompt_values_PKLD[:P].to(query_RHD.dtype))
    output_RHD: Tensor = output_RKSD.flatten(1, 2)
    return output_RHD


def _softmax(scores_RKST: Tensor, sinks_H: Tensor | None) -> Tensor:
    if sinks_H is None:
        return scores_RKST.softmax(-1)
    sinks_RKS1 = sinks_H.to(scores_RKST.dtype).view(1, *scores_RKST.shape[1:3], 1).expand(*scores_RKST.shape[:3], 1)
    return torch.cat([scores_RKST, sinks_RKS1], -1).softmax(-1)[..., :-1]


def _scores(query: Tensor, keys: Tensor) -> Tensor:
    """float32 [X, K, Q, T] of [X, K, Q, D] and [X, K, T, D]: scores rounded to bfloat16 would change the distribution."""
    keys = keys.transpose(2, 3).to(query.dtype)
    if query.dtype == torch.float32 or query.device.type != "cuda":
        return query.float() @ keys.float()
    scores = torch.bmm(query.flatten(0, 1), keys.flatten(0, 1), out_dtype=torch.float32)
    return torch.unflatten(scores, 0, keys.shape[:2])
