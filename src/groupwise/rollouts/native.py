"""Sampling with the learner's own model: each prompt run once per group, finished rows dropped at once."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from groupwise.models import left_pad, logits, positions
from groupwise.rollouts.base import Sampling
from groupwise.types import Completion


class NativeSampler:
    """A `Sampler` for any Hugging Face causal language model, in this process."""

    def __init__(self, model: Any, tokenizer: Any, version: int = 0) -> None:
        self.model, self.tokenizer, self.version = model, tokenizer, version

    def load(self, model: Any, version: int) -> None:
        self.model, self.version = model, version

    def generate(
        self, prompts: Sequence[Tensor], group_size: int, sampling: Sampling, *, seed: int
    ) -> Iterator[tuple[int, tuple[Completion, ...]]]:
        # One number per token that could be drawn, by prompt: what a row says does not depend on the rows beside it.
        generator = torch.Generator().manual_seed(seed)
        uniforms = [torch.rand(group_size, sampling.max_tokens, generator=generator, dtype=torch.float64) for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size = max(1, sampling.max_rows // group_size)
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            uniforms_BT = torch.cat([uniforms[i] for i in chunk])
            rows = self._rows([prompts[i] for i in chunk], group_size, sampling, uniforms_BT)
            for number, i in enumerate(chunk):
                yield i, tuple(rows[number * group_size : (number + 1) * group_size])

    @torch.no_grad()
    def _rows(self, prompts: list[Tensor], group_size: int, sampling: Sampling, uniforms_BT: Tensor) -> list[Completion]:
        """The completions of a few prompts, group by group."""
        model, device = self.model, self.model.device
        warp = _warper(sampling)
        ended = self._end_detector(sampling)
        prompt_PL, mask_PL = left_pad(tuple(prompt.to(device) for prompt in prompts))
        cache = DynamicCache(config=model.base_model.config)
        hidden_PH = self._forward(prompt_PL, mask_PL, cache)
        hidden_RH = hidden_PH.repeat_interleave(group_size, dim=0)
        mask_RL = mask_PL.repeat_interleave(group_size, dim=0)
        cache.batch_repeat_interleave(group_size)

        B, T = uniforms_BT.shape
        uniforms_BT = uniforms_BT.to(device)
        tokens_BT = torch.zeros(B, T, dtype=torch.long, device=device)
        logprobs_BT = torch.zeros(B, T, device=device)
        lengths_B = torch.full((B,), T, device=device)
        stopped_B = torch.zeros(B, dtype=torch.bool, device=device)
        rows_R = torch.arange(B, device=device)  # the rows still being written
        for t in range(T):
            scores_RV = torch.log_softmax(warp(logits(model, hidden_RH).float() / sampling.temperature), dim=-1)
            tokens_R = draw(scores_RV, uniforms_BT[rows_R, t])
            tokens_BT[rows_R, t] = tokens_R
            logprobs_BT[rows_R, t] = scores_RV.gather(1, tokens_R[:, None])[:, 0]
            ended_R = ended(tokens_R, tokens_BT[rows_R, : t + 1])
            if ended_R.any():
                lengths_B[rows_R[ended_R]] = t + 1
                stopped_B[rows_R[ended_R]] = True
                keep = (~ended_R).nonzero()[:, 0]
                rows_R, tokens_R, mask_RL = rows_R[keep], tokens_R[keep], mask_RL[keep]
                cache.batch_select_indices(keep)
            if len(rows_R) == 0 or t + 1 == T:
                break
            mask_RL = torch.nn.functional.pad(mask_RL, (0, 1), value=1)
            hidden_RH = self._forward(tokens_R[:, None], mask_RL, cache)
        return self._completions(tokens_BT.cpu(), logprobs_BT.cpu(), lengths_B.tolist(), stopped_B.tolist())

    def _forward(self, tokens_RL: Tensor, mask_RL: Tensor, cache: DynamicCache) -> Tensor:
        """The last hidden state [R, H] after appending `tokens_RL` to what the cache holds."""
        output = self.model.base_model(
            input_ids=tokens_RL,
            attention_mask=mask_RL,
            position_ids=positions(mask_RL)[:, -tokens_RL.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state[:, -1]
        return hidden

    def _end_detector(self, sampling: Sampling) -> Callable[[Tensor, Tensor], Tensor]:
        """A function (tokens_R, written_RT) -> bool [R]: which rows the newest token has ended."""
        ends = torch.tensor(sorted({self.tokenizer.eos_token_id, *sampling.stop_tokens}), device=self.model.device)
        if not sampling.stop:
            return lambda tokens_R, _: torch.isin(tokens_R, ends)
        # A token decodes to at least one byte of the stop string; a few more cover a character cut in two.
        tail = max(len(stop.encode()) for stop in sampling.stop) + 4

        def ended(tokens_R: Tensor, written_RT: Tensor) -> Tensor:
            texts = self.tokenizer.batch_decode(written_RT[:, -tail:], skip_special_tokens=True)
            said = [any(stop in text for stop in sampling.stop) for text in texts]
            return torch.isin(tokens_R, ends) | torch.tensor(said, device=tokens_R.device)

        return ended

    def _completions(self, tokens_BT: Tensor, logprobs_BT: Tensor, lengths: list[int], stopped: list[bool]) -> list[Completion]:
        rows = [tokens_BT[i, :length] for i, length in enumerate(lengths)]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [
            Completion(
                text=text,
                tokens=tokens,
                logprobs=logprobs_BT[i, : len(tokens)],
                mask=torch.ones(len(tokens), dtype=torch.bool),
                stop="stop" if stopped[i] else "length",
                weights_version=self.version,
            )
            for i, (tokens, text) in enumerate(zip(rows, texts, strict=True))
        ]


def draw(logprobs_RV: Tensor, uniforms_R: Tensor) -> Tensor:
    """One token per row by inverting its cumulative distribution at `uniforms_R`, in [0, 1).

    The point 1 - u lies in (0, total], so the token found has probability above zero, whatever rounds.
    """
    cumulative_RV = logprobs_RV.double().exp().cumsum(-1)
    points_R = (1 - uniforms_R) * cumulative_RV[:, -1]
    return torch.searchsorted(cumulative_RV, points_R[:, None])[:, 0]


def _warper(sampling: Sampling) -> Callable[[Tensor], Tensor]:
    """The limits on the distribution, from logits (already divided by the temperature) to logits."""
    warpers = LogitsProcessorList()
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return functools.partial(warpers, None)
