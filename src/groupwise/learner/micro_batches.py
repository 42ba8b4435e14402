"""How a batch is cut into parts that go through the model at once. The cut changes memory and time, not results."""

from collections.abc import Iterator

import torch
from torch import Tensor

from groupwise.types import Batch


def cut_rows(batch: Batch, tokens: int, *, padded: bool) -> Iterator[Tensor]:
    """Rows (int64 [R]) of each micro-batch: groups kept together, at most `tokens` tokens each (one row at least).

    Args:
        batch: what to cut.
        tokens: the budget.
        padded: whether every row costs as much as the longest, its prompt included; else each costs its own length, and
            a prompt once for its rows.
    """
    rows: list[int] = []
    prompts: set[int] = set()
    longest = packed = 0
    for row in torch.argsort(batch.group_ids_B, stable=True).tolist():
        prompt, length = int(batch.group_ids_B[row]), int(batch.lengths_B[row])
        prompt_length = len(batch.prompts[prompt])
        cost = length if prompt in prompts else length + prompt_length
        total = (len(rows) + 1) * max(longest, prompt_length + length) if padded else packed + cost
        if rows and total > tokens:
            yield torch.tensor(rows)
            rows, prompts, longest, packed, cost = [], set(), 0, 0, length + prompt_length
        rows.append(row)
        prompts.add(prompt)
        longest, packed = max(longest, prompt_length + length), packed + cost
    yield torch.tensor(rows)
