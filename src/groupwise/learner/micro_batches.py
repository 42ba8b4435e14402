"""How a batch is cut into parts that go through the model at once. The cut changes memory and time, not results."""

import gc
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from groupwise.errors import RunError, first_line, is_out_of_memory
from groupwise.types import Batch

Result = TypeVar("Result")

TAKE_LESS = "learner.checkpointing = true, learner.precision = 'bfloat16', [model.lora] or a smaller rollouts.max_tokens"


class Budget:
    """How many tokens go through the model at once: as many as the recipe says, half of it whenever memory did not suffice."""

    def __init__(self, tokens: int, advice: str = TAKE_LESS) -> None:
        """`advice`: which settings take less memory, for a message."""
        self.asked = self.tokens = tokens
        self.advice = advice
        self._rows = self._size = 0
        """Of the micro-batch that was cut last: rows, and tokens with all rows as long as the longest. 0: none was cut yet."""

    def cut(self, batch: Batch, *, padded: bool) -> Iterator[Tensor]:
        """See `cut_rows`."""
        longest = max(len(prompt) for prompt in batch.prompts)
        for rows in cut_rows(batch, self.tokens, padded=padded):
            self._rows = len(rows)
            self._size = len(rows) * (longest + int(batch.lengths_B[rows].max()))
            yield rows

    def fit(self, work: Callable[[], Result], clear: Callable[[], None]) -> Result:
        """The result of `work`, which cuts what it runs by this budget. If memory does not suffice, `clear` forgets what it did,
        and it is done again with half the budget.

        Raises:
            RunError: memory does not suffice for a single completion, or was gone before anything was cut, so that smaller
                micro-batches would not help.
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
            # Here the exception is gone, and with it the frames that held tensors.
            clear()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.tokens = max(1, min(self.tokens, self._size) // 2)

    def state_dict(self) -> dict[str, int]:
        return {"asked": self.asked, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take up the budget that was left, unless the recipe asks for another one now."""
        if state["asked"] == self.asked:
            self.tokens = state["tokens"]


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
