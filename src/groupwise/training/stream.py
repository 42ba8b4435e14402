"""Rollouts while the learner computes: groups are kept under way, as many as the bound on the staleness allows.

Everything happens in an event loop of its own thread, which owns all that is here; other threads ask it. Which groups may be
begun, and which are trained on next, says `groupwise.rollouts.admission`.
"""

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from groupwise.algorithms import Algorithm
from groupwise.config import Recipe
from groupwise.errors import UserError
from groupwise.rollouts.admission import Admission
from groupwise.rollouts.driver import CLOSE_LIMIT, LoopThread
from groupwise.rollouts.groups import Rollouts
from groupwise.seeding import derive
from groupwise.state import plain
from groupwise.training.collect import Collected, Frontier
from groupwise.training.supply import Drawn, Supply
from groupwise.types import Group


@dataclass(frozen=True, slots=True)
class Running:
    """A group being made."""

    drawn: Drawn
    done: int
    """Steps whose weights were out when it was begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A group that is complete and scored, and not used up yet."""

    group: Group
    done: int
    """Steps whose weights were out when it was begun."""
    dropped: str | None
    """Why it is not trained on; None: it is."""
    generated: float = 0.0
    """When its last completion was there, in seconds of `time.perf_counter`."""
    scored: float = 0.0
    """When its scores were."""


class Stream:
    """A `Collector` for asynchronous training. The same problems get the same positions and random numbers.

    A batch is the next groups in the order of their positions, as far as the window allows. Groups that are dropped are used up
    by the step that trains on a later one, so that neither metrics nor histories favour what finished first.
    """

    def __init__(self, rollouts: Rollouts, recipe: Recipe, algorithm: Algorithm) -> None:
        self.recipe, self.algorithm = recipe, algorithm
        self.thread = LoopThread("rollouts")
        self.rollouts = replace(rollouts, wait=self.thread.wait_for)
        self.supply = Supply(rollouts.task, recipe, algorithm)
        self._collected_at = time.perf_counter()
        """When the last batch was complete."""
        self._clear()

    def _clear(self) -> None:
        cluster, self._prompts = self.recipe.cluster, self.recipe.rollouts.prompts_per_step
        self.admission = Admission(self._prompts, cluster.staleness, cluster.window)
        self._ahead: deque[Drawn] = deque()
        """Problems that were allocated completions together with others, and have no group yet."""
        self._chunks = 0
        """How often problems were allocated completions."""
        self._running: dict[int, Running] = {}
        self._unbegun: list[int] = []
        """Positions of those that were running when the run stopped, and are to be begun again."""
        self._finished: dict[int, Finished] = {}
        self._refused = 0
        """How many of them are dropped."""
        self._refused_before = 0
        """How many of those were in the state that was loaded, until the next batch."""
        self._used: dict[int, Finished] = {}
        """What the step under way has used up."""
        self._history = self.supply.history
        """Before that."""
        self._done = 0
        """Steps whose weights are out."""
        self._filled = 0
        """Steps whose groups have been taken."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None
        """What ended the making of a group."""
        self._changed = asyncio.Event()

    # --- what the training loop calls, from its own thread

    def begin_step(self) -> None:
        """What is collected from here on can be taken back."""
        self._used, self._history = {}, self.supply.history

    def collect(self, step: int) -> Collected:
        """The groups of one step, after `step` others.

        Raises:
            BaseException: whatever ended the making of a group: RunError, say, where scoring failed for too many in a row.
        """
        return self.thread.wait_for(self._collect(step))

    def publish(self, step: int) -> None:
        """The sampler has the weights of so many steps."""
        self.thread.wait_for(self._publish(step))

    def take_back(self) -> None:
        """The groups that the step has used up wait for it again; those that were begun meanwhile go on."""
        self.thread.wait_for(self._take_back())

    def close(self) -> None:
        """End the thread; groups under way are abandoned."""
        self.thread.close()

    def state_dict(self) -> dict[str, Any]:
        state, finished = self.thread.wait_for(self._snapshot())
        groups = [(item.done, item.dropped, packed(item.group)) for item in finished]
        return {**state, "finished": groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Abandon what is under way, and go on from a state. Groups that were running then are begun again.

        From a `Collector`'s state a run goes on asynchronously; groups that it had kept for later batches are dropped.
        """
        if "surplus" in state:
            kept = [(born, "surplus", group) for born, group in state["surplus"]]
            state = {**state, "chunks": state["begun"], "ahead": [], "running": [], "finished": kept}
        self.thread.wait_for(self._load(state))

    # --- in the loop's thread

    async def _collect(self, step: int) -> Collected:
        started = time.perf_counter()
        self._done = self._filled = step
        self._begin()
        while self._error is None and (found := self._ready()) is None:
            self._changed.clear()
            await self._changed.wait()
        if self._error is not None:
            raise self._error
        assert found is not None
        return self._use(found, step, started)

    def _ready(self) -> list[int] | None:
        """Positions of the next batch; None while there is none. Empty: there is nothing to train on."""
        if found := self.admission.ready():
            return found
        return self.admission.finished if self._is_exhausted and not self._running else None

    @property
    def _is_exhausted(self) -> bool:
        """Whether so many groups were dropped, since the last batch or a resume, that the next one is to be what there is."""
        limit = self.recipe.rollouts.max_rounds * self._prompts
        return self.algorithm.dynamic_sampling and self._refused - self._refused_before >= limit

    def _use(self, chosen: list[int], step: int, started: float) -> Collected:
        """The batch of these groups; with it go the dropped groups before the last of them, or all where it is not full."""
        full = len(chosen) == self._prompts
        used = sorted(position for position in self._finished if not full or position <= chosen[-1])
        self.admission.take(chosen)
        self._filled, self._refused_before = step + 1, 0
        self._used = {position: self._finished.pop(position) for position in used}
        batch, dropped = [self._used[position] for position in chosen], dict[str, list[Group]]()
        for item in self._used.values():
            if item.dropped is not None:
                self._refused -= 1
                dropped.setdefault(item.dropped, []).append(item.group)
        seen = [item.group for item in self._used.values()]
        self.supply.remember(seen)
        frontier = Frontier(begun=self.admission.begun, running=sorted(self._running), finished=sorted(self._finished))
        now, generated = time.perf_counter(), max((item.generated for item in batch), default=started)
        waited, whole, self._collected_at = now - started, now - self._collected_at, now
        ages = [step - item.done for item in batch]
        metrics = {
            "cluster/age_mean": sum(ages) / max(1, len(ages)),
            "cluster/age_max": float(max(ages, default=0)),
            "cluster/groups_under_way": float(len(frontier.running)),
            "cluster/groups_finished": float(len(frontier.finished)),
            "cluster/idle/learner": min(1.0, waited / max(whole, 1e-9)),
        }
        return Collected(
            groups=[item.group for item in batch],
            seen=seen,
            dropped=dropped,
            frontier=frontier,
            metrics=metrics,
            rounds=1,
            seconds=waited,
            scoring_seconds=min(waited, max(0.0, max((item.scored for item in batch), default=0.0) - generated)),
            full=full,
        )

    async def _publish(self, step: int) -> None:
        self.admission.publish()
        self._done = step
        if self.admission.staleness:  # else the step's groups are begun with the step
            self._begin()

    async def _take_back(self) -> None:
        self.admission.put_back(position for position, item in self._used.items() if item.dropped is None)
        self._refused += sum(item.dropped is not None for item in self._used.values())
        self._finished |= self._used
        self._used, self.supply.history, self._filled = {}, self._history, self._done

    # --- groups

    def _begin(self) -> None:
        """Begin as many groups as may be under way. What is raised is kept for the next `collect`."""
        try:
            for position in self._unbegun:
                self._start(position, self._running[position].drawn)
            self._unbegun = []
            while self.admission.free and self._wanted() and not self._is_exhausted and self._error is None:
                if not self._ahead:
                    self._ahead.extend(self.supply.draw(self._prompts, derive(self.recipe.seed, "allocation", self._chunks, 0)))
                    self._chunks += 1
                self._start(self.admission.begin(), self._ahead.popleft())
        except BaseException as error:  # a task or an allocation of the user's may raise anything
            self._fail(error)

    def _wanted(self) -> bool:
        """Whether the steps that are left need more groups than are there."""
        left = (self.recipe.training.steps - self._filled) * self._prompts
        return len(self._running) + len(self._finished) - self._refused < left

    def _start(self, position: int, drawn: Drawn) -> None:
        self._running[position] = Running(drawn, self._done)
        task = self.thread.loop.create_task(self._make(position, drawn))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _make(self, position: int, drawn: Drawn) -> None:
        running = self._running
        try:
            group, generated = await self.rollouts.group(self.supply.order(drawn, position))
            if running is self._running:  # else a state was loaded meanwhile, and this one would not be cancelled
                self._finish(position, group, generated)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # the user's parts may raise anything, which is the main thread's to hear of
            if running is self._running:
                self._fail(error)

    def _finish(self, position: int, group: Group, generated: float) -> None:
        dropped = self.supply.why_dropped(group)
        done = self._running.pop(position).done
        self.admission.finish(position, keep=dropped is None)
        now = time.perf_counter()
        self._finished[position] = Finished(group=group, done=done, dropped=dropped, generated=generated, scored=now)
        self._refused += dropped is not None
        self.supply.check_failures([group])
        self._begin()
        self._changed.set()

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._changed.set()

    # --- state

    async def _snapshot(self) -> tuple[dict[str, Any], list[Finished]]:
        state = {
            **self.supply.state_dict(),
            "step": self._filled,
            "begun": self.admission.begun,
            "chunks": self._chunks,
            "ahead": [(drawn.index, drawn.n) for drawn in self._ahead],
            "running": [(position, item.drawn.index, item.drawn.n) for position, item in sorted(self._running.items())],
        }
        return state, [item for _, item in sorted(self._finished.items())]

    async def _load(self, state: Mapping[str, Any]) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSE_LIMIT)
        self.supply.load_state_dict(state)
        self._clear()
        self._done = self._filled = state.get("step", 0)  # a `Collector` does not say, and leaves no groups to be trained on
        self._chunks = state["chunks"]
        self._ahead.extend(Drawn(index, self.supply.problem(index), n) for index, n in state["ahead"])
        for position, index, n in state["running"]:
            self._running[position] = Running(Drawn(index, self.supply.problem(index), n), 0)
        self._unbegun = list(self._running)
        for done, dropped, tree in state["finished"]:
            group = unpacked(tree)
            assert group.position is not None
            self._finished[group.position] = Finished(group=group, done=done, dropped=dropped)
        self._refused = self._refused_before = sum(item.dropped is not None for item in self._finished.values())
        kept = [position for position, item in self._finished.items() if item.dropped is None]
        self._check_ages(kept)
        self.admission.load_state_dict({"begun": state["begun"], "running": self._unbegun, "finished": kept, "taken": 0})

    def _check_ages(self, kept: list[int]) -> None:
        """Whether groups that are under way fit these settings, which may have changed since they were begun.

        Args:
            kept: positions of those that are finished and not dropped.

        Raises:
            UserError: some would be too old when they are trained on.
        """
        most, under_way = self.admission.largest_age, sorted([*kept, *self._unbegun])
        ages = {position: self._done + place // self._prompts - self._finished[position].done
                for place, position in enumerate(under_way) if position in self._finished}  # fmt: skip
        if len(under_way) > self.admission.free or max(ages.values(), default=0) > most:
            raise UserError(
                f"cluster.staleness: {len(under_way)} groups under way were begun with other settings, and some would be trained "
                f"on more than {most} steps after their beginning, the most with these: leave cluster.staleness, cluster.window "
                "and rollouts.prompts_per_step as they were"
            )


PACKED = ("tokens", "logprobs", "mask")
"""Tensors of a completion that a state holds once for all completions of a group: thousands of groups may be under way."""


def packed(group: Group) -> dict[str, Any]:
    """A group as a state holds it."""
    tree: dict[str, Any] = plain(group)
    completions = tree["completions"]
    tree["lengths"] = [len(completion["tokens"]) for completion in completions]
    return {**tree, **{name: torch.cat([completion.pop(name) for completion in completions]) for name in PACKED}}


def unpacked(tree: Mapping[str, Any]) -> Group:
    """The group that `packed` made a tree of; also one that is not packed."""
    if "lengths" not in tree:
        return Group.from_dict(tree)
    parts = zip(*(tree[name].split(tree["lengths"]) for name in PACKED), strict=True)
    pairs = zip(tree["completions"], parts, strict=True)
    whole = [{**completion, **dict(zip(PACKED, tensors, strict=True))} for completion, tensors in pairs]
    return Group.from_dict({**tree, "completions": whole})
