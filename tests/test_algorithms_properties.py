"""What must hold of the algorithms: numbers worked out by hand, identities between them, splits, extreme input."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import groupwise as gw
from groupwise.algorithms import NAMED, theory
from tests.test_algorithms_reference import Case, case

SEEDS = st.integers(0, 10**6)
CLIPPED = [
    "ppo",
    "grpo",
    "dapo",
    "gspo",
    "gspo_token",
    "dcpo",
    "gmpo",
    "sapo",
    "dppo",
    "cispo",
    "reinforce_pp",
    "lite_ppo",
    "dr_grpo",
    "maxrl",
    "vespo",
    "gdpo",
]


def loss_and_gradient(
    algorithm: gw.Algorithm, c: Case, advantages: Tensor, **changes: Any
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    logprobs = changes.pop("logprobs", c.logprobs).clone().requires_grad_()
    mask = changes.pop("mask", c.mask_BT)
    loss, metrics = gw.policy_loss(
        algorithm,
        logprobs,
        changes.pop("old", c.old),
        advantages,
        mask,
        group_ids_B=c.ids_B,
        ref_logprobs_BT=c.ref,
        rollout_logprobs_BT=c.rollout,
        **changes,
    )
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0], metrics


def _double(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def near(a: Any, b: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(_double(a), _double(b), rtol=tolerance, atol=tolerance)


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q", "low", "high"),
    [(0.9, 0.769, 1.187), (0.64, 0.5, 1.25), (0.5, 0.5, 1.306), (0.1, 0.5, 2.0), (0.01, 0.5, 5.0), (1.0, 0.8, 1.171)],
)
def test_dcpo_bounds_by_hand(q: float, low: float, high: float) -> None:
    """q = 0.1: 1/2 + 1/2 sqrt(1 + 0.8/0.1) = 1/2 + 3/2 = 2; q = 1: 1/2 + 1/2 sqrt(1 - 0.64) = 0.8."""
    lower, upper = gw.dynamic_bounds(torch.tensor([[q]], dtype=torch.float64).log(), 0.16, 0.2)
    assert round(float(lower), 3) == low
    assert round(float(upper), 3) == high


def test_dcpo_upper_bound_is_capped() -> None:
    """q = 1e-4 alone would give 1/2 + 1/2 sqrt(8001) = 45.2."""
    assert float(gw.dynamic_bounds(torch.tensor([[1e-4]]).log(), 0.16, 0.2)[1]) == 10


def test_closed_forms_by_hand() -> None:
    assert round(theory.steps_to_reach(0.01, 0.1, 0.20), 2) == 12.63
    assert round(theory.steps_to_reach(0.01, 0.1, 0.28), 2) == 9.33
    assert round(theory.steps_to_reach(0.01, 1.0, 0.20), 1) == 25.3
    assert round(theory.steps_to_reach(0.01, 1.0, 0.28), 1) == 18.7
    assert theory.probability_after(0.01, 50, 0.2) == 1
    assert round(theory.log10_product_bound(0.2, 1024), 2) == 81.08
    assert round(theory.upper_clip_is_inert_above(0.2), 3) == 0.833
    assert round(theory.upper_clip_is_inert_above(0.28), 3) == 0.781
    assert round(10 ** theory.log10_product_bound(4e-4, 1024), 2) == 1.51
    assert [round((1.28 / 1.2) ** n, 1 if n < 100 else 0) for n in (20, 50, 100)] == [3.6, 25.2, 635]
    assert theory.dead_group_probability(0.5, 2) == 0.5


def test_grpo_advantages_by_hand() -> None:
    """Rewards 1 0 0 0: mean 1/4, Bessel's deviation 1/2, so 3/2 and -1/2."""
    advantages = gw.group_advantages(torch.tensor([1.0, 0, 0, 0]).double(), torch.zeros(4).long(), eps=0.0)
    near(advantages, [1.5, -0.5, -0.5, -0.5])


def test_process_advantages_by_hand() -> None:
    """Steps 1 0 | 1 1: mean 3/4, deviation 1/2; normalised 1/2, -3/2 | 1/2, 1/2."""
    ours = gw.process_advantages([[1, 0], [1, 1]], [[1, 3], [0, 2]], [7, 7], 4, eps=0.0)
    near(ours, [[-1.0, -1.0, -1.5, -1.5], [1.0, 0.5, 0.5, 0.0]])


def test_turn_advantages_by_hand() -> None:
    """Turns 1 0 | 0 1 | 0 with gamma 1/2: to go 1, 0 | 1/2, 1 | 0. Baselines 1/2 and 1/2; centred 1/2, -1/2 | 0, 1/2 | -1/2.

    Four squares of 1/4 over 5 values and 2 baselines: s^2 = 1/3. Over the tokens 0-1, 2 | 0, 1-3 | 0-2.
    """
    ours = gw.turn_advantages([[1, 0], [0, 1], [0]], [[1, 2], [0, 3], [2]], [7, 7, 7], 4, gamma=0.5, eps=0.0)
    a = 0.5 * 3**0.5
    near(ours, [[a, a, -a, 0.0], [0.0, a, a, a], [-a, -a, -a, 0.0]])


def test_credit_of_one_turn_each_is_that_of_outcomes() -> None:
    rewards = torch.tensor([1.0, 0, 0.5, 2, 2]).double()
    ids = torch.tensor([0, 0, 0, 1, 1])
    ours = gw.turn_advantages([[r] for r in rewards.tolist()], [[1]] * 5, ids, 2)
    near(ours, gw.group_advantages(rewards, ids)[:, None].expand(5, 2))


def test_turns_need_ends_that_fit() -> None:
    for rewards, ends in (([1.0], [2]), ([1.0, 1.0], [1]), ([1.0, 1.0], [1, 1])):
        with pytest.raises(ValueError, match="do not fit"):
            gw.turn_advantages([rewards], [ends], [0], 2)


def test_smoothing_by_hand() -> None:
    """First 1 1 0 0, then 1 0 0 0. A_new of the one = 3/4 / (sqrt(3)/4) = 1.7321; totals 3 of 8: (5/8) / (sqrt(15)/8) = 1.2910.

    S_new = (1.7321 + 1.2910) / 2 = S_total on the second visit, so a tie: 1.5115.
    """
    ids, prompts = torch.zeros(4).long(), ["p"] * 4
    first, history = gw.smoothed_advantages(torch.tensor([1.0, 1, 0, 0]), ids, prompts, {})
    assert first.tolist() == [1, 1, -1, -1]
    second, history = gw.smoothed_advantages(torch.tensor([1.0, 0, 0, 0]).double(), ids, prompts, history)
    near(second[0], (3**0.5 + 5 / 15**0.5) / 2)
    assert history == {"p": {"visits": 2, "count": 8, "mean": 0.375, "variance": pytest.approx(15 / 64)}}


def test_soft_overlong_by_hand() -> None:
    """The cap is the generation cap: 20480 with a cache of 4096 gives 0 at 16384, -1/2 at 18432, -1 at 20480."""
    lengths = torch.tensor([1, 16384, 18432, 20480, 30000])
    assert gw.soft_overlong_penalty(lengths, 20480, 4096).tolist() == [0, 0, -0.5, -1, -1]


def test_adaptive_coefficient() -> None:
    assert [gw.adaptive_coefficient(1.0, kl, 0.1) for kl in (0.16, 0.15, 0.1, 0.067, 0.066)] == [2, 1, 1, 1, 0.5]


def test_approx_kl_estimates_the_kl_from_old_to_new() -> None:
    """Samples of old (0.7, 0.3) against new (0.4, 0.6): KL = 0.7 ln(0.7/0.4) + 0.3 ln(0.3/0.6), the mean over old's draws."""
    old, new = torch.tensor([[0.7, 0.3], [0.4, 0.6]], dtype=torch.float64).log()
    draws = torch.tensor([0] * 7 + [1] * 3)
    _, metrics = gw.policy_loss(
        gw.named("dapo"), new[draws][:, None], old[draws][:, None], torch.ones(10), torch.ones(10, 1).bool()
    )
    near(metrics["approx_kl"], 0.7 * math.log(0.7 / 0.4) + 0.3 * math.log(0.3 / 0.6))


def test_clip_metrics_by_hand() -> None:
    """Four tokens, A = 1, 1, -1, -1 with ratios 1.3, 0.5, 1.3, 0.5: only the first and the last lose their gradient."""
    logprobs = torch.tensor([[1.3], [0.5], [1.3], [0.5]]).log()
    advantages = torch.tensor([1.0, 1, -1, -1])
    _, metrics = gw.policy_loss(gw.named("dapo"), logprobs, torch.zeros(4, 1), advantages, torch.ones(4, 1).bool())
    assert metrics["clip_fraction"] == 0.5
    assert metrics["clip_fraction_low"] == 0.25
    assert metrics["clip_fraction_high"] == 0.25
    near(metrics["ratio_mean"], 0.9, 1e-6)
    near(metrics["ratio_max"], 1.3, 1e-6)


# --- identities -------------------------------------------------------------------------------------------------------


@given(SEEDS)
def test_grpo_without_std_is_a_fraction_of_leave_one_out(seed: int) -> None:
    c = case(seed)
    rewards = torch.tensor(c.rewards, dtype=torch.float64)
    sizes = torch.tensor([c.ids.count(i) for i in c.ids], dtype=torch.float64)
    grpo = gw.group_advantages(rewards, c.ids_B, scale="none")
    near(grpo, (sizes - 1) / sizes * gw.leave_one_out_advantages(rewards, c.ids_B))


@given(SEEDS)
def test_gspo_token_is_gspo_when_a_row_has_one_advantage(seed: int) -> None:
    c = case(seed)
    gspo = loss_and_gradient(gw.named("gspo"), c, c.advantages[:, 0])
    token = loss_and_gradient(gw.named("gspo_token"), c, c.advantages[:, 0])
    near(gspo[0], token[0])
    near(gspo[1], token[1])
    near(gspo[2]["clip_fraction"], token[2]["clip_fraction"])


@given(SEEDS, st.sampled_from(CLIPPED))
def test_at_ratio_one_every_loss_is_the_plain_policy_gradient(seed: int, name: str) -> None:
    c = case(seed)
    algorithm = gw.named(name, beta=0.0)
    _, gradient, metrics = loss_and_gradient(algorithm, c, c.advantages[:, 0], logprobs=c.old)
    weights = gw.token_weights(c.mask_BT, algorithm.aggregation, group_ids_B=c.ids_B)
    near(gradient, -weights * c.advantages)
    assert metrics["clip_fraction"] == 0
    near(metrics["ratio_max"], 1)


@given(SEEDS)
def test_dcpos_first_visit_is_plain_standardisation(seed: int) -> None:
    c = case(seed)
    rewards = torch.tensor(c.rewards, dtype=torch.float64)
    smoothed, _ = gw.smoothed_advantages(rewards, c.ids_B, [str(i) for i in c.ids], {})
    near(smoothed, gw.group_advantages(rewards, c.ids_B, ddof=0, eps=0.0))


@given(SEEDS)
def test_dapo_is_grpo_when_lengths_are_equal_and_bounds_symmetric(seed: int) -> None:
    c = case(seed)
    mask = torch.ones_like(c.mask_BT)
    dapo = loss_and_gradient(gw.named("dapo", clip_high=0.2), c, c.advantages[:, 0], mask=mask)
    grpo = loss_and_gradient(gw.named("grpo", beta=0.0), c, c.advantages[:, 0], mask=mask)
    near(dapo[0], grpo[0])
    near(dapo[1], grpo[1])


@given(SEEDS, st.sampled_from(sorted(NAMED)))
def test_a_fully_masked_row_changes_nothing(seed: int, name: str) -> None:
    c = case(seed)
    before = loss_and_gradient(gw.named(name), c, c.advantages[:, 0])
    nan = torch.full((1, c.length), math.nan, dtype=torch.float64)

    def longer(values: Tensor) -> Tensor:
        return torch.cat([values, nan])

    logprobs = longer(c.logprobs).requires_grad_()
    loss, metrics = gw.policy_loss(
        gw.named(name),
        logprobs,
        longer(c.old),
        torch.cat([c.advantages[:, 0], torch.ones(1)]),
        torch.cat([c.mask_BT, torch.zeros(1, c.length).bool()]),
        ref_logprobs_BT=longer(c.ref),
    )
    near(loss.detach(), before[0])
    (gradient,) = torch.autograd.grad(loss, logprobs)
    near(gradient[:-1], before[1])
    assert (gradient[-1] == 0).all()
    for key, value in before[2].items():
        near(metrics[key], value)


@given(SEEDS, st.sampled_from(sorted(NAMED)), st.integers(0, 100))
@settings(max_examples=400)
def test_gradient_does_not_depend_on_the_split(seed: int, name: str, order: int) -> None:
    """Weights fixed for the whole, then rows cut into micro-batches in any order: the same sum to 1e-10."""
    c = case(seed)
    algorithm = gw.named(name)
    whole = loss_and_gradient(algorithm, c, c.advantages[:, 0])
    weights = gw.token_weights(c.mask_BT, algorithm.aggregation, group_ids_B=c.ids_B)
    logprobs = c.logprobs.clone().requires_grad_()
    rows = torch.randperm(len(c.ids), generator=torch.Generator().manual_seed(order))
    total = torch.zeros((), dtype=torch.float64)
    for part in rows.split(1 + order % 3):
        loss, _ = gw.policy_loss(
            algorithm,
            logprobs[part],
            c.old[part],
            c.advantages[part, 0],
            c.mask_BT[part],
            ref_logprobs_BT=c.ref[part],
            weights_BT=weights[part],
        )
        loss.backward()
        total += loss.detach()
    near(total, whole[0])
    near(logprobs.grad, whole[1])


@given(SEEDS, st.sampled_from(sorted(NAMED)))
def test_zero_advantage_moves_nothing_without_a_kl(seed: int, name: str) -> None:
    c = case(seed)
    _, gradient, metrics = loss_and_gradient(gw.named(name, beta=0.0), c, torch.zeros(len(c.ids)))
    assert (gradient == 0).all()
    assert metrics["clip_fraction"] == 0


def test_large_groups_approach_reward_minus_expected_reward() -> None:
    """Without the std, A -> r - E[r]; the error of the mean is within 5 standard errors, for a seeded simulation."""
    for size in (16, 256, 65536):
        rewards = (torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(size)) < 0.3).double()
        advantages = gw.group_advantages(rewards, torch.zeros(size).long(), scale="none")
        assert float((advantages - (rewards - 0.3)).abs().max()) <= 5 * (0.3 * 0.7 / size) ** 0.5


def test_k3_is_exact_for_small_differences_and_keeps_its_sign_for_large_ones() -> None:
    """In float32 against the series d^2/2 + d^3/6 + ..., where e^d - d - 1 cancels; and its gradient is -(e^d - 1)."""
    for d in (1e-6, -1e-4, 1e-3, 0.019, 0.021, -0.5, 3.0, 19.0):
        logprobs = torch.tensor([[0.0]]).requires_grad_()
        value = gw.k3(logprobs, torch.tensor([[d]]))
        exact = sum(d**n / math.factorial(n) for n in range(2, 80))
        assert float(value) == pytest.approx(exact, rel=3e-6)
        assert float(torch.autograd.grad(value.sum(), logprobs)[0]) == pytest.approx(
            -math.expm1(float(torch.tensor(d))), rel=1e-5
        )
    far = torch.tensor([[-45.0, -200.0, -21.0]]).requires_grad_()
    values = gw.k3(far, torch.zeros(1, 3))
    (gradient,) = torch.autograd.grad(values.sum(), far)
    assert values.isfinite().all() and (values > 0).all() and (gradient < 0).all()
    assert float(gradient[0, 0]) == float(gradient[0, 1]), "the tangent has one slope"


# --- extreme input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(NAMED))
@pytest.mark.parametrize("shift", [-100.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_a_hundred_stay_finite(name: str, shift: float, dtype: torch.dtype) -> None:
    old = torch.full((2, 3), -101.0, dtype=dtype) if shift > 0 else torch.full((2, 3), -1.0, dtype=dtype)
    logprobs = (old + shift).requires_grad_()
    for advantages in (torch.tensor([1.0, -1.0]), torch.tensor([0.0, 0.0])):
        loss, metrics = gw.policy_loss(gw.named(name), logprobs, old, advantages, torch.ones(2, 3).bool(), ref_logprobs_BT=old)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("name", sorted(NAMED))
def test_probabilities_near_zero_and_batches_of_nothing(name: str) -> None:
    tiny = torch.full((1, 1), -300.0)
    loss, _ = gw.policy_loss(gw.named(name), tiny, tiny, torch.ones(1), torch.ones(1, 1).bool(), ref_logprobs_BT=tiny)
    assert loss.isfinite()
    nothing = torch.zeros(2, 3).bool()
    loss, metrics = gw.policy_loss(
        gw.named(name), torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2), nothing, ref_logprobs_BT=torch.zeros(2, 3)
    )
    assert loss == 0
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("value", [-math.inf, math.nan, math.inf])
def test_a_log_probability_that_is_not_finite_is_an_error_not_a_nan(value: float) -> None:
    good, bad = torch.zeros(1, 2), torch.tensor([[0.0, value]])
    mask = torch.ones(1, 2).bool()
    for logprobs, old, name in ((bad, good, "logprobs_BT"), (good, bad, "old_logprobs_BT")):
        with pytest.raises(ValueError, match=f"^{name} holds a value that is not finite"):
            gw.policy_loss(gw.named("dapo"), logprobs, old, torch.ones(1), mask)
    loss, _ = gw.policy_loss(gw.named("dapo"), bad, bad, torch.ones(1), torch.tensor([[True, False]]))
    assert loss.isfinite()


def test_groups_of_one_and_equal_rewards_give_exact_zeros() -> None:
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.7], dtype=torch.float32)
    ids = torch.tensor([5, 5, 5, 9])
    for scale in ("group", "none", "mean"):
        assert gw.group_advantages(rewards, ids, scale=scale).tolist() == [0, 0, 0, 0]
    assert gw.leave_one_out_advantages(rewards, ids).tolist() == [0, 0, 0, 0]
    assert gw.process_advantages([[0.1, 0.1], [0.1]], [[0, 1], [2]], [1, 1], 3).abs().sum() == 0
    assert gw.turn_advantages([[0.1, 0.1], [0.1, 0.1], [1.0]], [[0, 1], [0, 2], [0]], [1, 1, 2], 3).abs().sum() == 0
    history: Any = {}
    for _ in range(3):
        smoothed, history = gw.smoothed_advantages(rewards, ids, ["p"] * 3 + ["q"], history)
        assert smoothed.tolist() == [0, 0, 0, 0]


# --- composition ------------------------------------------------------------------------------------------------------


def test_a_mix_of_three_papers() -> None:
    mix = gw.named("gspo", dynamic_sampling=True, advantage="smoothed", aggregation="token_mean")
    c = case(1)
    _, gradient, _ = loss_and_gradient(mix, c, c.advantages[:, 0], logprobs=c.old)
    near(gradient, -c.advantages * c.mask_BT / c.mask_BT.sum())
    assert mix.needs == {"history"}


def test_a_users_own_part() -> None:
    def squared(terms: gw.Terms) -> tuple[Tensor, Tensor]:
        return (terms.log_ratio_BT - terms.advantages_BT) ** 2, torch.zeros_like(terms.mask_BT)

    c = case(2)
    loss, _, _ = loss_and_gradient(gw.named("custom", surrogate=squared, aggregation="token_mean"), c, c.advantages[:, 0])
    near(loss, ((c.logprobs - c.old - c.advantages) ** 2)[c.mask_BT].mean())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dapo", {"clip_hihg": 0.3}, "clip_hihg: no algorithm has this setting; did you mean 'clip_high'"),
        ("gspo", {"advantage": "process"}, "ratio: one ratio for the sequence cannot carry"),
        ("gspo", {"advantage": "gae"}, "ratio: one ratio for the sequence cannot carry"),
        ("gspo", {"bounds": "dynamic"}, "bounds: dynamic bounds follow from a token's own probability"),
        ("grpo", {"surrogate": "gmpo", "ratio": "sequence"}, "surrogate: gmpo takes its own mean or product"),
        ("grpo", {"scale": "mean", "center": "none"}, "scale: dividing by the group's mean"),
        ("grpo", {"surrogate": "cispo"}, "ratio_cap: the surrogate cispo needs one"),
        ("grpo", {"kl_target": 0.1}, "kl_target: needs kl_reward"),
        ("grpo", {"overlong_in_baseline": True}, "overlong_in_baseline: only a filtered completion"),
        ("grpo", {"beta": -1.0}, "beta: -1.0 is not a number of at least 0"),
        ("grpo", {"clip_high": math.nan}, "clip_high: nan is not a number"),
        ("grpo", {"center": "x"}, "center: 'x' is not one of"),
        ("sapo", {"gate_positive": 0.0}, "gate_positive: must be above 0"),
        ("sapo", {"dual_clip": 3.0}, "dual_clip: surrogate = 'sapo' does not use it; it belongs to surrogate clip"),
        ("dppo", {"ratio_cap": 3.0}, "ratio_cap: bounds = 'none' and surrogate = 'dppo' does not use it"),
        ("sapo", {"ratio_cap": 3.0}, "ratio_cap: .* does not use it"),
        ("reinforce", {"ratio_cap": 3.0}, "ratio_cap: .* does not use it"),
        ("reinforce", {"clip_high": 0.3}, "clip_high: .* does not use it; it belongs to bounds fixed, exponential, dynamic"),
        ("sapo", {"bounds": "fixed"}, "bounds: the surrogate sapo clips nothing to bounds"),
        ("dapo", {"correction": "tis", "correction_low": 0.1}, "correction_low: correction = 'tis' does not use it"),
        ("dapo", {"correction_high": 3.0}, "correction_high: correction = 'none' does not use it"),
        ("grpo_process", {"scale": "none"}, "scale: advantage = 'process' does not use it; it belongs to advantage group"),
        ("rloo", {"center": "none"}, "center: advantage = 'leave_one_out' does not use it"),
        ("dcpo", {"scale": "none"}, "scale: advantage = 'smoothed' does not use it"),
        ("ppo", {"center": "batch"}, "center: advantage = 'gae' does not use it"),
        ("rloo", {"ratio": "sequence"}, "ratio: the surrogate policy_gradient uses no ratio"),
        ("dapo", {"kl_ratio_weighted": True}, "kl_ratio_weighted: weighs the KL in the loss, so it needs beta"),
        ("dapo", {"kl": "k1"}, "kl: is the estimate of the KL in the loss, so it needs beta"),
        ("dr_grpo", {"ddof": 0}, "ddof: is of a standard deviation, and scale = 'none' has none"),
        ("grpo", {"beta": "x"}, "beta: 'x' is not a number"),
        ("grpo", {"clip_low": "a"}, "clip_low: 'a' is not a number"),
        ("dapo", {"outcome_rewards": (1.0,)}, "outcome_rewards: expected three numbers"),
        ("grpo", {"gamma": 0.9}, "gamma: advantage = 'group' does not use it; it belongs to advantage turns, gae"),
        ("gmpo", {"advantage": "process"}, "ratio: one ratio for the sequence cannot carry"),
        ("dapo", {"advantage": "process"}, "overlong_cache: changes the reward of a completion"),
        ("grpo", {"correction": "icepop", "correction_low": 3.0}, "correction_low: is above correction_high"),
        ("vespo", {"ratio": "sequence"}, "surrogate: vespo takes its own mean or product"),
        ("vespo", {"advantage": "process"}, "ratio: one ratio for the sequence cannot carry"),
        ("vespo", {"decay_negative": 0.0}, "decay_negative: must be above 0"),
        ("vespo", {"bounds": "fixed"}, "bounds: the surrogate vespo clips nothing to bounds"),
        ("grpo", {"power_positive": 1.0}, "power_positive: surrogate = 'clip' does not use it; it belongs to surrogate vespo"),
        ("gdpo", {"kl_reward": 0.1}, "kl_reward: takes from the reward as a whole"),
        ("gdpo", {"ddof": 2}, "ddof: 2 is not one of"),
        ("grpo", {"mask": "off_policy"}, "mask_divergence: the mask off_policy needs one"),
        ("grpo", {"mask_divergence": 0.1}, "mask_divergence: mask = 'none' does not use it; it belongs to mask off_policy"),
        ("grpo", {"selection": "band"}, "selection: is how dynamic sampling chooses groups; set dynamic_sampling"),
        ("grpo", {"spread_above": 0.1}, "selection: is how dynamic sampling chooses groups; set dynamic_sampling"),
        ("dapo", {"selection": "band", "band_low": 0.9}, "band_low: is above band_high"),
        ("dapo", {"band_low": 0.1}, "band_low: selection = 'mixed' does not use it; it belongs to selection band"),
        ("grpo", {"allocation": "thompson", "target_rate": 1.5}, "target_rate: must lie in 0 to 1"),
        ("grpo", {"allocation": "thompson", "candidates": 0.5}, "candidates: must be at least 1"),
        ("grpo", {"allocation": "hit_utility", "target_rate": 0.6}, "target_rate: chooses among candidates"),
        ("grpo", {"allocation": "hit_utility", "smallest_group": 0}, "smallest_group: must be at least 1"),
        ("grpo", {"target_rate": 0.5}, "target_rate: allocation = 'uniform' does not use it"),
        ("grpo", {"allocation": "mopps"}, "allocation: there is no 'mopps'"),
        ("grpo", {"dual_clip": 0.5}, "dual_clip: must be above 1"),
        ("grpo", {"aggregation": "tokens_mean"}, "aggregation: there is no 'tokens_mean'; did you mean 'token_mean'"),
    ],
)
def test_a_mix_without_meaning_is_refused_with_the_reason(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gw.named(name, **changes)


def test_what_is_missing_is_named() -> None:
    one, mask = torch.zeros(1, 1), torch.ones(1, 1).bool()
    for changes, message in (
        ({"beta": 0.1}, "beta above 0 needs ref_logprobs_BT"),
        ({"correction": "tis"}, "an importance-sampling correction needs rollout_logprobs_BT"),
        ({"mask": "off_policy", "mask_divergence": 0.1}, "the mask off_policy needs rollout_logprobs_BT"),
        ({"entropy_bonus": 0.1}, "an entropy bonus needs entropy_BT"),
        ({"aggregation": "prompt_token_mean"}, "prompt_token_mean needs group_ids_B"),
    ):
        with pytest.raises(ValueError, match=message):
            gw.policy_loss(gw.named("dapo", **changes), one, one, torch.ones(1), mask)
    with pytest.raises(ValueError, match="must be bool"):
        gw.policy_loss(gw.named("dapo"), one, one, torch.ones(1), torch.ones(1, 1))
    with pytest.raises(ValueError, match="there is no algorithm 'dapoo'; did you mean 'dapo'"):
        gw.named("dapoo")
