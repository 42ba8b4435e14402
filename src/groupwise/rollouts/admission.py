"""When a group may be begun, and which ones are trained on next, so that what is trained on is never too old: a windowed FIFO.

Groups are begun in the order of their positions. At most (staleness + 1) * prompts of them are under way, counted from their
beginning until weights that they were trained into have been published. What came late is never thrown away, which would favour
short completions. It is waited for: a group is trained on only while its position is less than `window` above that of the oldest
one that is still being made. With a window of 1 batches are taken in the order of the positions, whatever finishes first.

A group that was begun when n steps were done is trained on in a step before which at most n + staleness + ceil((window - 1) /
prompts) were done: when it was begun at most (staleness + 1) * prompts - 1 others were under way, and at most window - 1 that
are begun after it overtake it. Dropped groups only make room.

Plain numbers only: the training loop and the simulations of `groupwise plan` run this same code.
"""

import math
from collections.abc import Iterable
from typing import Any


class Admission:
    """Which groups are under way, finished and taken, by their positions."""

    def __init__(self, prompts: int, staleness: int, window: int = 1) -> None:
        """
        Args:
            prompts: groups that a step trains on.
            staleness: steps by which the learner may be ahead of the weights that a group was begun with.
            window: how far a group may overtake others; 1: not at all.
        """
        self.prompts, self.staleness, self.window = prompts, staleness, window
        self.begun = 0
        """Groups begun; the position of the next one."""
        self._running: set[int] = set()
        self._finished: set[int] = set()
        """Finished, and to be trained on."""
        self._taken = 0
        """Groups in steps whose weights have not been published yet."""

    @property
    def largest_age(self) -> int:
        """The most steps between a group's beginning and the step that trains on it."""
        if self.staleness == 0:  # a batch takes all that are under way
            return 0
        return self.staleness + math.ceil((self.window - 1) / self.prompts)

    @property
    def running(self) -> list[int]:
        """Positions of the groups that are not finished, ascending."""
        return sorted(self._running)

    @property
    def finished(self) -> list[int]:
        """Positions of those that are finished and wait for their step, ascending."""
        return sorted(self._finished)

    @property
    def free(self) -> int:
        """How many groups may be begun now."""
        under_way = len(self._running) + len(self._finished) + self._taken
        return max(0, (self.staleness + 1) * self.prompts - under_way)

    def begin(self) -> int:
        """Begin a group; returns its position.

        Raises:
            ValueError: none may be begun now.
        """
        if not self.free:
            raise ValueError("no further group may be begun: it might be too old when it is trained on")
        position = self.begun
        self.begun += 1
        self._running.add(position)
        return position

    def finish(self, position: int, *, keep: bool) -> None:
        """A group is complete and scored. Unless it is to be kept, another one may be begun for it."""
        self._running.remove(position)
        if keep:
            self._finished.add(position)

    def ready(self) -> list[int]:
        """Positions of the next batch, ascending; [] while its groups are not finished."""
        if len(self._finished) < self.prompts:
            return []
        end = min(self._running, default=self.begun) + self.window
        chosen = [position for position in sorted(self._finished) if position < end][: self.prompts]
        return chosen if len(chosen) == self.prompts else []

    def take(self, positions: Iterable[int]) -> None:
        """These groups, which were `ready`, are trained on now."""
        for position in positions:
            self._finished.remove(position)
            self._taken += 1

    def put_back(self, positions: Iterable[int]) -> None:
        """These groups, which were taken, were not trained on after all."""
        for position in positions:
            self._finished.add(position)
            self._taken = max(0, self._taken - 1)

    def publish(self) -> None:
        """Weights are out that all groups taken so far were trained into: their places are free."""
        self._taken = 0

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self.begun, "running": self.running, "finished": self.finished, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Groups that were running are to be begun again, under their old positions."""
        self.begun, self._taken = state["begun"], state["taken"]
        self._running, self._finished = set(state["running"]), set(state["finished"])
