"""Rows of their own through transformers' own attention: the fallback for decoders that do not run packed.

In training, rows are padded on their right, which a causal decoder never sees. In generation, rows run on a cache that the
decoder makes itself, of whatever kind it is; where padding on the left is not exact, prompts of each length have a batch of their
own; and where no cache is exact, every step runs all tokens again.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from groupwise.models.patches import Forwards, patched
from groupwise.types import pad_rows

CACHE_NAMES = ("past_key_values", "cache_params")
"""What a decoder's output and its forward call the cache."""


def left_pad(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts of any length as (tokens, mask), int64 [P, L] each, padded on the left so that all end at the same position."""
    tokens_PL = pad_rows([prompt.flip(0) for prompt in prompts]).flip(1)
    mask_PL = pad_rows([torch.ones_like(prompt) for prompt in prompts]).flip(1)
    return tokens_PL, mask_PL


def right_pad(rows: list[Tensor]) -> Tensor:
    """Rows of any length as int64 [R, L], each filled up with its own first token.

    A token of the row, since gradients through a token that is never trained, whose embedding is zero, may be NaN.
    """
    width = max(map(len, rows))
    return torch.stack([torch.cat([row, row[:1].expand(width - len(row))]) for row in rows])


def positions(mask_BL: Tensor) -> Tensor:
    """Each token's position among the tokens of its row that are no padding."""
    return (mask_BL.cumsum(1) - 1).clamp(min=0)


def apart(prompts: list[Tensor], rows: list[list[Tensor]]) -> tuple[list[Tensor], list[int]]:
    """Each row with its prompt in front, as prompts of one row each: arguments of `prefill`."""
    whole = [torch.cat([prompt, row]) for prompt, of_prompt in zip(prompts, rows, strict=True) for row in of_prompt]
    return whole, [1] * len(whole)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Rows that run together on one cache."""

    rows: Tensor
    """Which of all rows they are, int64 [r]."""
    cache: Any
    mask_RL: Tensor | None
    """Where padding is on the left; None: there is none."""
    length: int
    """Tokens in the cache, padding included."""


class PaddedCache:
    """The rows being generated, on the decoder's own cache. New prompts wait until all rows are done."""

    joins = False
    """New prompts cannot join while rows are being generated."""
    continues = False
    """Keys and values of a row cannot be copied out and continued."""

    def __init__(self, decoder: Any, *, left_padding: bool, forwards: Forwards = ()) -> None:
        """`left_padding`: run prompts of all lengths in one batch; otherwise those of each length in one of their own.

        `forwards`: what modules run in its forward passes instead of their own.
        """
        self._decoder, self._left_padding, self._forwards = decoder, left_padding, forwards
        self.described = "in padded batches" if left_padding else "in batches of prompts of one length"
        self.described += ", transformers' attention and cache"
        """In words."""
        self._batches: list[_Batch] = []

    def reserve(self, prompts: int, prompt_length: int, rows: int, tokens: int) -> None:
        """Nothing: transformers' cache grows by itself."""

    def clear(self) -> None:
        """Forget all rows."""
        self._batches = []

    def prefill(self, prompts: list[Tensor], counts: list[int]) -> Tensor:
        """Run prompts, each for `counts` rows; returns the last hidden state of each prompt [p, H]."""
        device = prompts[0].device
        lengths = [len(prompt) for prompt in prompts]
        together = (
            [range(len(prompts))]
            if self._left_padding
            else [[i for i, length in enumerate(lengths) if length == wanted] for wanted in dict.fromkeys(lengths)]
        )
        prompt_R = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts))
        hidden: dict[int, Tensor] = {}
        self._batches = []
        for members in together:
            tokens_PL, mask_PL = left_pad([prompts[i] for i in members])
            padded = not bool(mask_PL.all())
            batch = _Batch(torch.zeros(0), None, mask_PL if padded else None, 0)
            hidden_PH, batch = self._forward(batch, tokens_PL, mask_PL if padded else None)
            hidden |= dict(zip(members, hidden_PH, strict=True))
            rows = torch.isin(prompt_R, torch.tensor(list(members))).nonzero()[:, 0]
            slot = {prompt: i for i, prompt in enumerate(members)}
            index = torch.tensor([slot[int(p)] for p in prompt_R[rows]], device=device)
            self._batches.append(self._select(batch, rows.to(device), index))
        return torch.stack([hidden[i] for i in range(len(prompts))])

    def restore(self, prompts: list[Tensor], rows: list[list[Tensor]]) -> Tensor:
        """Run prompts, and for each the rows (at least one token each) that continue it, beside the rows that are there; returns
        the last hidden state [r, H] of each new row."""
        before, count = self._batches, sum(len(batch.rows) for batch in self._batches)
        hidden_RH = self.prefill(*apart(prompts, rows))
        self._batches = before + [replace(batch, rows=batch.rows + count) for batch in self._batches]
        return hidden_RH

    def step(self, tokens_R: Tensor) -> Tensor:
        """Run one more token of each row; returns hidden states [R, H]."""
        parts, moved = [], []
        for batch in self._batches:
            mask_RL = None if batch.mask_RL is None else torch.nn.functional.pad(batch.mask_RL, (0, 1), value=1)
            hidden_RH, batch = self._forward(batch, tokens_R[batch.rows][:, None], mask_RL)
            parts.append(hidden_RH)
            moved.append(batch)
        self._batches = moved
        return torch.cat(parts)[torch.cat([batch.rows for batch in moved]).argsort()]

    def keep(self, keep_R: Tensor) -> Tensor:
        """Drop the other rows. Returns the old index of each row that is left, int64 [r]."""
        order_R = keep_R.nonzero()[:, 0]
        new_R = keep_R.cumsum(0) - 1
        kept = []
        for batch in self._batches:
            index = keep_R[batch.rows].nonzero()[:, 0]
            if len(index):
                kept.append(self._select(batch, new_R[batch.rows[index]], index))
        self._batches = kept
        return order_R

    def _forward(self, batch: _Batch, tokens_RL: Tensor, mask_RL: Tensor | None) -> tuple[Tensor, _Batch]:
        """The last hidden state [R, H] after appending `tokens_RL` to what the batch's cache holds."""
        L = tokens_RL.shape[1]
        arguments: dict[str, Any] = {}
        if batch.cache is not None:
            name, cache = batch.cache
            arguments[name] = cache
        if mask_RL is None:
            position_L = torch.arange(batch.length, batch.length + L, device=tokens_RL.device)
            arguments["position_ids"] = position_L.expand(len(tokens_RL), L)
        else:
            arguments |= {"attention_mask": mask_RL, "position_ids": positions(mask_RL)[:, -L:]}
        with patched(self._forwards):
            output = self._decoder(input_ids=tokens_RL, use_cache=True, **arguments)
        found = next((name, getattr(output, name)) for name in CACHE_NAMES if getattr(output, name, None) is not None)
        hidden_RH: Tensor = output.last_hidden_state[:, -1]
        return hidden_RH, replace(batch, cache=found, mask_RL=mask_RL, length=batch.length + L)

    @staticmethod
    def _select(batch: _Batch, rows: Tensor, index: Tensor) -> _Batch:
        name, cache = batch.cache
        select_rows(cache, index)
        mask_RL = None if batch.mask_RL is None else batch.mask_RL[index]
        return replace(batch, rows=rows, cache=(name, cache), mask_RL=mask_RL)


def select_rows(cache: Any, index: Tensor) -> None:
    """Replace every tensor in a transformers cache by its rows `index`, whatever its layers keep: keys, states, convolutions."""
    seen: set[int] = set()

    def select(holder: Any) -> Any:
        if isinstance(holder, Tensor):
            return holder.index_select(0, index) if holder.dim() > 1 else holder
        if isinstance(holder, dict):
            return {key: select(value) for key, value in holder.items()}
        if isinstance(holder, list | tuple):
            return type(holder)([select(value) for value in holder])
        if _is_part_of_cache(holder) and id(holder) not in seen:
            seen.add(id(holder))
            for name, value in vars(holder).items():
                setattr(holder, name, len(index) if name == "batch_size" else select(value))
        return holder

    select(cache)


def _is_part_of_cache(holder: Any) -> bool:
    return "transformers" in type(holder).__module__ and not isinstance(holder, PreTrainedConfig | torch.nn.Module | type)


class NoCache:
    """The rows being generated, without a cache: each step runs all of their tokens again."""

    joins = True
    continues = False
    described = "without a cache, every step runs all tokens again"

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._rows: list[Tensor] = []

    def reserve(self, prompts: int, prompt_length: int, rows: int, tokens: int) -> None:
        """Nothing: there are no buffers."""

    def clear(self) -> None:
        """Forget all rows."""
        self._rows = []

    def prefill(self, prompts: list[Tensor], counts: list[int]) -> Tensor:
        """Run prompts, each for `counts` rows; returns the last hidden state of each prompt [p, H]."""
        self._rows += [prompt for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)]
        return self._last(prompts)

    def restore(self, prompts: list[Tensor], rows: list[list[Tensor]]) -> Tensor:
        """Run prompts, and for each the rows (at least one token each) that continue it; returns the last hidden state [r, H] of
        each row."""
        return self.prefill(*apart(prompts, rows))

    def step(self, tokens_R: Tensor) -> Tensor:
        """Run one more token of each row; returns hidden states [R, H]."""
        self._rows = [torch.cat([row, token]) for row, token in zip(self._rows, tokens_R[:, None], strict=True)]
        return self._last(self._rows)

    def keep(self, keep_R: Tensor) -> Tensor:
        """Drop the other rows. Returns the old index of each row that is left, int64 [r]."""
        order_R = keep_R.nonzero()[:, 0]
        self._rows = [self._rows[i] for i in order_R.tolist()]
        return order_R

    def _last(self, rows: list[Tensor]) -> Tensor:
        hidden_RLH = self._decoder(input_ids=right_pad(rows), use_cache=False).last_hidden_state
        ends_R = torch.tensor([len(row) - 1 for row in rows], device=hidden_RLH.device)
        hidden_RH: Tensor = hidden_RLH[torch.arange(len(rows), device=hidden_RLH.device), ends_R]
        return hidden_RH
