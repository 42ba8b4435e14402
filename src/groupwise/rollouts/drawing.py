"""From hidden states to the next token: limits on the distribution, the draw, and whether the token ends its row."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from groupwise.errors import DIVERGED, RunError
from groupwise.kept import KeptTokens
from groupwise.models import LanguageModel
from groupwise.rollouts.base import Sampling

CHUNK = 512
"""Tokens of the vocabulary whose probabilities `draw` sums before it searches one among them."""


class Drawing:
    """Draws the next token of rows that share a `Sampling`, and says which of them it ends."""

    def __init__(self, model: LanguageModel, tokenizer: Any, sampling: Sampling) -> None:
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._limit = _limits(sampling)
        self._kernel = model.sampling_kernel()
        ends = model.end_tokens(tokenizer) | set(sampling.stop_tokens)
        self._ends = torch.tensor(sorted(ends), device=model.device)
        # A token decodes to at least one byte of the stop string; a few more cover a character cut in two.
        self.tail = max((len(stop.encode()) for stop in sampling.stop), default=-4) + 4
        """Tokens that must be seen to find a stop string; 0: there is none."""

    def choose(self, hidden_RH: Tensor, uniforms_R: Tensor) -> tuple[Tensor, Tensor, KeptTokens | None]:
        """Tokens [R], their log-probabilities [R] under the distribution that they were drawn from, and their kept sets.

        Raises:
            RunError: the logits are not finite.
        """
        z_RV = self._limit(self._model.logits(hidden_RH, self._sampling.temperature))
        in_kernel = self._kernel is not None and z_RV.dtype == torch.float32
        tokens_R, logprobs_R = self._kernel(z_RV, uniforms_R) if in_kernel else draw(z_RV, uniforms_R)
        if int(tokens_R.max()) >= z_RV.shape[1]:
            raise RunError(f"the logits of the next token are not finite; {DIVERGED}")
        return tokens_R, logprobs_R, KeptTokens.of(z_RV > -torch.inf) if self._sampling.is_limited else None

    def ended(self, tokens_R: Tensor, tails: Callable[[], list[list[int]]]) -> Tensor:
        """bool [R]: which rows their newest token has ended; `tails` gives the last `tail` tokens of each."""
        ended_R = torch.isin(tokens_R, self._ends)
        if not self._sampling.stop:
            return ended_R
        texts = self._tokenizer.batch_decode(tails(), skip_special_tokens=True)
        stopped = [any(stop in text for stop in self._sampling.stop) for text in texts]
        return ended_R | torch.tensor(stopped, device=tokens_R.device)


def draw(logits_RV: Tensor, uniforms_R: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row from the softmax of its logits, and its log-probability, float32.

    The cumulative sum is inverted at `uniforms_R`, in [0, 1). The point 1 - u lies in (0, total], so the token found has a
    probability above zero, whatever rounds. Sums over many are float64, and go over chunks of the vocabulary first and then
    over one chunk, so that a large vocabulary costs one pass. The token is V or more where a row's logits are no
    distribution: that is what a search among NaN finds.
    """
    logits_RV = logits_RV - logits_RV.amax(-1, keepdim=True)
    weights_RV = logits_RV.exp()
    R, V = weights_RV.shape
    size = min(CHUNK, V)
    weights_RKS = torch.nn.functional.pad(weights_RV, (0, -V % size)).view(R, -1, size)
    ends_RK = weights_RKS.sum(-1).double().cumsum(-1)
    points_R = (1 - uniforms_R) * ends_RK[:, -1]
    chunk_R = torch.searchsorted(ends_RK, points_R[:, None])[:, 0].clamp(max=ends_RK.shape[1] - 1)
    before_R = torch.where(chunk_R > 0, ends_RK.gather(1, (chunk_R - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    within_RS = weights_RKS[torch.arange(R, device=chunk_R.device), chunk_R].double().cumsum(-1)
    rest_R = torch.minimum(points_R - before_R, within_RS[:, -1])
    tokens_R = chunk_R * size + torch.searchsorted(within_RS, rest_R[:, None])[:, 0]
    chosen_R = logits_RV.gather(1, tokens_R[:, None].clamp(max=V - 1))[:, 0]
    return tokens_R, (chosen_R - ends_RK[:, -1].log()).float()


def _limits(sampling: Sampling) -> Callable[[Tensor], Tensor]:
    """top-k, top-p and min-p, from logits (already divided by the temperature) to logits."""
    limits = LogitsProcessorList()
    if sampling.top_k:
        limits.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        limits.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        limits.append(MinPLogitsWarper(sampling.min_p))
    return functools.partial(limits, None)
