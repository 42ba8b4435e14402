"""Which cache a model generates with: the fastest that a trial has shown to be exact."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from groupwise.errors import UserError
from groupwise.models.attention.decoding import DecodingCache
from groupwise.models.attention.decoding_step import PlanFinder
from groupwise.models.attention.latent import latent_forwards
from groupwise.models.attention.layers import matches
from groupwise.models.bfloat16 import rounded_weights
from groupwise.models.blocked_weights import BlockedWeights, blocked_forwards
from groupwise.models.decoder import Decoder, HeadShape
from groupwise.models.padded import NoCache, PaddedCache
from groupwise.models.recurrent import cached_forwards
from groupwise.models.trials import LENGTHS, described, generate, no_constants, small_windows, tolerance_in

STATE_BYTES = 4
"""Of a number in a recurrent state, which layers keep in float32."""
ROWS_SHARE = 0.6
"""Share of a GPU's free memory for the KV cache of completions; the rest is for that of prompts, and for activations."""


@dataclass(frozen=True, slots=True)
class _Found:
    """What a trial of our cache has found."""

    reason: str | None
    """Why it is not exact; None: it is."""
    compresses: bool
    shapes: dict[int, HeadShape]
    """Both as of `Decoder`."""


class Caches:
    """Makes caches for a decoder: ours; else the decoder's own, with prompts of all lengths in one batch or apart; else none."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.plans = PlanFinder(decoder)
        self._found: dict[tuple[Any, ...], _Found] = {}
        self._fallbacks: dict[tuple[Any, ...], Callable[[], PaddedCache | NoCache]] = {}

    def new(
        self,
        prompts: int,
        prompt_length: int,
        rows: int,
        tokens: int,
        *,
        dtype: torch.dtype | None = None,
        fixed: bool | None = None,
    ) -> DecodingCache | PaddedCache | NoCache:
        """See `LanguageModel.decoding_cache`."""
        if self.why_not_ours(dtype) is None:
            fixed = self._fixed if fixed is None else fixed
            return self._ours(prompts, prompt_length, rows, tokens, dtype=dtype, fixed=fixed)
        return self.fallback()

    @property
    def _fixed(self) -> bool:
        """Whether steps have fixed sizes. States of recurrent layers are new tensors in each step, which graphs cannot be."""
        return not self._decoder.on_cpu and not self._decoder.recurrent

    def _ours(
        self, prompts: int, prompt_length: int, rows: int, tokens: int, *, dtype: torch.dtype | None, fixed: bool
    ) -> DecodingCache:
        return DecodingCache(self._decoder, self.plans, prompts, prompt_length, rows, tokens, fixed=fixed, dtype=dtype)

    def why_not_ours(self, dtype: torch.dtype | None = None) -> str | None:
        """Why the decoder cannot generate with a `DecodingCache` of keys and values in `dtype` (None: the decoder's), or None.

        Tried once for each device and dtype.
        """
        if not self._decoder.packs():
            return self._decoder.reasons["packed"]
        compressed = len(latent_forwards(self._decoder.latent))  # a hook that came since changes what the cache holds
        key = self._decoder.device, self._decoder.dtype, dtype, compressed
        decoder = self._decoder
        if key not in self._found:
            decoder.compresses = True
            reason = self.why_not_exact(dtype, fixed=self._fixed)
            self._found[key] = _Found(reason, decoder.compresses, decoder.shapes)
        found = self._found[key]
        decoder.compresses, decoder.shapes = found.compresses, found.shapes
        decoder.reasons.pop("generation", None)
        if found.reason is not None:
            decoder.reasons["generation"] = found.reason
        return found.reason

    def why_not_exact(self, dtype: torch.dtype | None = None, *, fixed: bool) -> str | None:
        """Why a `DecodingCache` does not give what full forward passes give; None if it does."""
        decoder = self._decoder
        decoder.find_shapes()
        if decoder.repeated:
            return "attention layers run several times in a forward pass, so their keys have no one place in the cache"
        prompts, rows = LENGTHS[decoder.device.type]
        new = partial(self._ours, 1, max(prompts), 2, max(rows), dtype=dtype, fixed=fixed)
        reason = self._try(new, dtype)
        if reason is not None and decoder.compresses and decoder.latent:
            decoder.compresses = False
            decoder.reasons["compressed cache"] = f"with latents in the cache, {reason}"
            decoder.find_shapes()
            reason = self._try(new, dtype)
        return reason

    def affordable_rows(self, tokens: int, dtype: torch.dtype | None = None) -> float:
        """See `LanguageModel.affordable_rows`: as many as fit `ROWS_SHARE` of the free memory."""
        decoder = self._decoder
        if decoder.device.type != "cuda":
            return math.inf
        reserved = torch.cuda.memory_reserved(decoder.device) - torch.cuda.memory_allocated(decoder.device)
        free = torch.cuda.mem_get_info(decoder.device)[0] + reserved
        per_token = sum(2 * shape.kv_heads * shape.size for shape in decoder.shapes.values())
        row_bytes = per_token * tokens * (dtype or decoder.dtype).itemsize + decoder.state_elements * STATE_BYTES
        return ROWS_SHARE * float(free / max(1, row_bytes))

    def blocked_weights(self, module: Any) -> BlockedWeights:
        """See `LanguageModel.blocked_weights`; `module`: the decoder with its output layer."""
        decoder, head = self._decoder, [module.get_output_embeddings()]
        if not (decoder.backend.blocked_weights and decoder.on_cpu):
            return BlockedWeights([])
        if decoder.bf16_step:
            if not (ours := self.why_not_ours() is None):
                self.fallback()  # tried before anything is rounded
            return BlockedWeights(*rounded_weights(decoder, head, packed=ours))
        only_head = decoder.compiled or (decoder.packs() and self.plans.find() is not None)
        # torch.compile must see the original forwards, and a step in one call has blocked copies of its own.
        return BlockedWeights(list(blocked_forwards(head if only_head else list(module.modules()))))

    def fallback(self) -> PaddedCache | NoCache:
        """The decoder's own cache in the fastest way that is exact, tried once; else none.

        Raises:
            UserError: even without a cache, a token's hidden state is not what it is in the whole sequence.
        """
        key = self._decoder.device, self._decoder.dtype
        if key not in self._fallbacks:
            self._fallbacks[key] = self._find_fallback()
        return self._fallbacks[key]()

    def _find_fallback(self) -> Callable[[], PaddedCache | NoCache]:
        module, reasons = self._decoder.module, self._decoder.reasons
        forwards = cached_forwards(self._decoder.recurrent)
        together, apart = (partial(PaddedCache, module, left_padding=left, forwards=forwards) for left in (True, False))
        if self._try(together) is None:
            return together
        if (reason := self._try(apart)) is None:
            reasons["batches"] = "padding on the left is not exact, so prompts of each length are a batch of their own"
            return apart
        if (without := self._try(partial(NoCache, module))) is not None:
            raise UserError(f"{type(module).__name__} cannot generate exactly: without a cache, {without}")
        reasons["cache"] = f"every step runs all tokens again: with the model's own cache, {reason}"
        return partial(NoCache, module)

    @torch.inference_mode()
    def _try(self, new_cache: Callable[[], Any], dtype: torch.dtype | None = None) -> str | None:
        """Why a cache, with keys and values in `dtype`, does not give what each row gives alone; None if it does."""
        trial = self._decoder.trial_rows()
        tolerance = max(tolerance_in(self._decoder.dtype), tolerance_in(dtype or self._decoder.dtype))
        with self._decoder.exact(), small_windows(self._decoder.module), no_constants(self._decoder.module):
            theirs = [self._decoder.alone(trial.row(i)) for i in range(len(trial.completions))]
            try:
                hidden = generate(new_cache(), trial)
            except Exception as error:  # third-party forwards and GPU drivers may raise anything
                return f"steps of generation fail in it: {described(error)}"
        for row, prompt, ours in zip(theirs, trial.prompt_R.tolist(), hidden, strict=True):
            expected = row[len(trial.prompts[prompt]) - 1 :][: len(ours)]
            if not matches(ours, expected, tolerance):
                return "steps of generation and full forward passes give different hidden states"
        return None
