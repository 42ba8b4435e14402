"""The simulation against hand-computed cases, conservation laws and the bounds of the admission."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groupwise.cluster.planning.lengths import lognormal
from groupwise.cluster.planning.simulation import Lengths, Outcome, Setup, Simulation


def simulated(lengths: Lengths, steps: int, seed: int = 0, **changes: Any) -> Outcome:
    usual: dict[str, Any] = {"samplers": 1, "rows": 64, "prompts": 2, "group": 1}
    usual |= {"step_seconds": lambda _: 1.0, "learn_seconds": lambda _: 0.0}
    return Simulation(Setup(**{**usual, **changes}), lengths, seed=seed).run(steps)


def given_lengths(*groups: list[int]) -> Lengths:
    """These lengths, group after group, again from the start."""
    state = {"next": 0}

    def draw(_: np.random.Generator, count: int) -> Any:
        found = groups[state["next"] % len(groups)]
        state["next"] += 1
        assert len(found) == count
        return np.array(found)

    return draw


def constant(seconds: float) -> Callable[[int], float]:
    return lambda _: seconds


def test_a_synchronous_step_of_one_sampler_takes_its_longest_completion_and_the_learner() -> None:
    drawn: list[list[int]] = []
    random = lognormal(40, 1.0, 500)

    def remembered(generator: np.random.Generator, count: int) -> Any:
        found = random(generator, count)
        drawn.append(found.tolist())
        return found

    result = simulated(
        remembered, 6, prompts=4, group=3, step_seconds=constant(0.5), learn_seconds=constant(7.0), publish_seconds=2.0
    )
    longest = [max(max(group) for group in drawn[4 * step : 4 * step + 4]) for step in range(6)]
    assert result.seconds == pytest.approx(sum(0.5 * length + 7.0 + 2.0 for length in longest[1:]) / 5)  # the first is left out


def test_rows_share_a_sampler_that_slows_down_with_them() -> None:
    # Two rows of 1 and 3 tokens, a step takes 1 s for each row: the first ends after 2 s, then 2 tokens take 1 s each.
    result = simulated(given_lengths([1], [3]), 1, step_seconds=float, learn_seconds=constant(5.0))
    assert result.seconds == pytest.approx(2 + 2 + 5)
    assert result.sampler_busy == pytest.approx(4 / 9)


def test_groups_wait_for_a_free_row() -> None:
    result = simulated(given_lengths([2], [3]), 1, rows=1)
    assert result.seconds == pytest.approx(5)
    assert simulated(given_lengths([2], [3]), 1, rows=1, samplers=2).seconds == pytest.approx(3)


def test_a_prompt_is_run_while_other_rows_wait() -> None:
    # Both prompts are run first, one after the other, and then all rows together.
    assert simulated(given_lengths([2], [3]), 1, prefill_seconds=10.0).seconds == pytest.approx(20 + 3)


def test_one_step_off_hides_the_learner_behind_the_sampler() -> None:
    # Each batch takes 10 s to sample and 6 s to learn. Synchronous: 16 s a step.
    same = given_lengths([10], [10])
    assert simulated(same, 8, learn_seconds=constant(6.0)).seconds == pytest.approx(16)
    # At staleness 1 two batches are under way, both sampled in the same 10 s: every 16 s there are two steps.
    result = simulated(same, 9, staleness=1, learn_seconds=constant(6.0))
    assert result.seconds < 12
    # Where the learner is slower, it never waits.
    assert simulated(same, 9, staleness=1, learn_seconds=constant(30.0)).seconds == pytest.approx(30)


def test_a_sampler_finishes_its_rows_before_it_loads_unless_they_may_go_on() -> None:
    lengths = given_lengths([1], [1], [1], [100])
    # Step 1 is over at 1 s. Without partial rollouts the row of 100 tokens keeps the sampler from beginning others until 100 s.
    usual = {"staleness": 1, "window": 3, "learn_seconds": constant(0.5)}
    partial = simulated(lengths, 2, partial=True, **usual)
    whole = simulated(lengths, 2, partial=False, **usual)
    assert partial.seconds < whole.seconds


def test_loading_weights_stops_a_sampler() -> None:
    lengths = given_lengths([4], [4], [8], [8])
    free = simulated(lengths, 2, staleness=1)
    stopped = simulated(lengths, 2, staleness=1, load_seconds=lambda rows: 3.0 if rows else 0.0)
    assert stopped.seconds == pytest.approx(free.seconds + 3.0)


@settings(deadline=None, max_examples=60)
@given(
    samplers=st.integers(1, 4),
    rows=st.integers(2, 12),
    prompts=st.integers(1, 5),
    group=st.integers(1, 3),
    staleness=st.integers(0, 4),
    window=st.integers(1, 12),
    partial=st.booleans(),
    learn=st.floats(0.0, 60.0),
    seed=st.integers(0, 1000),
)
def test_laws(
    samplers: int,
    rows: int,
    prompts: int,
    group: int,
    staleness: int,
    window: int,
    partial: bool,
    learn: float,
    seed: int,
) -> None:
    steps = 12
    result = simulated(
        lognormal(20, 1.0, 200), steps, seed,
        samplers=samplers, rows=max(rows, group), prompts=prompts, group=group, staleness=staleness, window=window,
        partial=partial, learn_seconds=constant(learn), step_seconds=lambda count: 0.5 + 0.1 * count,
    )  # fmt: skip
    assert result.largest_age <= staleness + math.ceil((window - 1) / prompts)
    assert result.most_under_way <= (staleness + 1) * prompts
    assert steps * prompts <= result.groups <= (steps + staleness + 1) * prompts
    assert 0 <= result.learner_busy <= 1 + 1e-9
    assert 0 < result.sampler_fill <= result.sampler_busy * (0.5 + 0.1 * max(rows, group)) / 0.6 + 1e-9
    assert result.sampler_busy <= 1 + 1e-9
    assert result.seconds >= learn - 1e-6


def test_tokens_that_are_trained_on_are_those_that_were_made() -> None:
    """Synchronous: nothing is left over. Lengths do not depend on the bound on the staleness: nothing is thrown away."""
    lengths = lognormal(50, 1.5, 2000)
    means = []
    for staleness in (0, 1, 4):
        simulation = Simulation(
            Setup(samplers=2, rows=32, prompts=8, group=4, staleness=staleness, window=8, step_seconds=constant(1.0),
                  learn_seconds=constant(20.0)),
            lengths,
        )  # fmt: skip
        result = simulation.run(60)
        made = sum(sampler.tokens for sampler in simulation.samplers)
        if staleness == 0:
            assert made == pytest.approx(result.tokens)
        assert made >= result.tokens - 1e-6
        means.append(result.mean_length)
    assert means == pytest.approx([means[0]] * 3, rel=0.1)


def test_a_window_of_one_trains_in_order_and_a_wider_one_no_later() -> None:
    lengths = lognormal(50, 2.0, 5000)
    usual = {"samplers": 4, "rows": 8, "prompts": 8, "group": 2, "staleness": 2, "learn_seconds": constant(30.0)}
    strict, wide = (simulated(lengths, 40, window=window, **usual) for window in (1, 8))
    assert strict.largest_age <= 2
    assert wide.seconds <= strict.seconds * 1.001
