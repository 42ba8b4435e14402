"""From scored groups to a batch of rows, their advantages, and the minibatches of a step."""

import bisect
import functools
import itertools
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from groupwise.algorithms import Algorithm, Outcomes, soft_overlong_penalty, token_log_ratio
from groupwise.algorithms.credit import Credit, spread
from groupwise.types import Batch, Group, Score, pad_rows


def make_batch(groups: Sequence[Group], algorithm: Algorithm) -> Batch:
    """Every completion of the groups as a row; advantages still 0.

    Overlong filtering takes a truncated completion out of the mask, and so out of the loss.
    """
    completions = [completion for group in groups for completion in group.completions]
    tokens_BT = pad_rows([completion.tokens for completion in completions])
    masks = [
        torch.zeros_like(completion.mask) if algorithm.overlong_filter and completion.stop == "length" else completion.mask
        for completion in completions
    ]
    return Batch(
        rows_B=torch.arange(len(completions)),
        prompts=tuple(group.prompt_tokens for group in groups),
        group_ids_B=torch.tensor([i for i, group in enumerate(groups) for _ in group.completions]),
        tokens_BT=tokens_BT,
        lengths_B=torch.tensor([len(completion.tokens) for completion in completions]),
        mask_BT=pad_rows(masks),
        rollout_logprobs_BT=pad_rows([completion.logprobs for completion in completions]),
        advantages_BT=torch.zeros(tokens_BT.shape),
    )


def shaped_rewards(groups: Sequence[Group], algorithm: Algorithm, max_tokens: int) -> Tensor:
    """float64 [B]: the task's rewards, verdicts priced by the algorithm, with its soft overlong punishment."""
    return torch.stack(list(reward_parts(groups, algorithm, max_tokens).values())).sum(0)


def reward_parts(groups: Sequence[Group], algorithm: Algorithm, max_tokens: int) -> dict[str, Tensor]:
    """What a completion's reward is the sum of, float64 [B] each: the task's, and the overlong punishment where there is one."""
    scores = [score for group in groups for score in group.scores]
    parts = {"task": torch.tensor([_priced(score, algorithm) for score in scores], dtype=torch.float64)}
    if algorithm.overlong_cache:
        lengths_B = torch.tensor([len(c.tokens) for group in groups for c in group.completions])
        parts["overlong"] = soft_overlong_penalty(lengths_B, max_tokens, round(algorithm.overlong_cache * max_tokens))
    return parts


def _priced(score: Score, algorithm: Algorithm) -> float:
    if algorithm.outcome_rewards is None or score.verdict is None:
        return score.reward
    return algorithm.outcome_rewards[("correct", "wrong", "unparsed").index(score.verdict)]


def assign_credit(
    batch: Batch,
    groups: Sequence[Group],
    algorithm: Algorithm,
    tokenizer: Any,
    *,
    max_tokens: int,
    kl_coefficient: float = 0.0,
    history: Mapping[str, Mapping[str, Any]],
) -> tuple[Batch, Credit]:
    """The batch with its advantages (and returns, for a critic), and the credit they came from.

    A completion that overlong filtering took out of the loss also leaves its group's baseline, unless the algorithm
    says otherwise. `kl_coefficient` times log(pi_old / pi_ref) is taken off the reward of each token.
    """
    counted_B = torch.ones(len(batch), dtype=torch.bool)
    if not algorithm.overlong_in_baseline:
        counted_B = batch.mask_BT.any(1)
    rows = counted_B.nonzero()[:, 0]
    if len(rows) == 0:
        return batch, Credit(advantages=torch.zeros(len(batch)), history=history)
    penalty_BT = torch.zeros(batch.mask_BT.shape, dtype=torch.float64)
    if kl_coefficient:
        assert batch.old_logprobs_BT is not None and batch.ref_logprobs_BT is not None
        penalty_BT = kl_coefficient * token_log_ratio(batch.old_logprobs_BT, batch.ref_logprobs_BT, batch.mask_BT).double()
    rewards_B = shaped_rewards(groups, algorithm, max_tokens)
    ids = [group.problem.id for group in groups for _ in group.completions]
    steps = step_positions(groups, tokenizer) if "steps" in algorithm.needs else None
    outcomes = Outcomes(
        rewards_B=(rewards_B - penalty_BT.sum(1))[rows],
        group_ids_B=batch.group_ids_B[rows],
        prompt_ids=[ids[i] for i in rows.tolist()],
        mask_BT=batch.mask_BT[rows],
        step_rewards=[steps[i][0] for i in rows.tolist()] if steps else None,
        step_ends=[steps[i][1] for i in rows.tolist()] if steps else None,
        token_rewards_BT=(last_token(batch.mask_BT) * rewards_B[:, None] - penalty_BT)[rows],
        values_BT=batch.values_BT[rows].double() if batch.values_BT is not None else None,
        history=history,
    )
    credit = algorithm.part("advantage")(outcomes, algorithm)
    advantages_BT = torch.zeros(batch.mask_BT.shape)
    advantages_BT[rows] = spread(credit.advantages, batch.mask_BT[rows]).float()
    returns_BT = None
    if credit.returns_BT is not None:
        returns_BT = torch.zeros(batch.mask_BT.shape)
        returns_BT[rows] = credit.returns_BT.float()
    return replace(batch, advantages_BT=advantages_BT, returns_BT=returns_BT), credit


def last_token(mask_BT: Tensor) -> Tensor:
    """bool [B, T], True at each row's last trained token."""
    return mask_BT & (mask_BT.flip(1).cumsum(1).flip(1) == 1)


def step_positions(groups: Sequence[Group], tokenizer: Any) -> list[tuple[list[float], list[int]]]:
    """For each completion the rewards of its steps and the index of each step's last token.

    Tasks count a step's end in characters; the last step also owns what follows it, the end-of-sequence token.
    """
    lengths = functools.cache(lambda token: len(tokenizer.decode([token], skip_special_tokens=True)))
    result = []
    for group in groups:
        for completion, score in zip(group.completions, group.scores, strict=True):
            tokens = completion.tokens.tolist()
            reached = list(itertools.accumulate(lengths(token) for token in tokens))
            if reached[-1] != len(completion.text):  # some tokens are less than a character each
                starts = [tokenizer.decode(tokens[: t + 1], skip_special_tokens=True) for t in range(len(tokens))]
                reached = [len(os.path.commonprefix([start, completion.text])) for start in starts]  # noqa: RUF071 characters, as meant
            ends = [min(bisect.bisect_left(reached, end), len(tokens) - 1) for end, _ in score.steps]
            if ends:
                ends[-1] = len(tokens) - 1
            result.append(([reward for _, reward in score.steps], ends))
    return result


def minibatches(batch: Batch, count: int, seed: int) -> Iterator[Batch]:
    """The batch in `count` parts of whole groups, shuffled by `seed`; fewer parts when there are fewer groups."""
    order = list(range(len(batch.prompts)))
    random.Random(seed).shuffle(order)
    count = min(count, len(order))
    for i in range(count):
        part = torch.tensor(order[i * len(order) // count : (i + 1) * len(order) // count])
        rows = torch.isin(batch.group_ids_B, part).nonzero()[:, 0]
        if batch.mask_BT[rows].any():
            yield batch.select(rows)
