"""How a batch is cut into parts that go through the model at once. The cut changes memory and time, not results."""

import gc
import itertools
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from groupwise.errors import RunError, first_line, is_out_of_memory
from groupwise.memory import give_unused_back
from groupwise.types import Batch

Result = TypeVar("Result")

TAKE_LESS = "learner.checkpointing = true, learner.precision = 'bfloat16', [model.lora] or a smaller rollouts.max_tokens"


class Budget:
    """How many tokens go through the model at once: as many as the recipe says, half of it whenever memory did not suffice."""

    def __init__(self, tokens: int, advice: str = TAKE_LESS, *, fixed: bool = False) -> None:
        """`advice`: which settings take less memory, for a message. `fixed`: it cannot be halved."""
        self.asked = self.tokens = tokens
        self.advice, self.fixed = advice, fixed
        self._rows = self._size = 0
        """Of the micro-batch that was cut last: rows, and tokens with all rows as long as the longest. 0: none was cut yet."""

    def cut(self, batch: Batch, *, padded: bool, rank: int = 0, ranks: int = 1) -> Iterator[tuple[Tensor, bool]]:
        """Rows of each micro-batch of a process (see `cut_rows`), and whether they count.

        All processes have equally many, since each has to take part whenever weights are gathered: one that has fewer runs its
        last ones on rows that do not count.
        """
        longest = max(len(prompt) for prompt in batch.prompts)
        mine, most = cut_for_ranks(batch, self.tokens, padded=padded, rank=rank, ranks=ranks)
        idle = int(batch.lengths_B.argmin())
        for rows in (*mine, *[None] * (most - len(mine))):
            counts = rows is not None
            rows = torch.tensor([idle]) if rows is None else rows
            self._rows = len(rows)
            self._size = len(rows) * (longest + int(batch.lengths_B[rows].max()))
            yield rows, counts

    def fit(self, work: Callable[[], Result], clear: Callable[[], None]) -> Result:
        """The result of `work`, which cuts what it runs by this budget. If memory does not suffice, `clear` forgets what it did,
        and it is done again with half the budget.

        Raises:
            RunError: memory does not suffice for a single completion, or was gone before anything was cut, so that smaller
                micro-batches would not help; or it does not suffice, and the budget is fixed.
        """
        while True:
            self._rows = self._size = 0
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self._rows == 0:
                    text = f"out of memory before the first micro-batch: {first_line(error)}. {self.advice} take less"
                    raise RunError(text) from error
                if self._rows == 1:
                    raise RunError(
                        f"out of memory with a single completion of {self._size} tokens, its prompt included: "
                        f"{self.advice} take less"
                    ) from error
                if self.fixed:  # by the time that one process of several is short of memory, the others wait for it
                    text = f"out of memory with {self.tokens} tokens at once: a smaller learner.micro_batch_tokens"
                    raise RunError(f"{text}, {self.advice} take less") from error
            # Here the exception is gone, and with it the frames that held tensors.
            clear()
            gc.collect()
            give_unused_back()
            self.tokens = max(1, min(self.tokens, self._size) // 2)

    def state_dict(self) -> dict[str, int]:
        return {"asked": self.asked, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take up the budget that was left, unless the recipe asks for another one now."""
        if state["asked"] == self.asked:
            self.tokens = state["tokens"]


def cut_for_ranks(batch: Batch, tokens: int, *, padded: bool, rank: int, ranks: int) -> tuple[list[Tensor], int]:
    """The rows of one process's micro-batches, and how many micro-batches the process that has most of them has."""
    if ranks == 1:
        mine = list(cut_rows(batch, tokens, padded=padded))
        return mine, len(mine)
    cuts = []
    for rows in spread(batch, ranks):
        part = batch.select(rows) if len(rows) else None
        cuts.append([] if part is None else [rows[inner] for inner in cut_rows(part, tokens, padded=padded)])
    return cuts[rank], max(map(len, cuts))


UNEVEN = 0.1
"""Of a process's share of the tokens: how far from it a group may end for the group to be kept together."""


def spread(batch: Batch, ranks: int) -> list[Tensor]:
    """The rows (int64) of each process, which may be none: about equally many tokens, a prompt's once for its group, and groups
    kept together where that is possible. All rows, each once, whatever the number of processes."""
    order = torch.argsort(batch.group_ids_B, stable=True)
    group_B, prompt_lengths_P = batch.group_ids_B[order], torch.tensor([len(prompt) for prompt in batch.prompts])
    changes = group_B[1:] != group_B[:-1]
    first_B, last_B = (torch.cat(pair) for pair in ((changes.new_ones(1), changes), (changes, changes.new_ones(1))))
    ends_B = torch.cumsum(batch.lengths_B[order] + first_B * prompt_lengths_P[group_B], 0)
    share = float(ends_B[-1]) / ranks
    cuts = [0]
    for i in range(1, ranks):
        distance = (ends_B - i * share).abs()
        whole = torch.where(last_B, distance, torch.inf)
        nearest = int((whole if whole.min() <= UNEVEN * share else distance).argmin())
        cuts.append(max(cuts[-1], nearest + 1))
    return [order[start:end] for start, end in itertools.pairwise([*cuts, len(order)])]


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
