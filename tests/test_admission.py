"""The windowed FIFO: its bounds, for any order in which groups finish, and a case worked out by hand."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupwise.rollouts.admission import Admission


class Run:
    """Everything that a training loop does with an `Admission`, with groups finishing in whatever order is asked for."""

    def __init__(self, prompts: int, staleness: int, window: int) -> None:
        self.admission = Admission(prompts, staleness, window)
        self.done = 0
        """Steps whose weights are out."""
        self.begun_at: dict[int, int] = {}
        self.trained: list[list[int]] = []
        self.ages: list[int] = []
        self.dropped: list[int] = []
        self.in_step = False

    def begin(self) -> None:
        while self.admission.free:
            self.begun_at[self.admission.begin()] = self.done
        with pytest.raises(ValueError, match="no further group"):
            self.admission.begin()
        taken = self.admission.prompts if self.in_step else 0
        under_way = len(self.admission.running) + len(self.admission.finished) + taken
        assert under_way == (self.admission.staleness + 1) * self.admission.prompts

    def finish(self, which: int, keep: bool) -> None:
        if running := self.admission.running:
            position = running[which % len(running)]
            self.admission.finish(position, keep=keep)
            self.dropped += [] if keep else [position]

    def take(self) -> bool:
        """Train on the next batch, if there is one; its weights are out with `publish`."""
        oldest = min(self.admission.running, default=self.admission.begun)
        batch = self.admission.ready()
        if self.in_step or not batch:
            return False
        assert batch == sorted(set(batch)) and len(batch) == self.admission.prompts
        assert all(position < oldest + self.admission.window for position in batch)
        self.admission.take(batch)
        self.trained.append(batch)
        self.ages += [self.done - self.begun_at[position] for position in batch]
        self.in_step = True
        return True

    def publish(self) -> None:
        if self.in_step:
            self.done, self.in_step = self.done + 1, False
            self.admission.publish()


SHAPES = st.tuples(st.integers(1, 5), st.integers(0, 4), st.integers(1, 12))
EVENTS = st.lists(st.tuples(st.sampled_from(["finish", "finish", "drop", "take", "publish", "begin"]), st.integers(0, 99)))


@settings(max_examples=300, deadline=None)
@given(SHAPES, EVENTS, st.booleans())
def test_the_bounds_hold_in_any_order_of_events(shape: tuple[int, int, int], events: list[tuple[str, int]], again: bool) -> None:
    run = Run(*shape)
    prompts, staleness, window = shape
    run.begin()
    for event, number in events:
        if event in ("finish", "drop"):
            run.finish(number, keep=event == "finish")
        elif event == "take":
            run.take()
        elif event == "publish":
            run.publish()
        else:
            run.begin()
        if again:  # what a checkpoint holds is all that there is
            fresh = Admission(*shape)
            fresh.load_state_dict(run.admission.state_dict())
            assert (fresh.running, fresh.finished, fresh.free) == (
                run.admission.running,
                run.admission.finished,
                run.admission.free,
            )
            run.admission = fresh
    assert max(run.ages, default=0) <= run.admission.largest_age <= staleness + math.ceil((window - 1) / prompts)
    used = [position for batch in run.trained for position in batch] + run.dropped
    assert len(used) == len(set(used)), "nothing twice"
    assert {*used, *run.admission.running, *run.admission.finished} == set(range(run.admission.begun)), "nothing lost"
    if window == 1:
        order = [position for batch in run.trained for position in batch]
        assert order == [position for position in range(max(order, default=-1) + 1) if position not in run.dropped]


@settings(max_examples=100, deadline=None)
@given(SHAPES, st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=20, max_size=300))
def test_it_never_gets_stuck(shape: tuple[int, int, int], finishing: list[tuple[int, bool]]) -> None:
    """While groups finish, batches come: whenever all are finished and as many as may be are begun, there is one."""
    run = Run(*shape)
    for number, keep in finishing:
        run.begin()
        run.finish(number, keep)
        if run.take():
            run.publish()
        run.begin()
    while run.admission.running:
        run.finish(0, keep=True)
    assert run.take()


@given(SHAPES)
def test_the_largest_age_is_reached(shape: tuple[int, int, int]) -> None:
    """The bound is no larger than it must be: the last group that is begun overtakes nobody, and is overtaken by all who may."""
    prompts, staleness, _ = shape
    run = Run(*shape)
    run.begin()
    last = (staleness + 1) * prompts - 1  # is slow; all others finish at once
    while last not in {position for batch in run.trained for position in batch}:
        for position in run.admission.running:
            if position != last:
                run.admission.finish(position, keep=True)
        if not run.take():
            run.admission.finish(last, keep=True)
            assert run.take()
        run.publish()
        run.begin()
    assert next(step for step, batch in enumerate(run.trained) if last in batch) == run.admission.largest_age


def test_two_prompts_one_step_ahead_by_hand() -> None:
    """P = 2, S = 1, W = 2: at most 4 groups are under way, and a group overtakes the oldest that runs by one place at most."""
    admission = Admission(2, 1, 2)
    assert [admission.begin() for _ in range(4)] == [0, 1, 2, 3] and admission.free == 0
    admission.finish(2, keep=True)
    admission.finish(3, keep=True)
    assert admission.ready() == [], "0 runs, so that only 1 might overtake it"
    admission.finish(1, keep=True)
    assert admission.ready() == [], "1 may, and 2 may not"
    admission.finish(0, keep=True)
    assert admission.ready() == [0, 1]
    admission.take([0, 1])
    assert admission.free == 0, "their places are free when the weights are out that they made"
    admission.publish()
    assert [admission.begin(), admission.begin()] == [4, 5] and admission.free == 0
    assert admission.ready() == [2, 3] and admission.largest_age == 2
    admission.take([2, 3])
    admission.put_back([2, 3])
    assert admission.ready() == [2, 3], "the step failed, and is done again"
    admission.take([2, 3])
    admission.publish()
    assert [admission.begin(), admission.begin()] == [6, 7]
    admission.finish(4, keep=False)
    assert admission.begin() == 8, "a group that is dropped makes room for another at once"
    admission.finish(6, keep=True)
    assert admission.ready() == [], "5 runs: 6 may overtake it, and is alone"
