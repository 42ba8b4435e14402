"""From groups to a batch of rows, and a batch's minibatches."""

import random
from collections.abc import Iterator, Sequence

import torch

from groupwise.algorithms import Algorithm
from groupwise.types import Batch, Group, TrainingBatch, pad_rows


def make_batch(groups: Sequence[Group], algorithm: Algorithm) -> Batch:
    """Every completion of the groups as a row.

    A completion that could not be scored, and with overlong filtering a truncated one, keeps its row, but its mask is all False,
    so it has no loss.
    """
    completions = [completion for group in groups for completion in group.completions]
    failed = [score.failure is not None for group in groups for score in group.scores]
    masks = [
        torch.zeros_like(c.mask) if no_score or (algorithm.overlong_filter and c.stop == "length") else c.mask
        for c, no_score in zip(completions, failed, strict=True)
    ]
    return Batch(
        rows_B=torch.arange(len(completions)),
        prompts=tuple(group.prompt_tokens for group in groups),
        group_ids_B=torch.tensor([i for i, group in enumerate(groups) for _ in group.completions]),
        tokens_BT=pad_rows([completion.tokens for completion in completions]),
        lengths_B=torch.tensor([len(completion.tokens) for completion in completions]),
        mask_BT=pad_rows(masks),
        rollout_logprobs_BT=pad_rows([completion.logprobs for completion in completions]),
        kept=tuple(completion.kept for completion in completions),
    )


def minibatches(batch: TrainingBatch, count: int, seed: int, epochs: int = 1) -> Iterator[TrainingBatch]:
    """The batch in `count` minibatches of complete groups, once for each epoch, shuffled anew; fewer when there are fewer groups.

    `seed`: of the order of all epochs.
    """
    random_numbers = random.Random(seed)
    P = len(batch.prompts)
    count = min(count, P)
    for _ in range(epochs):
        order = list(range(P))
        random_numbers.shuffle(order)
        for i in range(count):
            part = torch.tensor(order[i * P // count : (i + 1) * P // count])
            rows = torch.isin(batch.group_ids_B, part).nonzero()[:, 0]
            if batch.mask_BT[rows].any():
                yield batch.select(rows)
