"""Which cache a model generates with: the fastest that a trial has shown to be exact."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from groupwise.models.attention.decoding import DecodingCache
from groupwise.models.attention.decoding_step import PlanFinder
from groupwise.models.attention.layers import matches
from groupwise.models.decoder import Decoder
from groupwise.models.padded import NoCache, PaddedCache
from groupwise.models.recurrent import cached_forwards
from groupwise.models.trials import LENGTHS, first_line, generate, no_constants, small_windows, tolerance_in


class Caches:
    """Makes caches for a decoder: ours; else the decoder's own, with prompts of all lengths in one batch or apart; else none."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.plans = PlanFinder(decoder)
        self.dtype: torch.dtype | None = None
        """Of keys and values on a CPU; None: the decoder's."""
        self._reasons: dict[tuple[torch.device, torch.dtype, torch.dtype | None], str | None] = {}
        self._fallback: Callable[[], PaddedCache | NoCache] | None = None

    def new(
        self, prompts: int, prompt_length: int, rows: int, tokens: int, *, fixed: bool | None = None
    ) -> DecodingCache | PaddedCache | NoCache:
        """See `LanguageModel.decoding_cache`."""
        if self.why_not_ours() is None:
            return self._ours(prompts, prompt_length, rows, tokens, fixed=self._fixed if fixed is None else fixed)
        return self.fallback()

    @property
    def _fixed(self) -> bool:
        """Whether steps have fixed sizes. States of recurrent layers are new tensors in each step, which graphs cannot be."""
        return not self._decoder.on_cpu and not self._decoder.recurrent

    def _ours(self, prompts: int, prompt_length: int, rows: int, tokens: int, *, fixed: bool) -> DecodingCache:
        return DecodingCache(self._decoder, self.plans, prompts, prompt_length, rows, tokens, fixed=fixed, dtype=self.dtype)

    def why_not_ours(self) -> str | None:
        """Why the decoder cannot generate with a `DecodingCache`, or None; tried once for each device and dtype."""
        if not self._decoder.packs():
            return self._decoder.reasons["packed"]
        key = self._decoder.device, self._decoder.dtype, self.dtype
        if key not in self._reasons:
            self._reasons[key] = self.why_not_exact(fixed=self._fixed)
        if (reason := self._reasons[key]) is not None:
            self._decoder.reasons["generation"] = reason
        return self._reasons[key]

    def why_not_exact(self, *, fixed: bool) -> str | None:
        """Why a `DecodingCache` does not give what full forward passes give; None if it does."""
        if self._decoder.repeated:
            return "attention layers run several times in a forward pass, so their keys have no one place in the cache"
        prompts, rows = LENGTHS[self._decoder.device.type]
        return self._try(lambda: self._ours(1, max(prompts), 2, max(rows), fixed=fixed))

    def fallback(self) -> PaddedCache | NoCache:
        """The decoder's own cache in the fastest way that is exact, tried once; else none."""
        if self._fallback is None:
            self._fallback = self._find_fallback()
        return self._fallback()

    def _find_fallback(self) -> Callable[[], PaddedCache | NoCache]:
        module, reasons = self._decoder.module, self._decoder.reasons
        forwards = cached_forwards(self._decoder.recurrent)
        together, apart = (partial(PaddedCache, module, left_padding=left, forwards=forwards) for left in (True, False))
        if self._try(together) is None:
            return together
        if (reason := self._try(apart)) is None:
            reasons["batches"] = "padding on the left is not exact, so prompts of each length are a batch of their own"
            return apart
        reasons["cache"] = f"every step runs all tokens again: with the model's own cache, {reason}"
        return partial(NoCache, module)

    @torch.inference_mode()
    def _try(self, new_cache: Callable[[], Any]) -> str | None:
        """Why a cache does not give what each row gives alone; None if it does."""
        trial = self._decoder.trial_rows()
        # Rounding the keys is what a cache of another dtype is for; its own trial only looks for mistakes.
        tolerance = max(tolerance_in(self._decoder.dtype), tolerance_in(self.dtype or self._decoder.dtype))
        with small_windows(self._decoder.module), no_constants(self._decoder.module):
            theirs = [self._decoder.alone(trial.row(i)) for i in range(len(trial.completions))]
            try:
                hidden = generate(new_cache(), trial)
            except Exception as error:  # third-party forwards and GPU drivers may raise anything
                return f"steps of generation fail in it: {first_line(error)}"
        for row, prompt, ours in zip(theirs, trial.prompt_R.tolist(), hidden, strict=True):
            expected = row[len(trial.prompts[prompt]) - 1 :][: len(ours)]
            if not matches(ours, expected, tolerance):
                return "steps of generation and full forward passes give different hidden states"
        return None
