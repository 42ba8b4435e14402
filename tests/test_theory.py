"""The closed forms of `theory`, which the explorer draws, beside the parts that train, over random inputs in float64."""

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import groupwise as gw
from groupwise.algorithms import PARTS, theory
from groupwise.algorithms.algorithm import Algorithm
from groupwise.algorithms.credit import Outcomes
from groupwise.algorithms.named import part_settings
from groupwise.algorithms.surrogates import Terms
from groupwise.evidence.javascript import to_javascript
from groupwise.rollouts import drawing
from groupwise.rollouts.base import Sampling

TRIALS = 200
ESTIMATORS = ("grpo", "dr_grpo", "maxrl", "lite_ppo", "rloo", "dcpo", "gdpo", "reinforce_pp")
REWARDS: list[list[float]] = [[0.0, 1.0], [-1.0, 0.0, 1.0], [0.1 * i for i in range(11)]]
QUARTERS = [0.25 * i for i in range(-4, 5)]
"""Their sums are exact, so that whether two are alike is not a question of rounding."""


def one(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


def same(found: Any, expected: Any) -> None:
    assert found == pytest.approx(expected, rel=1e-10, abs=1e-10)


def settings_of(surrogate: str, draw: random.Random) -> dict[str, float]:
    ranges = {"ratio_cap": (1.01, 10), "dual_clip": (1.01, 6), "divergence_limit": (0, 0.5)}
    known = {key: draw.uniform(*ranges.get(key, (0.1, 4))) for key in part_settings(PARTS["surrogate"][surrogate].make)}
    if surrogate == "clip":
        known = {key: value for key, value in known.items() if draw.random() < 0.5}
    return known


@pytest.mark.parametrize("name", PARTS["surrogate"])
@pytest.mark.parametrize("bounds", PARTS["bounds"])
def test_surrogates_and_their_gradients_are_those_that_train(name: str, bounds: str) -> None:
    draw = random.Random(f"{name} {bounds}")
    limits = [0.05, 0.5]
    for _ in range(TRIALS):
        settings = settings_of(name, draw)
        part = PARTS["surrogate"][name].make(**settings)
        old, ratio, advantage = draw.uniform(0.01, 0.99), math.exp(draw.uniform(-1.5, 1.5)), draw.choice([-2.0, -1.0, 1.0, 0.5])
        low, high = draw.uniform(*limits), draw.uniform(*limits)
        cap = {"ratio_cap": 3.0} if bounds == "dynamic" else {}
        make = PARTS["bounds"][bounds].make
        limit = make(clip_low=low, clip_high=high, **cap) if isinstance(make, type) else make
        low_BT, high_BT = limit(one(old).log())
        same(theory.lower_bound(bounds, old, low), float(low_BT))
        same(theory.upper_bound(bounds, old, high, 3.0), float(high_BT))

        logprobs = one(ratio * old).log().requires_grad_()
        loss, _ = part(
            Terms(
                logprobs_BT=logprobs,
                old_logprobs_BT=one(old).log(),
                log_ratio_BT=logprobs - one(old).log(),
                advantages_BT=one(advantage),
                low_BT=low_BT,
                high_BT=high_BT,
                mask_BT=torch.ones(1, 1, dtype=torch.bool),
            )
        )
        (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
        known = {"ratio_cap": math.inf, "dual_clip": math.inf, **settings, "low": float(low_BT), "high": float(high_BT)}
        same(theory.surrogate(name, ratio, old, advantage, known), [-loss.item(), -float(gradient)])


def estimated(name: str, rewards: list[float], rest: list[float]) -> list[float]:
    """By the parts: a named algorithm's estimator on one-token completions, and on a second group."""
    algorithm: Algorithm = gw.named(name)
    both = torch.tensor([*rewards, *rest], dtype=torch.float64)
    mask = torch.ones(len(both), 1, dtype=torch.bool)
    credit = algorithm.advantage(
        Outcomes(
            rewards_B=both,
            group_ids_B=torch.tensor([0] * len(rewards) + [1] * len(rest)),
            prompt_ids=["a"] * len(rewards) + ["b"] * len(rest),
            mask_BT=mask,
            components_BK=both[:, None],
            component_weights_K=torch.ones(1, dtype=torch.float64),
            token_rewards_BT=both[:, None],
        )
    )
    return credit.advantages.flatten().tolist()[: len(rewards)]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_advantages_are_those_of_the_named_estimators(name: str) -> None:
    draw = random.Random(name)
    for _ in range(TRIALS):
        kind = draw.choice(REWARDS)
        rewards, rest = draw.choices(kind, k=draw.randint(1, 8)), draw.choices(kind, k=draw.randint(0, 8))
        same(theory.group_estimate(rewards, rest, name, 1, 1e-6), estimated(name, rewards, rest))


@pytest.mark.parametrize("ddof", [0, 1])
def test_credit_of_turns_and_steps(ddof: int) -> None:
    draw = random.Random(ddof)
    for _ in range(TRIALS):
        group = [draw.choices(QUARTERS, k=draw.randint(1, 4)) for _ in range(draw.randint(1, 5))]
        gamma, ids = draw.uniform(0, 1), [0] * len(group)
        ends = [list(range(len(rewards))) for rewards in group]
        options: dict[str, Any] = {"ddof": ddof, "eps": 1e-6}
        totals = torch.tensor([sum(rewards) for rewards in group], dtype=torch.float64)
        outcome = gw.group_advantages(totals, torch.tensor(ids), **options)
        expected = {
            "group": outcome[:, None].expand(-1, 4),
            "process": gw.process_advantages(group, ends, ids, 4, **options),
            "turns": gw.turn_advantages(group, ends, ids, 4, gamma=gamma, **options),
        }
        for name, values in expected.items():
            rows = [row[: len(rewards)] for row, rewards in zip(values.tolist(), group, strict=True)]
            for found, row in zip(theory.turn_credit(group, name, gamma, ddof, 1e-6), rows, strict=True):
                same(found, row)


def test_smoothed_advantages() -> None:
    draw = random.Random(0)
    for _ in range(TRIALS):
        size = draw.randint(2, 16)
        rights = [draw.randint(0, size) for _ in range(6)]
        history: Any = {}
        for right, found in zip(rights, theory.smoothed_visits(rights, size), strict=True):
            rewards = torch.tensor([1.0] * right + [0.0] * (size - right), dtype=torch.float64)
            advantages, history = gw.smoothed_advantages(rewards, torch.zeros(size, dtype=torch.long), ["p"] * size, history)
            if right:
                same(found[0], float(advantages[0]))
            if right < size:
                same(found[1], float(advantages[-1]))


def test_token_weights_and_the_overlong_penalty() -> None:
    draw = random.Random(0)
    for _ in range(TRIALS):
        lengths = [draw.randint(1, 50) for _ in range(draw.randint(1, 4))]
        mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        for mode in ("sequence_mean", "sequence_sum", "token_mean", "constant"):
            weights = gw.token_weights(mask, mode, max_length=60)
            same([theory.token_weight(mode, n, [*map(float, lengths)], 60) for n in lengths], weights[:, 0].tolist())
        limit, cache = draw.randint(1, 100), draw.choice([0, draw.randint(1, 100)])
        for length in lengths:
            penalty = float(gw.soft_overlong_penalty(torch.tensor([length]), limit, cache))
            same(theory.overlong_penalty(length, limit, cache), penalty)


def test_truncated_sampling_is_that_of_the_sampler() -> None:
    draw = random.Random(0)
    for _ in range(TRIALS):
        exponent, temperature = draw.uniform(0.2, 3), draw.uniform(0.3, 2)
        probabilities = theory.zipf_probabilities(30, exponent, temperature)
        logits = -exponent * torch.arange(1, 31, dtype=torch.float64).log()[None] / temperature
        same(probabilities, logits.softmax(-1)[0].tolist())
        sampling = Sampling(
            max_tokens=1,
            temperature=temperature,
            top_k=draw.choice([0, draw.randint(1, 40)]),
            top_p=draw.choice([1.0, draw.uniform(0.01, 1)]),
            min_p=draw.choice([0.0, draw.random()]),
        )
        limits = sampling.top_k, sampling.top_p, sampling.min_p
        expected = drawing._limits(sampling)(logits).softmax(-1)[0].tolist()
        same(theory.truncated_probabilities(probabilities, *limits), expected)


@pytest.mark.parametrize("name", PARTS["correction"])
def test_importance_weights(name: str) -> None:
    draw = random.Random(name)
    for _ in range(TRIALS):
        low, high = sorted(draw.uniform(0.1, 4) for _ in range(2))
        ratio = draw.choice([low, high, draw.uniform(0, 5)])
        make = PARTS["correction"][name].make
        options = {
            key: value for key, value in (("correction_low", low), ("correction_high", high)) if key in part_settings(make)
        }
        if not isinstance(make, type):
            assert theory.correction_weight(name, ratio, low, high) == 1
        else:
            same(theory.correction_weight(name, ratio, low, high), float(make(**options).weigh(one(ratio))))


def test_the_example_of_log_ratios_is_normally_distributed() -> None:
    noise = torch.tensor(theory.normal_noise(2048), dtype=torch.float64)
    assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05
    assert theory.running_sums([1.0, 2.0, 3.0]) == [1.0, 3.0, 6.0]


@pytest.mark.parametrize(
    "line",
    [
        "import math",
        "x = y = 1",
        "x, y = 1, 2",
        "x = {}",
        "x = math.tan(1)",
        "x = [a for a, b in c]",
        "while x: pass",
        "x = f(a=1)",
    ],
)
def test_what_has_no_translation_is_refused_with_its_line(line: str) -> None:
    with pytest.raises(ValueError, match="line 2: no JavaScript for"):
        to_javascript(f"def f(x):\n    {line}\n", "forms")
