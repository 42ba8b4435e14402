"""Padded batches through transformers' own attention: the fallback for decoders that do not run packed."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from groupwise.types import pad_rows


def left_pad(prompts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Prompts of any length as (tokens, mask), int64 [P, L] each, padded on the left so that all end at the same position."""
    tokens_PL = pad_rows([prompt.flip(0) for prompt in prompts]).flip(1)
    mask_PL = pad_rows([torch.ones_like(prompt) for prompt in prompts]).flip(1)
    return tokens_PL, mask_PL


def positions(mask_BL: Tensor) -> Tensor:
    """Each token's position among the tokens of its row that are no padding."""
    return (mask_BL.cumsum(1) - 1).clamp(min=0)


class PaddedCache:
    """The rows being generated, on transformers' own KV cache. New prompts wait until all rows are done."""

    joins = False
    """New prompts cannot join while rows are being generated."""
    continues = False
    """Keys and values of a row cannot be copied out and continued."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._cache = DynamicCache(config=decoder.config)
        self._mask_RL = torch.zeros(0, 0, dtype=torch.long)

    def reserve(self, prompts: int, prompt_length: int, rows: int, tokens: int) -> None:
        """Nothing: transformers' cache grows by itself."""

    def refresh(self) -> None:
        """Nothing: the module is called as it is."""

    def prefill(self, prompts: list[Tensor], counts: list[int]) -> Tensor:
        """Run prompts, each for `counts` rows; returns the last hidden state of each prompt [p, H]."""
        self._cache = DynamicCache(config=self._decoder.config)
        prompt_PL, mask_PL = left_pad(tuple(prompts))
        hidden_PH = self._forward(prompt_PL, mask_PL)
        rows_R = torch.arange(len(prompts), device=mask_PL.device).repeat_interleave(torch.tensor(counts, device=mask_PL.device))
        self._mask_RL = mask_PL[rows_R]
        self._cache.batch_select_indices(rows_R)
        return hidden_PH

    def step(self, tokens_R: Tensor) -> Tensor:
        """Run one more token of each row; returns hidden states [R, H]."""
        self._mask_RL = torch.nn.functional.pad(self._mask_RL, (0, 1), value=1)
        return self._forward(tokens_R[:, None], self._mask_RL)

    def keep(self, keep_R: Tensor) -> Tensor:
        """Drop the other rows. Returns the old index of each row that is left, int64 [r]."""
        order_R = keep_R.nonzero()[:, 0]
        self._mask_RL = self._mask_RL[order_R]
        self._cache.batch_select_indices(order_R)
        return order_R

    def _forward(self, tokens_RL: Tensor, mask_RL: Tensor) -> Tensor:
        """The last hidden state [R, H] after appending `tokens_RL` to what the cache holds."""
        output = self._decoder(
            input_ids=tokens_RL,
            attention_mask=mask_RL,
            position_ids=positions(mask_RL)[:, -tokens_RL.shape[1] :],
            past_key_values=self._cache,
            use_cache=True,
        )
        hidden_RH: Tensor = output.last_hidden_state[:, -1]
        return hidden_RH
