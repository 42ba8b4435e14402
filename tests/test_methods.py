"""GDPO, VESPO, masks, selection and allocation: beside TRL's own numbers, by hand, and through the collector and the learner."""

import datetime
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import groupwise as gw
from groupwise.algorithms import Candidates, Results, named
from groupwise.algorithms.allocation import PRIOR, HitUtility, Thompson, hit_utility, hit_utility_sizes, uniform
from groupwise.algorithms.credit import Outcomes
from groupwise.algorithms.selection import Band, Mixed
from groupwise.config import Recipe, Source
from groupwise.errors import RunError, UserError
from groupwise.files import Digest
from groupwise.models import Chat
from groupwise.rollouts.base import Sampling, requests
from groupwise.rollouts.driver import generate_all, wait_for
from groupwise.rollouts.groups import Rollouts
from groupwise.rollouts.native import NativeSampler
from groupwise.state import read_state, write_state
from groupwise.tasks.arithmetic import ArithmeticTask
from groupwise.tasks.base import build_task
from groupwise.training import checkpoints
from groupwise.training.algorithm import try_parts
from groupwise.training.batching import make_batch, minibatches
from groupwise.training.collect import Collected, Collector, Frontier, sampling_of
from groupwise.training.credit import CreditAssigner, reward_components, reward_parts
from groupwise.training.evaluate import evaluate
from groupwise.training.metrics import advantage_metrics, rollout_metrics
from groupwise.training.supply import is_selected
from groupwise.types import Completion, Group, LogprobBatch, Problem, Score, TrainingBatch, VersionSpan, upgrade
from tests.conftest import owned, said, tiny_model

NAN = math.nan


def doubles(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def near(ours: Any, theirs: Any, tolerance: float = 1e-12) -> None:
    theirs = torch.as_tensor(theirs, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(ours, dtype=torch.float64), theirs, rtol=tolerance, atol=tolerance)


# --- TRL 1.16 -----------------------------------------------------------------------------------------------------------
# What trl.trainer.grpo_trainer.GRPOTrainer of TRL 1.16.0 returns for these tensors, in float64: its static methods
# `get_gamma_weights` and `get_off_policy_mask`, and the branch "normalize_then_sum" of `_generate_and_score_completions`,
# whose source lines were run as they stand.

OLD = doubles([[-1.0, -0.5, -2.0], [-0.3, -1.2, -0.7], [-1.5, -0.1, -0.9], [-2.0, -0.4, -1.1]])
NEW = doubles([[-0.7, -0.6, -1.6], [-0.5, -1.0, -0.9], [-1.9, -0.4, -1.6], [-1.7, -0.2, -1.0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()
ADVANTAGES = doubles([1.5, -0.5, -1.0, 0.25])


def test_vespo_is_trls() -> None:
    phi = [0.28185672594657235, 0.9999999999999998, 0.0676644784111252, 0.637898293623749]
    logprobs = NEW.clone().requires_grad_()
    loss, metrics = gw.policy_loss(named("vespo"), logprobs, OLD, ADVANTAGES, MASK)
    near(loss.detach(), 0.053699118539366125)  # its sum over tokens divided by their number, as its loss_type "vespo" does
    (gradient,) = torch.autograd.grad(loss, logprobs)
    near(gradient, -doubles(phi)[:, None] * ADVANTAGES[:, None] * MASK / MASK.sum())
    assert metrics["clip_fraction"] == 0


@pytest.mark.parametrize(("threshold", "keep"), [(0.1, [1, 1, 0, 1]), (0.45, [1, 1, 0, 1]), (0.5, [1, 1, 1, 1])])
def test_the_off_policy_mask_is_trls(threshold: float, keep: list[int]) -> None:
    algorithm = named("cispo", mask="off_policy", mask_divergence=threshold)
    plain = named("cispo")
    logprobs = NEW.clone().requires_grad_()
    loss, metrics = gw.policy_loss(algorithm, logprobs, OLD, ADVANTAGES, MASK, rollout_logprobs_BT=OLD)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    (unmasked,) = torch.autograd.grad(gw.policy_loss(plain, logprobs, OLD, ADVANTAGES, MASK)[0], logprobs)
    near(gradient, unmasked * doubles(keep)[:, None])  # the denominator is the same
    near(metrics["masked_fraction"], float((MASK * (1 - doubles(keep))[:, None]).sum() / MASK.sum()))


def test_gdpo_is_trls() -> None:
    """Three groups of four; one reward does not apply to a completion, and one group's rewards are all equal."""
    rewards = [[1, 0.2], [0, 0.9], [1, NAN], [0, 0.4], *[[1, 0.5]] * 4, [0, 0.1], [0, 0.3], [0, 0.7], [1, 0.1]]
    theirs = [0.7119105530912424, -0.4925674468711173, 1.369939871751617, -1.5892829779717417, 0, 0, 0, 0]
    theirs += [-1.3500887468435188, -0.7909139649239036, 0.32743559891532686, 1.8135671128520952]
    ids = torch.tensor([0] * 4 + [1] * 4 + [2] * 4)
    ours = gw.decoupled_advantages(doubles(rewards), ids, doubles([1.0, 0.5]), eps=1e-4)
    near(ours, theirs, 1e-7)  # its Bessel correction is float32
    assert ours[4:8].tolist() == [0, 0, 0, 0], "TRL's are rounding, which would have a zero-variance group run"


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_vespos_kernel_by_hand() -> None:
    """Two tokens of ratio e^0.5 each, so w = e: for A = 1 e^2 e^(3 - 3e), for A = -1 e^3 e^(2 - 2e); at w = 1 both are 1."""
    logprobs = torch.zeros(2, 2, dtype=torch.float64).requires_grad_()
    for shift, kernel in [
        (0.5, [math.exp(2 + 3 - 3 * math.e), math.exp(3 + 2 - 2 * math.e)]),
        (0.0, [1.0, 1.0]),
    ]:
        loss, _ = gw.policy_loss(named("vespo"), logprobs, logprobs.detach() - shift, doubles([1, -1]), torch.ones(2, 2).bool())
        near(torch.autograd.grad(loss, logprobs)[0], doubles([[-kernel[0]] * 2, [kernel[1]] * 2]) / 4)


def test_vespos_gradient_is_largest_at_power_over_decay_and_vanishes_far_from_the_policy() -> None:
    """d/dw w^k e^(lambda (1 - w)) = 0 at w = k / lambda: 2/3 for A > 0, 3/2 for A < 0."""
    w = torch.linspace(0.01, 5, 500, dtype=torch.float64)
    for advantage, peak in ((1.0, 2 / 3), (-1.0, 3 / 2)):
        logprobs = w.log()[:, None].requires_grad_()
        old, mask = torch.zeros(500, 1, dtype=torch.float64), torch.ones(500, 1).bool()
        loss, _ = gw.policy_loss(named("vespo"), logprobs, old, torch.full((500,), advantage), mask)
        gradient = torch.autograd.grad(loss, logprobs)[0].abs().flatten()
        assert float(w[gradient.argmax()]) == pytest.approx(peak, abs=0.01)
        assert gradient[0] < 1e-2 * gradient.max() and gradient[-1] < 0.05 * gradient.max()


def test_gdpo_tells_apart_what_a_sum_of_rewards_does_not() -> None:
    """The paper's example: rewards (0, 1) and (0, 2) of two completions. GRPO gives both +-0.7071; decoupled, the second group
    counts twice as much: sums +-0.7071 and +-1.4142, over their deviation sqrt((2 x 0.5 + 2 x 2) / 3) = sqrt(5/3).
    """
    one, two = [[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]
    ids = torch.tensor([0, 0, 1, 1])
    sums = doubles([[sum(row)] for row in one + two])[:, 0]
    assert gw.group_advantages(sums, ids, eps=0.0).abs().unique().numel() == 1
    ours = gw.decoupled_advantages(doubles(one + two), ids, doubles([1, 1]), eps=0.0)
    scale = (5 / 3) ** 0.5
    near(ours, [-(0.5**0.5) / scale, 0.5**0.5 / scale, -(2**0.5) / scale, 2**0.5 / scale])


@given(st.integers(0, 10**6), st.floats(0.01, 100), st.floats(-50, 50))
def test_gdpo_does_not_see_the_scale_or_the_offset_of_a_reward(seed: int, scale: float, offset: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(12, 2, dtype=torch.float64, generator=generator)
    ids = torch.tensor([0] * 3 + [1] * 4 + [2] * 5)
    moved = torch.stack([rewards[:, 0], rewards[:, 1] * scale + offset], 1)
    weights = doubles([1.0, 2.0])
    ours = gw.decoupled_advantages(rewards, ids, weights, eps=0.0)
    near(gw.decoupled_advantages(moved, ids, weights, eps=0.0), ours, 1e-8)
    near(ours.mean(), 0, 1e-12)
    near(ours.std(), 1)


def test_gdpo_gives_exact_zeros_where_nothing_differs() -> None:
    same = doubles([[0.1, 0.3]] * 3 + [[0.7, NAN]])
    assert gw.decoupled_advantages(same, torch.tensor([4, 4, 4, 9]), doubles([1, 1])).tolist() == [0, 0, 0, 0]
    unweighted = doubles([[0.1, 0.0], [0.1, 1.0]])
    assert gw.decoupled_advantages(unweighted, torch.tensor([0, 0]), doubles([1, 0])).tolist() == [0, 0]


# --- components of rewards --------------------------------------------------------------------------------------------


def group_of(scores: Sequence[Score], prompt: str = "p", lengths: Sequence[int] | None = None, stop: Any = "stop") -> Group:
    sizes = lengths or [2] * len(scores)
    completions = tuple(
        Completion(
            text="2",
            tokens=torch.full((size,), 5),
            logprobs=torch.full((size,), -1.0),
            mask=torch.ones(size, dtype=torch.bool),
            stop=stop,
            versions=(VersionSpan(0, size, 0),),
        )
        for size in sizes
    )
    problem = Problem(id=prompt, prompt=prompt, answer="2")
    return Group(problem=problem, prompt_tokens=torch.tensor([3, 4]), completions=completions, scores=tuple(scores))


def two(right: float, short: float | None, weight: float = 0.5) -> Score:
    components = {"right": right} | ({} if short is None else {"short": short})
    return Score(reward=right + weight * (short or 0), components=components, weights={"short": weight})


def advantages_of(groups: list[Group], algorithm: Any, max_tokens: int = 8) -> torch.Tensor:
    batch = make_batch(groups, algorithm)
    zeros = torch.zeros(batch.tokens_BT.shape)
    batch = upgrade(LogprobBatch, batch, old_logprobs_BT=zeros)
    rewards = reward_parts(groups, algorithm, max_tokens)
    return CreditAssigner(algorithm, None, max_tokens).assign(batch, groups, rewards, policy_moved=True)[0].advantages_BT[:, 0]


def test_components_reach_the_estimator_with_their_weights() -> None:
    """One completion has no "short", one could not be scored, and a group of another source has a reward without components."""
    first = group_of([two(1, 0.2), two(0, 0.9), two(1, None), Score.failed("raised"), two(0, 0.4)])
    second = group_of([Score(reward=3.0), Score(reward=1.0)], "q")
    rewards = reward_parts([first, second], named("gdpo"), 8)
    names, values, weights = reward_components([first, second], rewards)
    assert names == ["right", "short", "task"] and weights.tolist() == [1, 0.5, 1]
    right, short, task = values.T.tolist()
    assert [NAN if math.isnan(v) else v for v in right[:3]] == [1, 0, 1] and math.isnan(right[3]) and math.isnan(right[5])
    assert [math.isnan(v) for v in short] == [False, False, True, True, False, True, True] and task[5:] == [3, 1]
    kept = torch.tensor([0, 1, 2, 4, 5, 6])
    expected = gw.decoupled_advantages(values[kept], torch.tensor([0, 0, 0, 0, 1, 1]), weights)
    ours = advantages_of([first, second], named("gdpo"))
    near(ours[kept], expected, 1e-6)
    assert ours[3] == 0


def test_the_rewards_of_a_dataset_are_normalised_one_by_one(tmp_path: Path) -> None:
    """Two rewards in TRL's form, of which one gives None for a completion: from the recipe's weights to the advantages."""
    (tmp_path / "mine.py").write_text(
        "def brief(completions, **_): return [None if 'x' in text else -float(len(text)) for text in completions]\n"
    )
    (tmp_path / "data.jsonl").write_text("".join(f'{{"prompt": "{i}+2=", "answer": "{i + 2}"}}\n' for i in range(9)))
    settings = {"name": "dataset", "path": "data.jsonl", "reward": ["exact", "mine.py:brief"], "reward_weights": [1.0, 0.5]}
    task = build_task(settings, Source(tmp_path / "recipe.toml", ""))
    problem = Problem(id="1+2=", prompt="1+2=", answer="3")
    scores = wait_for(task.score(problem, [said(text) for text in ("3", "1234", "5x", "12", "3")]))
    ours = advantages_of([group_of(scores)], named("gdpo"))
    components = [[1, -1], [0, -4], [0, NAN], [0, -2], [1, -1]]
    near(ours, gw.decoupled_advantages(doubles(components), torch.zeros(5).long(), doubles([1, 0.5])), 1e-6)


def test_what_the_algorithm_adds_to_the_reward_is_a_component() -> None:
    """The soft overlong punishment is normalised by itself: here it tells apart two right answers."""
    group = group_of([two(1, 0, 1.0), two(1, 0, 1.0)], lengths=[2, 8])
    assert advantages_of([group], named("gdpo")).tolist() == [0, 0]
    near(advantages_of([group], named("gdpo", overlong_cache=0.5)), [0.5**0.5, -(0.5**0.5)], 1e-5)


def test_a_component_of_the_task_may_have_the_name_of_the_algorithms() -> None:
    scores = [Score(reward=r, components={"overlong": r}) for r in (1.0, 0.0)]
    group = group_of(scores, lengths=[2, 2])
    algorithm = named("gdpo", overlong_cache=0.5)
    names, values, _ = reward_components([group], reward_parts([group], algorithm, 8))
    assert names == ["overlong", "algorithm/overlong"] and values.tolist() == [[1, 0], [0, 0]]
    near(advantages_of([group], algorithm), [0.5**0.5, -(0.5**0.5)], 1e-5)


def test_weights_that_differ_are_refused_and_only_where_they_matter() -> None:
    group = group_of([two(1, 0.2, 0.5), two(0, 0.9, 0.7)])
    with pytest.raises(RunError, match=r"the reward 'short' has weight 0.5 in one completion and 0.7 in another"):
        advantages_of([group], named("gdpo"))
    assert advantages_of([group], named("grpo", beta=0.0)).abs().sum() > 0


def test_a_verdict_that_the_algorithm_prices_is_one_component() -> None:
    scores = [Score(reward=float(v == "correct"), correct=v == "correct", verdict=v) for v in ("correct", "wrong", "unparsed")]
    _, values, _ = reward_components([group_of(scores)], reward_parts([group_of(scores)], named("dcpo"), 8))
    assert values[:, 0].tolist() == [1, 0, -1]


def test_arithmetic_scores_steps_as_a_second_reward() -> None:
    task = ArithmeticTask(steps_weight=0.5)
    problem = Problem(id="7+12-5", prompt="7+12-5=", answer="14")
    right, half, at_once = wait_for(task.score(problem, [said("\n19-5\n14"), said("\n18-5\n14"), said("13")]))
    assert (right.reward, half.reward, at_once.reward) == (1.5, 1.25, 0.0)
    assert half.components == {"answer": 1.0, "steps": 0.5} and half.weights == {"steps": 0.5}
    assert right.correct and right.verdict is None
    assert wait_for(ArithmeticTask().score(problem, [said("14")]))[0].components == {}


# --- selection --------------------------------------------------------------------------------------------------------


def graded(*rewards: float) -> list[Score]:
    return [Score(reward=r) for r in rewards]


def judged(*rewards: float) -> list[Score]:
    return [Score(reward=r, correct=r > 0.5) for r in rewards]


@pytest.mark.parametrize(
    ("settings", "scores", "kept"),
    [
        ({}, judged(1, 0), True),
        ({}, judged(1, 0.9), False),  # both right, whatever the rewards
        ({}, graded(0.1, 0.1, 0.1), False),  # their computed deviation is 1e-17
        ({}, graded(-3, -3.1), True),
        ({"spread_above": 0.1}, graded(0.4, 0.6), False),  # a population deviation of exactly 0.1 is not above it
        ({"spread_above": 0.1}, graded(0.3, 0.6), True),
        ({"spread_above": 0.9}, judged(1, 0), True),  # a spread is asked of graded rewards only
        ({"selection": "band"}, judged(1, 0, 0, 0, 0), True),
        ({"selection": "band"}, judged(1, *[0] * 5), False),
        ({"selection": "band", "band_low": 0.0}, judged(0, 0), True),
        ({"selection": "band", "band_high": 0.5}, judged(1, 1, 0), False),
        ({"selection": "band", "band_low": 0.5, "band_high": 2.0}, graded(1, 1), True),
        ({"selection": "band"}, graded(1.2, 0.9), False),
        ({}, [Score.failed("raised"), *judged(1, 1)], False),
        ({}, [Score.failed("raised")] * 2, False),
    ],
)
def test_selection(settings: dict[str, Any], scores: list[Score], kept: bool) -> None:
    assert is_selected(group_of(scores), named("dapo", **settings)) is kept


@given(st.lists(st.booleans(), min_size=1, max_size=8))
def test_mixed_is_daposcondition(correct: list[bool]) -> None:
    results = Results(rewards_G=torch.rand(len(correct)), correct_G=torch.tensor(correct))
    assert Mixed()(results) == (0 < sum(correct) < len(correct))
    assert Mixed()(results) == bool(gw.mixed_groups(torch.tensor(correct), torch.zeros(len(correct)).long())[0])
    assert Band(band_low=0.3, band_high=0.6)(results) == (0.3 <= sum(correct) / len(correct) <= 0.6)


# --- allocation -------------------------------------------------------------------------------------------------------


def candidates(ids: Sequence[str], count: int, size: int = 4, seed: int = 0, **history: tuple[float, float]) -> Candidates:
    return Candidates(prompt_ids=ids, count=count, completions=count * size, history=history, seed=seed)


def test_uniform_takes_the_stream_as_it_comes() -> None:
    assert uniform(candidates("abc", 3)) == [(0, 4), (1, 4), (2, 4)]


def test_posterior_by_hand() -> None:
    """MoPPS: a <- lambda a + (1 - lambda) 1 + right. From (1, 1): 3 of 4 right give (4, 2); then 1 of 4 with lambda 1/2 give
    (4/2 + 1/2 + 1, 2/2 + 1/2 + 3) = (3.5, 4.5)."""
    keep, half = Thompson(), Thompson(history_decay=0.5)
    first = keep.remember({}, [("a", 3, 1)])
    assert first == {"a": (4, 2)}
    assert keep.remember(first, [("a", 1, 3), ("b", 0.25, 0.75)]) == {"a": (5, 5), "b": (1.25, 1.75)}
    assert half.remember(first, [("a", 1, 3)]) == {"a": (3.5, 4.5)}
    assert first == {"a": (4, 2)}, "what is passed in is left unchanged"


def test_thompson_sampling_finds_the_prompts_of_the_target_rate() -> None:
    """A hundred prompts of known rates: after ten visits each, those of rate 0.5 are what is chosen."""
    rates = {f"p{i}": i / 99 for i in range(100)}
    part, rng = Thompson(), random.Random(0)
    history: Any = {}
    for prompt, rate in rates.items():
        for _ in range(10):
            right = sum(rng.random() < rate for _ in range(16))
            history = part.remember(history, [(prompt, right, 16 - right)])
    for target in (0.5, 0.2):
        chosen = Counter[str]()
        for seed in range(50):
            given = Candidates(prompt_ids=list(rates), count=8, completions=32, history=history, seed=seed)
            found = Thompson(target_rate=target)(given)
            assert [n for _, n in found] == [4] * 8
            chosen.update(list(rates)[i] for i, _ in found)
        mean = sum(rates[prompt] * times for prompt, times in chosen.items()) / chosen.total()
        assert mean == pytest.approx(target, abs=0.03)
        assert max(abs(rates[prompt] - target) for prompt in chosen) < 0.25


def test_thompson_sampling_is_random_before_it_knows_and_deterministic_given_its_seed() -> None:
    ids = [f"p{i}" for i in range(64)]
    found = [Thompson()(candidates(ids, 4, seed=seed)) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert all(i < j for (i, _), (j, _) in zip(found[0], found[0][1:], strict=False)), "in the order of the stream"


def test_a_prompt_that_comes_twice_is_used_once_unless_there_are_too_few() -> None:
    twice = [*"abcd", *"abcd"]
    for seed in range(20):
        assert len({twice[i] for i, _ in Thompson()(candidates(twice, 4, seed=seed))}) == 4
        found = [i for i, _ in Thompson()(candidates(twice, 6, seed=seed))]
        assert len(set(found)) == 6 and len({twice[i] for i in found}) == 4


def test_a_prompt_that_comes_often_is_no_more_likely() -> None:
    """Eight prompts of the same posterior, far from the target; one is eight of fifteen candidates: chosen 1 in 8 times."""
    ids = [*"a" * 8, *"bcdefgh"]
    history = dict.fromkeys("abcdefgh", (2.0, 8.0))
    found = [ids[i] for seed in range(2000) for i, _ in Thompson()(candidates(ids, 1, seed=seed, **history))]
    assert found.count("a") / 2000 == pytest.approx(1 / 8, abs=0.03)  # four standard deviations


def test_hit_utility_by_hand() -> None:
    """Under the prior n completions are all wrong with probability 1/2 x 2/3 x ... = 1 / (n + 1)."""
    assert [hit_utility(*PRIOR, n) for n in range(4)] == pytest.approx([0, 1 / 2, 2 / 3, 3 / 4])
    assert hit_utility_sizes([PRIOR] * 3, 12, 2) == [4, 4, 4]
    hard, solved, hopeless = (2.0, 16.0), (17.0, 1.0), (1.0, 1000.0)
    sizes = hit_utility_sizes([hard, solved, hopeless], 48, 2)
    assert sizes == [43, 3, 2]  # one more gains the solved prompt 0.0007, the hard one 0.0025, the hopeless one 0.001
    with pytest.raises(ValueError, match="7 completions are too few for 4 groups of at least 2"):
        hit_utility_sizes([PRIOR] * 4, 7, 2)


def test_hit_utility_chooses_among_candidates_where_there_are_more() -> None:
    found = HitUtility(candidates=4.0)(candidates("abcdefgh", 2, a=(9, 1), b=(1, 9)))
    assert len(found) == 2 and sum(n for _, n in found) == 8
    assert [i for i, _ in HitUtility()(candidates("ab", 2, a=(9, 1), b=(1, 9)))] == [0, 1]


# --- through the collector --------------------------------------------------------------------------------------------


class Dice:
    """A task of six prompts with pass rates of their own, and its sampler."""

    name = "dice"

    def __init__(self, rates: Sequence[float], graded: bool = False, scale: float = 1.0) -> None:
        self.rates, self.graded, self.scale = rates, graded, scale
        self.asked: list[int] = []
        self.rng = random.Random(0)

    def problem(self, position: int, seed: int) -> Problem:
        return Problem(id=str(position % len(self.rates)), prompt="1+1=", answer="2")

    async def score(self, problem: Problem, completions: Sequence[Completion]) -> list[Score]:
        hits = [self.rng.random() < self.rates[int(problem.id)] for _ in completions]
        return [Score(reward=self.scale * hit, correct=None if self.graded else hit) for hit in hits]

    async def generate(self, request: Any) -> tuple[Completion, ...]:
        self.asked.append(request.n)
        return group_of(graded(*[0.0] * request.n)).completions


def collector_of(task: Any, tokenizer: Any, algorithm: Any, **settings: Any) -> Collector:
    rollouts = {"group_size": 6, "prompts_per_step": 3, "max_tokens": 8, **settings}
    recipe = Recipe.model_validate({"rollouts": rollouts, "learner": {"minibatches": 1}})
    made = Rollouts(sampler=task, task=task, chat=Chat.build(tokenizer), sampling=sampling_of(recipe.rollouts))
    return Collector(made, recipe, algorithm)


def test_ragged_groups_cost_as_much_as_equal_ones(tokenizer: Any) -> None:
    task = Dice([0.02, 0.98, 0.5, 0.3, 0.9, 0.1])
    collector = collector_of(task, tokenizer, named("grpo", beta=0.0, allocation="hit_utility"))
    for step in range(12):
        collected = collector.collect(step)
        sizes = [len(group.completions) for group in collected.groups]
        assert len(sizes) == 3 and sum(sizes) == 18 and sizes == task.asked[-3:]
        metrics = rollout_metrics(collected, 0)
        assert (metrics["groups/smallest"], metrics["groups/largest"]) == (min(sizes), max(sizes))
    assert max(task.asked) > min(task.asked) and min(task.asked) >= 2
    assert sum(a + b - 2 for a, b in collector.supply.history.values()) == sum(task.asked), "each completion is remembered once"


@pytest.mark.parametrize("allocation", ["thompson", "hit_utility"])
@pytest.mark.parametrize("is_graded", [False, True])
def test_a_resumed_collector_goes_on_as_if_it_had_not_stopped(tokenizer: Any, allocation: str, is_graded: bool) -> None:
    algorithm = named("dapo", allocation=allocation, candidates=2.0)

    def steps(collector: Collector, numbers: range) -> list[list[tuple[str, int]]]:
        return [[(g.problem.id, len(g.completions)) for g in collector.collect(step).seen] for step in numbers]

    rates = [0.02, 0.98, 0.5, 0.3, 0.9, 0.1]
    one = Dice(rates, is_graded)
    whole = collector_of(one, tokenizer, algorithm)
    before, state, dice = steps(whole, range(4)), whole.state_dict(), one.rng.getstate()
    after = steps(whole, range(4, 8))
    two = Dice(rates, is_graded)
    again = collector_of(two, tokenizer, algorithm)
    again.load_state_dict(state)
    two.rng.setstate(dice)
    assert steps(again, range(4, 8)) == after != before


def test_surplus_groups_with_any_values_are_read_again(tokenizer: Any, tmp_path: Path) -> None:
    """Rows of a dataset hold dates, what a reward logs may be numpy's: checkpoints are read without running code."""
    made = datetime.date(2024, 1, 2)

    class Dated(Dice):
        def problem(self, position: int, seed: int) -> Problem:
            found = super().problem(position, seed)
            return replace(found, metadata={"made": made, "n": np.int64(3), "in": [np.float32(0.5), (made, None, True)]})

        async def score(self, problem: Problem, completions: Sequence[Completion]) -> list[Score]:
            return [replace(score, extra={"x": {1, 2}}) for score in await super().score(problem, completions)]

    algorithm = named("dapo", history_decay=0.5, allocation="thompson")
    collector = collector_of(Dated([0.5] * 3), tokenizer, algorithm, max_age=3)
    collector.keep_rate = 0.25
    collector.collect(0)
    assert collector.surplus
    write_state(tmp_path / "state", collector.state_dict())
    again = collector_of(Dated([0.5] * 3), tokenizer, algorithm, max_age=3)
    again.load_state_dict(read_state(tmp_path / "state"))
    (_, ours), (_, theirs) = again.surplus[0], collector.surplus[0]
    assert ours.problem.metadata == {"made": "2024-01-02", "n": 3, "in": [0.5, ("2024-01-02", None, True)]}
    assert ours.scores[0].reward == theirs.scores[0].reward and ours.scores[0].extra == {"x": "{1, 2}"}
    assert torch.equal(ours.completions[0].tokens, theirs.completions[0].tokens)


def test_a_checkpoint_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    learner: Any = SimpleNamespace(save=lambda _: {}, load=lambda _: None)
    more: Any = {"recipe": "", "metrics": Digest(0, "")}
    state = {"step": 1, "credit": {"history": {"p": {"mean": np.float64(0.5), "n": np.int64(2), "rewards_G": torch.ones(2)}}}}
    path = checkpoints.save(tmp_path, 1, learner, state, **more)
    history = checkpoints.load(checkpoints.verify(path, 1), learner)["credit"]["history"]["p"]
    assert (history["mean"], history["n"], history["rewards_G"].tolist()) == (0.5, 2, [1, 1])
    with pytest.raises(UserError, match=r"a part of the algorithm remembers date: datetime.date\(2024, 1, 2\)"):
        checkpoints.save(tmp_path, 2, learner, {"credit": {"history": {"p": datetime.date(2024, 1, 2)}}}, **more)
    assert [directory.name for directory in tmp_path.iterdir()] == ["step-000001"]


def test_an_allocation_refuses_rewards_that_are_no_share_of_a_success(tokenizer: Any) -> None:
    collector = collector_of(Dice([0.5], graded=True, scale=2.0), tokenizer, named("grpo", allocation="thompson"))
    with pytest.raises(RunError, match=r"thompson counts pass rates, or rewards from 0 to 1 .* got 2"):
        collector.collect(0)


class Failing(Dice):
    """Whose first prompt can never be scored."""

    async def score(self, problem: Problem, completions: Sequence[Completion]) -> list[Score]:
        if problem.id == "0":
            return [Score.failed("raised", "a bad row")] * len(completions)
        return await super().score(problem, completions)


def test_dynamic_sampling_ends_although_some_groups_always_fail(tokenizer: Any) -> None:
    """A prompt that cannot be scored among solved ones: the row of failures is broken in each round, and nothing is kept."""
    task = Failing([1.0] * 3)
    collected = collector_of(task, tokenizer, named("dapo"), max_rounds=5).collect(0)
    assert collected.rounds == 5 and not collected.full and not collected.groups
    assert "after 5 rounds" in collected.describe() and "could not be scored" in collected.describe()


def test_groups_that_failed_are_drawn_again_without_dynamic_sampling(tokenizer: Any) -> None:
    collected = collector_of(Failing([0.5] * 3), tokenizer, named("grpo", beta=0.0), max_rounds=1).collect(0)
    assert collected.full and [group.problem.id for group in collected.groups] == ["1", "2", "1"]
    assert [group.problem.id for group in collected.never_trained] == ["0", "0"] and collected.rounds == 3


def test_dynamic_sampling_fills_the_batch_with_graded_rewards(tokenizer: Any) -> None:
    """DAPO on a reward that says nothing about right and wrong: groups whose rewards differ, and none of the others."""
    collected = collector_of(Dice([0.0, 0.5, 1.0], graded=True), tokenizer, named("dapo")).collect(0)
    assert collected.full and {group.problem.id for group in collected.groups} == {"1"}
    narrow = named("dapo", spread_above=0.6)
    collected = collector_of(Dice([0.0, 0.5, 1.0], graded=True), tokenizer, narrow).collect(0)
    unselected = len(collected.dropped["unselected"])
    assert not collected.groups and unselected > 0
    assert "0 groups to train on after 10 rounds" in collected.describe()
    assert f"{unselected} mixed but not selected" in collected.describe()
    metrics = rollout_metrics(replace(collected, groups=collected.seen[:1]), 0)
    dropped = metrics["dropped/unselected"] + metrics["dropped/zero_variance"] + metrics["dropped/surplus"]
    assert dropped == len(collected.seen) and metrics["dropped/unselected"] == unselected


def test_metrics_leave_out_what_could_not_be_scored(tokenizer: Any) -> None:
    """Of five groups two failed; the others are mixed, all correct and all wrong."""
    scores = [judged(1, 0), judged(1, 1), judged(0, 0), *[[Score.failed("raised")] * 2] * 2]
    groups = [group_of(of_group, f"p{i}") for i, of_group in enumerate(scores)]
    dropped = {"all_correct": groups[1:2], "all_wrong": groups[2:3], "failed": groups[3:]}
    collected = Collected(groups=groups[:1], seen=groups, dropped=dropped, rounds=1, frontier=Frontier(begun=5))
    metrics = rollout_metrics(collected, 0)
    shares = ("mixed", "all_correct", "all_wrong", "zero_variance", "failed")
    assert [metrics[f"groups/{name}"] for name in shares] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 2 / 3, 2 / 5])
    counts = {"zero_variance": 2, "failed": 2, "surplus": 0, "unselected": 0}
    assert {name: metrics[f"dropped/{name}"] for name in counts} == counts
    nothing = rollout_metrics(replace(collected, seen=groups[3:], dropped={"failed": groups[3:]}), 0)
    assert (nothing["groups/failed"], nothing["groups/zero_variance"], nothing["groups/mixed"]) == (1, 0, 0)

    half = group_of([*judged(1, 0), *[Score.failed("raised")] * 2])
    batch = make_batch([half], named("rloo"))
    advantages_BT = torch.tensor([1.0, -1.0, 0.0, 0.0])[:, None].expand(batch.mask_BT.shape)
    found = advantage_metrics(advantages_BT, batch.mask_BT, [half])
    assert found == {"utilisation": 1, "utilisation/effective": 1, "dropped/filtered": 0}


def test_pass_at_k_has_no_value_where_no_problem_has_k_scores(tokenizer: Any) -> None:
    class Flaky(Dice):
        async def score(self, problem: Problem, completions: Sequence[Completion]) -> list[Score]:
            return [Score.failed("timeout"), *judged(*[1.0] * (len(completions) - 1))]

    task = Flaky([1.0] * 3)
    rollouts = Rollouts(sampler=task, task=task, chat=Chat.build(tokenizer), sampling=Sampling(max_tokens=8))
    evaluation = evaluate(rollouts, [task.problem(i, 0) for i in range(3)], samples=4, seed=0)
    assert {key: value for key, value in evaluation.metrics.items() if "@" in key} == {"eval/pass@1": 1, "eval/pass@2": 1}


def test_a_band_keeps_the_prompts_within_it(tokenizer: Any) -> None:
    algorithm = named("dapo", selection="band", band_low=0.3, band_high=0.7)
    collected = collector_of(Dice([0.02, 0.5, 0.97]), tokenizer, algorithm).collect(0)
    assert collected.full and all(2 <= group.correct_count <= 4 for group in collected.groups)


# --- ragged groups from the requests to the gradient ---------------------------------------------------------------------


def test_requests_of_different_sizes_draw_their_own_random_numbers(tokenizer: Any) -> None:
    """The second prompt's completions do not depend on how the first prompt's are grouped, only on how many there are."""
    sampler = NativeSampler(owned(tiny_model("llama", tokenizer)), tokenizer)
    prompt, other = (torch.tensor(tokenizer(text).input_ids) for text in ("1+2=", "7*3-1="))
    sampling = Sampling(max_tokens=5)
    ragged = requests([prompt, other], [5, 3], sampling, 0)
    assert [(r.n, r.offset) for r in ragged] == [(5, 0), (3, 25)]
    assert [(r.n, r.offset) for r in requests([prompt, other], 4, sampling, 0)] == [(4, 0), (4, 20)]
    found = generate_all(sampler, ragged)
    assert [len(group) for group in found] == [5, 3]
    alone = generate_all(sampler, requests([prompt, prompt, other], [2, 3, 3], sampling, 0))
    assert [c.text for c in alone[2]] == [c.text for c in found[1]]
    with pytest.raises(ValueError, match="shorter"):
        requests([prompt, other], [5], sampling, 0)


@pytest.mark.parametrize("name", ["grpo", "rloo", "dcpo", "lite_ppo", "maxrl", "gdpo", "reinforce", "reinforce_pp"])
def test_every_estimator_takes_ragged_groups_one_by_one(name: str) -> None:
    """What a group gets does not depend on the sizes of the others, up to a scale common to the batch."""
    rng = random.Random(3)
    groups = [group_of(judged(*(float(rng.random() < 0.5) for _ in range(size))), f"p{size}") for size in (1, 2, 5, 9, 16)]
    algorithm = named(name, **({"kl_reward": 0.0} if name == "reinforce_pp" else {}))
    together = advantages_of(groups, algorithm)
    sizes = [len(group.completions) for group in groups]
    for group, ours in zip(groups, together.split(sizes), strict=True):
        alone = advantages_of([group], algorithm)
        if name == "reinforce_pp":  # compared with the batch by design: all right answers alike, whatever their group
            rewards = torch.tensor([score.reward for score in group.scores])
            assert all(len(ours[rewards == value].unique()) <= 1 for value in (0.0, 1.0))
            continue
        if alone.abs().sum() == 0:
            assert (ours == 0).all()
            continue
        near(ours / ours.norm(), alone / alone.norm(), 1e-5)
        if name not in ("lite_ppo", "gdpo"):
            near(ours, alone, 1e-5)


def test_minibatches_of_ragged_groups_hold_whole_groups_each_once() -> None:
    groups = [group_of(judged(*[1.0] * (size - 1), 0.0), f"p{size}") for size in (2, 3, 5, 7)]
    algorithm = named("rloo")
    batch = make_batch(groups, algorithm)
    zeros = torch.zeros(batch.tokens_BT.shape)
    training = upgrade(TrainingBatch, upgrade(LogprobBatch, batch, old_logprobs_BT=zeros), advantages_BT=zeros)
    for count in (2, 4):
        parts = list(minibatches(training, count, seed=1))
        assert sorted(row for part in parts for row in part.rows_B.tolist()) == list(range(17))
        for part in parts:
            counted = Counter(part.group_ids_B.tolist())
            whole = {tuple(batch.group_ids_B.tolist()).count(g) for g in range(4)}
            assert set(counted.values()) <= whole and len(part.prompts) == len(counted)


def test_a_users_own_selection_and_allocation(tokenizer: Any) -> None:
    """They are parts as the others: a function, called with `Results` and with `Candidates`."""

    def last_first(given: Candidates) -> list[tuple[int, int]]:
        return [(i, given.completions // given.count) for i in reversed(range(given.count))]

    algorithm = named("dapo", selection=lambda results: results.rate > 0.5, allocation=last_first)
    assert is_selected(group_of(judged(1, 1)), algorithm) and not is_selected(group_of(judged(1, 0)), algorithm)
    try_parts(algorithm, 6)
    collected = collector_of(Dice([1.0] * 3), tokenizer, algorithm).collect(0)
    assert [group.problem.id for group in collected.groups] == ["2", "1", "0"]


WRONG_ALLOCATIONS: dict[str, tuple[Any, str]] = {
    "fewer prompts": (lambda given: [(0, given.completions)], r"gave \d+ completions to 1 prompts, and not \d+ to \d"),
    "too much": (lambda given: [(i, 7) for i in range(given.count)], r"gave \d+ completions to \d prompts, and not"),
    "an empty group": (
        lambda given: [(0, 0), (1, given.completions), *((i, 0) for i in range(2, given.count))],
        "gave 0 completions to the candidate 0, and a group has at least 1",
    ),
    "beyond the candidates": (
        lambda given: [(i - 1, given.completions // given.count) for i in range(given.count)],
        r"chose the candidate -1, and there are \d",
    ),
    "indices alone": (lambda given: list(range(given.count)), r"gave \[0, 1.*\], and not a list of"),
    "nothing": (lambda _: None, "gave None, and not a list of"),
}


@pytest.mark.parametrize("name", WRONG_ALLOCATIONS)
def test_a_users_own_allocation_that_cannot_be_used_is_refused(tokenizer: Any, name: str) -> None:
    """When it is tried before training, and when it is asked in training."""
    allocation, message = WRONG_ALLOCATIONS[name]
    algorithm = named("dapo", allocation=allocation)
    with pytest.raises(UserError, match=f"trying allocation .*: the allocation {message}"):
        try_parts(algorithm, 4)
    with pytest.raises(RunError, match=f"the allocation .*{message}"):
        collector_of(Dice([0.5]), tokenizer, algorithm).collect(0)


def test_parts_are_tried_only_where_they_are_the_users_own() -> None:
    """A built-in allocation with groups of at least 4 is not run on the trial's two rows, nor a built-in estimator."""

    def surrogate(terms: Any) -> Any:
        return -terms.log_ratio_BT.exp() * terms.advantages_BT, torch.zeros_like(terms.mask_BT)

    try_parts(named("grpo", surrogate=surrogate, bounds="none", allocation="hit_utility", smallest_group=4), 8)

    def large(given: Candidates) -> list[tuple[int, int]]:
        assert given.completions >= 8 * given.count
        return uniform(given)

    try_parts(named("grpo", allocation=large), 8)
    with pytest.raises(UserError, match=r"trying surrogate .*: ZeroDivisionError"):
        try_parts(named("grpo", surrogate=lambda _: 1 / 0, bounds="none"), 8)


def test_an_estimator_says_what_it_misses() -> None:
    outcomes = Outcomes(
        rewards_B=doubles([1, 0]), group_ids_B=torch.tensor([0, 0]), prompt_ids=["a", "a"], mask_BT=torch.ones(2, 1).bool()
    )
    with pytest.raises(ValueError, match="need the components of the rewards"):
        named("gdpo").advantage(outcomes)
