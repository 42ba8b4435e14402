"""Sampling with the learner's own model: each prompt run once per group, finished rows replaced by new groups."""

import collections
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from groupwise.attention import Decoding, affordable_rows, decodes, packs
from groupwise.errors import DIVERGED, RunError
from groupwise.kernels.choose import choose_kernel
from groupwise.models import left_pad, logits, positions
from groupwise.rollouts.base import Sampling
from groupwise.rollouts.packed_weights import PackedWeights
from groupwise.types import Completion


class NativeSampler:
    """A `Sampler` for any Hugging Face causal language model, in this process."""

    def __init__(self, model: Any, tokenizer: Any, dtype: torch.dtype | None = None) -> None:
        """`dtype`: generate with a copy of the model in it; None: with the model itself."""
        self.model, self.tokenizer, self.version = model, tokenizer, 0
        if dtype not in (None, model.dtype):
            self.model = copy.deepcopy(model)
            for parameter in self.model.parameters():  # and no buffers: rotary frequencies lose their meaning in 8 bits
                parameter.data = parameter.data.to(dtype)

    @torch.no_grad()
    def load(self, model: Any, version: int) -> None:
        self.version = version
        if self.model is not model:
            for mine, new in zip(self.model.parameters(), model.parameters(), strict=True):
                mine.copy_(new)

    def generate(
        self, prompts: Sequence[Tensor], group_size: int, sampling: Sampling, *, seed: int
    ) -> Iterator[tuple[int, tuple[Completion, ...]]]:
        # One number per token that could be drawn, by prompt: what a row says does not depend on the rows beside it.
        generator = torch.Generator().manual_seed(seed)
        shape = (len(prompts) * group_size, sampling.max_tokens)
        draft = Draft(torch.rand(shape, generator=generator, dtype=torch.float64), self.model.device)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        run = self._run_packed if packs(self.model) and decodes(self.model) else self._run_padded
        left = [group_size] * len(prompts)
        packed, finishing = PackedWeights(self.model), run(prompts, order, group_size, sampling, draft)
        while True:
            with packed:  # only while the sampler itself runs
                finished = next(finishing, None)
            if finished is None:
                return
            for prompt in (row // group_size for row in finished):
                left[prompt] -= 1
                if left[prompt] == 0:
                    yield prompt, self._completions(draft, range(prompt * group_size, (prompt + 1) * group_size))

    @torch.inference_mode()
    def _run_packed(
        self, prompts: Sequence[Tensor], order: list[int], group_size: int, sampling: Sampling, draft: "Draft"
    ) -> Iterator[list[int]]:
        """Write every row, new groups joining as rows finish; yields rows as they do.

        Keys and values stay where they were first written; see `Decoding`.
        """
        decoder, device = self.model.base_model, self.model.device
        choose, ended = self._chooser(sampling), self._end_detector(sampling, draft)
        most_rows = min(sampling.max_rows, affordable_rows(decoder, sampling.max_tokens))
        groups = min(len(prompts), max(1, int(most_rows // group_size)))
        longest = max(len(prompt) for prompt in prompts)
        state = Decoding(decoder, groups, longest, groups * group_size, sampling.max_tokens)
        waiting = collections.deque(order)
        hidden_RH = torch.empty(0, decoder.config.hidden_size, dtype=self.model.dtype, device=device)
        rows_R = torch.zeros(0, dtype=torch.long, device=device)  # the rows being written
        while waiting or len(rows_R):
            room = min((groups * group_size - len(rows_R)) // group_size, groups - len(state.lengths_P), len(waiting))
            if room:
                joining = [waiting.popleft() for _ in range(room)]
                hidden_PH = state.prefill(decoder, [prompts[i].to(device) for i in joining], group_size)
                hidden_RH = torch.cat([hidden_RH, hidden_PH.repeat_interleave(group_size, dim=0)])
                new_rows = [i * group_size + place for i in joining for place in range(group_size)]
                rows_R = torch.cat([rows_R, torch.tensor(new_rows, device=device)])
            tokens_R, done_R = draft.write(rows_R, *choose(hidden_RH, draft.uniforms(rows_R)), ended)
            if done_R.any():
                yield rows_R[done_R].tolist()
                order_R = state.keep(~done_R)
                rows_R, tokens_R = rows_R[order_R], tokens_R[order_R]
            hidden_RH = state.step(decoder, tokens_R) if len(rows_R) else hidden_RH[:0]

    @torch.inference_mode()
    def _run_padded(
        self, prompts: Sequence[Tensor], order: list[int], group_size: int, sampling: Sampling, draft: "Draft"
    ) -> Iterator[list[int]]:
        """The general path: a few prompts at a time, padded, on transformers' own cache and attention."""
        device = self.model.device
        choose, ended = self._chooser(sampling), self._end_detector(sampling, draft)
        size = max(1, sampling.max_rows // group_size)
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            prompt_PL, mask_PL = left_pad(tuple(prompts[i].to(device) for i in chunk))
            cache = DynamicCache(config=self.model.base_model.config)
            hidden_RH = self._forward(prompt_PL, mask_PL, cache).repeat_interleave(group_size, dim=0)
            mask_RL = mask_PL.repeat_interleave(group_size, dim=0)
            cache.batch_repeat_interleave(group_size)
            rows_R = torch.tensor([i * group_size + place for i in chunk for place in range(group_size)], device=device)
            while True:
                tokens_R, done_R = draft.write(rows_R, *choose(hidden_RH, draft.uniforms(rows_R)), ended)
                if done_R.any():
                    yield rows_R[done_R].tolist()
                    keep = (~done_R).nonzero()[:, 0]
                    rows_R, tokens_R, mask_RL = rows_R[keep], tokens_R[keep], mask_RL[keep]
                    cache.batch_select_indices(keep)
                if len(rows_R) == 0:
                    break
                mask_RL = torch.nn.functional.pad(mask_RL, (0, 1), value=1)
                hidden_RH = self._forward(tokens_R[:, None], mask_RL, cache)

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

    def _end_detector(self, sampling: Sampling, draft: "Draft") -> Callable[[Tensor, Tensor], Tensor]:
        """A function (tokens_R, rows_R) -> bool [R]: which rows the newest token has ended."""
        ids = end_tokens(self.model, self.tokenizer) | set(sampling.stop_tokens)
        ends = torch.tensor(sorted(ids), device=self.model.device)
        if not sampling.stop:
            return lambda tokens_R, _: torch.isin(tokens_R, ends)
        # A token decodes to at least one byte of the stop string; a few more cover a character cut in two.
        tail = max(len(stop.encode()) for stop in sampling.stop) + 4

        def ended(tokens_R: Tensor, rows_R: Tensor) -> Tensor:
            texts = self.tokenizer.batch_decode(draft.tails(rows_R, tail), skip_special_tokens=True)
            said = [any(stop in text for stop in sampling.stop) for text in texts]
            return torch.isin(tokens_R, ends) | torch.tensor(said, device=tokens_R.device)

        return ended

    def _chooser(self, sampling: Sampling) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """A function (hidden_RH, uniforms_R) -> (tokens_R, their logprobs_R under the distribution they were drawn from)."""
        warp = _warper(sampling)
        kernel = choose_kernel() if self.model.device.type == "cpu" else None

        def choose(hidden_RH: Tensor, uniforms_R: Tensor) -> tuple[Tensor, Tensor]:
            z_RV = warp(logits(self.model, hidden_RH, sampling.temperature))
            tokens_R, logprobs_R = (kernel if kernel and z_RV.dtype == torch.float32 else draw)(z_RV, uniforms_R)
            if int(tokens_R.max()) >= z_RV.shape[1]:
                raise RunError(f"the model's scores of the next token are not finite; {DIVERGED}")
            return tokens_R, logprobs_R

        return choose

    def _completions(self, draft: "Draft", rows: range) -> tuple[Completion, ...]:
        lengths = draft.lengths_B[rows.start : rows.stop].tolist()
        tokens_RT, logprobs_RT = (x[rows.start : rows.stop].cpu() for x in (draft.tokens_BT, draft.logprobs_BT))
        stopped = draft.stopped_B[rows.start : rows.stop].tolist()
        written = [tokens_RT[i, :length] for i, length in enumerate(lengths)]
        texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
        return tuple(
            Completion(
                text=text,
                tokens=tokens,
                logprobs=logprobs_RT[i, : len(tokens)],
                mask=torch.ones(len(tokens), dtype=torch.bool),
                stop="stop" if stopped[i] else "length",
                weights_version=self.version,
            )
            for i, (tokens, text) in enumerate(zip(written, texts, strict=True))
        )


class Draft:
    """What has been written so far, row by row: B rows for all prompts together."""

    def __init__(self, uniforms_BT: Tensor, device: Any) -> None:
        B, T = uniforms_BT.shape
        self._uniforms_BT = uniforms_BT.to(device)
        self.tokens_BT = torch.zeros(B, T, dtype=torch.long, device=device)
        self.logprobs_BT = torch.zeros(B, T, device=device)
        self.lengths_B = torch.zeros(B, dtype=torch.long, device=device)
        self.stopped_B = torch.zeros(B, dtype=torch.bool, device=device)

    def uniforms(self, rows_R: Tensor) -> Tensor:
        return self._uniforms_BT[rows_R, self.lengths_B[rows_R]]

    def write(
        self, rows_R: Tensor, tokens_R: Tensor, logprobs_R: Tensor, ended: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Append a token to each of the rows; returns the tokens, and which rows are done: ended, or full."""
        places_R = self.lengths_B[rows_R]
        self.tokens_BT[rows_R, places_R] = tokens_R
        self.logprobs_BT[rows_R, places_R] = logprobs_R
        self.lengths_B[rows_R] = places_R + 1
        ended_R = ended(tokens_R, rows_R)
        self.stopped_B[rows_R] = ended_R
        return tokens_R, ended_R | (places_R + 1 == self.tokens_BT.shape[1])

    def tails(self, rows_R: Tensor, count: int) -> list[list[int]]:
        """The last tokens of each row, at most `count`."""
        lengths = self.lengths_B[rows_R].tolist()
        return [
            self.tokens_BT[row, max(0, length - count) : length].tolist()
            for row, length in zip(rows_R.tolist(), lengths, strict=True)
        ]


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokenizer's end-of-sequence token, and those of the model's generation config: chat models may end on another."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    more = configured if isinstance(configured, list) else [configured]
    return {tokenizer.eos_token_id, *(token for token in more if token is not None)}


BLOCK = 512
"""Tokens of the vocabulary whose probabilities `draw` sums before it looks for one among them."""


def draw(scores_RV: Tensor, uniforms_R: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row from the softmax of its scores, and its log-probability, float32.

    The cumulative sum is inverted at `uniforms_R`, in [0, 1). The point 1 - u lies in (0, total], so the token found has
    probability above zero, whatever rounds. Sums over many are float64, and go over blocks of the vocabulary first and then
    over one block, so that a large vocabulary costs one pass. The token is V or more where a row's scores are no
    distribution: that is what a search among NaN finds.
    """
    scores_RV = scores_RV - scores_RV.amax(-1, keepdim=True)
    weights_RV = scores_RV.exp()
    R, V = weights_RV.shape
    size = min(BLOCK, V)
    weights_RKS = torch.nn.functional.pad(weights_RV, (0, -V % size)).view(R, -1, size)
    ends_RK = weights_RKS.sum(-1).double().cumsum(-1)
    points_R = (1 - uniforms_R) * ends_RK[:, -1]
    block_R = torch.searchsorted(ends_RK, points_R[:, None])[:, 0].clamp(max=ends_RK.shape[1] - 1)
    before_R = torch.where(block_R > 0, ends_RK.gather(1, (block_R - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    within_RS = weights_RKS[torch.arange(R, device=block_R.device), block_R].double().cumsum(-1)
    rest_R = torch.minimum(points_R - before_R, within_RS[:, -1])
    tokens_R = block_R * size + torch.searchsorted(within_RS, rest_R[:, None])[:, 0]
    chosen_R = scores_RV.gather(1, tokens_R[:, None].clamp(max=V - 1))[:, 0]
    return tokens_R, (chosen_R - ends_RK[:, -1].log()).float()


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
