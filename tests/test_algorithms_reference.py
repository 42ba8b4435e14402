"""Every public function and every named algorithm against tests/reference.py: 200 random ragged cases each, to 1e-10."""

import itertools
import math
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import groupwise as gw
from groupwise.algorithms import NAMED
from groupwise.algorithms.allocation import hit_utility, hit_utility_sizes
from groupwise.algorithms.credit import Outcomes
from tests import reference

CASES = 200


@dataclass(frozen=True)
class Case:
    """A random ragged batch: groups of different sizes, rows of different lengths, holes in the mask, an empty row at times."""

    rng: random.Random
    ids: list[int]
    rewards: list[float]
    mask: list[list[bool]]
    logprobs: Tensor
    old: Tensor
    ref: Tensor
    rollout: Tensor
    advantages: Tensor
    """[B, T]"""
    length: int

    @property
    def mask_BT(self) -> Tensor:
        return torch.tensor(self.mask)

    @property
    def ids_B(self) -> Tensor:
        return torch.tensor(self.ids)


def case(seed: int) -> Case:
    rng = random.Random(seed)
    ids = [i for i in rng.sample(range(50), rng.randint(1, 3)) for _ in range(rng.randint(1, 4))]
    rng.shuffle(ids)
    length = rng.randint(1, 6)
    mask = []
    for _ in ids:
        size = rng.randint(0 if rng.random() < 0.15 else 1, length)
        mask.append([t < size and rng.random() < 0.9 for t in range(length)])
    if not any(map(any, mask)):
        mask[0][0] = True
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(len(ids), length, dtype=torch.float64, generator=generator)

    old = -torch.rand(len(ids), length, dtype=torch.float64, generator=generator).mul(4).add(0.01)
    spread = rng.choice([1e-4, 0.1, 1.0])  # near the policy, near the bounds, far outside
    rewards = [rng.choice([0.0, 1.0]) if seed % 2 else rng.gauss(0, 1) for _ in ids]
    row_advantages = torch.randn(len(ids), 1, dtype=torch.float64, generator=generator)
    return Case(
        rng=rng,
        ids=ids,
        rewards=rewards,
        mask=mask,
        logprobs=old + noise(spread),
        old=old,
        ref=old + noise(0.3),
        rollout=old + noise(0.5),
        advantages=row_advantages.expand(-1, length).clone(),
        length=length,
    )


def rows(values_BT: Tensor) -> list[list[Tensor]]:
    return [list(row.unbind()) for row in values_BT.unbind()]


def close(ours: Tensor, theirs: Any) -> None:
    theirs = torch.as_tensor(theirs, dtype=torch.float64)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-10, atol=1e-10)


def _double(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gradient_of(loss: Tensor, values: Tensor) -> Tensor:
    """Of a reference loss, which may have been clipped to a constant."""
    return torch.autograd.grad(loss + 0 * values.sum(), values)[0]


@pytest.mark.parametrize("center", ["group", "batch", "none"])
@pytest.mark.parametrize("scale", ["group", "batch", "mean", "none"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_group_advantages(center: str, scale: str, ddof: int) -> None:
    for seed in range(CASES):
        c = case(seed)
        ours = gw.group_advantages(
            torch.tensor(c.rewards, dtype=torch.float64), c.ids_B, center=center, scale=scale, ddof=ddof, eps=1e-4
        )
        close(ours, reference.group_advantages(c.rewards, c.ids, center, scale, ddof, 1e-4))


def test_leave_one_out_advantages() -> None:
    for seed in range(CASES):
        c = case(seed)
        ours = gw.leave_one_out_advantages(torch.tensor(c.rewards, dtype=torch.float64), c.ids_B)
        close(ours, reference.leave_one_out(c.rewards, c.ids))


def components_of(c: Case) -> tuple[list[list[float]], list[float]]:
    """Up to three rewards of each completion; some apply to some completions only."""
    count = c.rng.randint(1, 3)
    graded = c.rng.random() < 0.5

    def value() -> float:
        if count > 1 and c.rng.random() < 0.2:
            return math.nan
        return c.rng.gauss(0, 1) if graded else float(c.rng.random() < 0.5)

    return [[value() for _ in range(count)] for _ in c.ids], [c.rng.choice([0.0, 0.5, 1.0, 2.0]) for _ in range(count)]


@pytest.mark.parametrize("ddof", [0, 1])
def test_decoupled_advantages(ddof: int) -> None:
    for seed in range(CASES):
        c = case(seed)
        components, weights = components_of(c)
        if len(c.ids) <= ddof:
            continue
        ours = gw.decoupled_advantages(_double(components), c.ids_B, _double(weights), ddof=ddof, eps=1e-4)
        close(ours, reference.decoupled(components, c.ids, weights, ddof, 1e-4))


def steps_of(c: Case) -> tuple[list[list[float]], list[list[int]]]:
    rewards, ends = [], []
    for _ in c.ids:
        count = c.rng.randint(0, c.length)
        ends.append(sorted(c.rng.sample(range(c.length), count)))
        rewards.append([float(c.rng.random() < 0.5) for _ in range(count)])
    return rewards, ends


@pytest.mark.parametrize("ddof", [0, 1])
def test_process_advantages(ddof: int) -> None:
    for seed in range(CASES):
        c = case(seed)
        rewards, ends = steps_of(c)
        ours = gw.process_advantages(rewards, ends, c.ids, c.length, ddof=ddof)
        close(ours, reference.process(rewards, ends, c.ids, c.length, ddof))


@pytest.mark.parametrize("ddof", [0, 1])
def test_turn_advantages(ddof: int) -> None:
    for seed in range(CASES):
        c = case(seed)
        rewards, ends = steps_of(c)
        gamma = c.rng.choice([1.0, 0.9, 0.0])
        ours = gw.turn_advantages(rewards, ends, c.ids, c.length, gamma=gamma, ddof=ddof)
        close(ours, reference.turns(rewards, ends, c.ids, c.length, gamma, ddof))


def test_gae() -> None:
    for seed in range(CASES):
        c = case(seed)
        gamma, lam = c.rng.choice([1.0, 0.97]), c.rng.choice([0.0, 0.95, 1.0])
        advantages, returns = gw.gae(c.ref, c.old, c.mask_BT, gamma=gamma, lam=lam)
        expected = [reference.gae(r, v, m, gamma, lam) for r, v, m in zip(c.ref.tolist(), c.old.tolist(), c.mask, strict=True)]
        close(advantages, [a for a, _ in expected])
        close(returns, [r for _, r in expected])


def test_whiten() -> None:
    for seed in range(CASES):
        c = case(seed)
        trained = [v for row, m in zip(c.old.tolist(), c.mask, strict=True) for v, on in zip(row, m, strict=True) if on]
        ours = gw.whiten(c.old, c.mask_BT)
        if len(trained) < 2:
            close(ours, torch.zeros_like(c.old))
            continue
        m, s = reference.mean(trained), reference.deviation(trained, 1)
        close(ours, torch.where(c.mask_BT, (c.old - m) / (s + 1e-8), 0))


def test_smoothed_advantages() -> None:
    """Prompts revisited at random, in groups of any size, against moments recomputed from every raw reward."""
    for seed in range(CASES):
        rng = random.Random(seed)
        history: Any = {}
        visits: dict[str, list[list[float]]] = {}
        for _ in range(4):
            rewards, ids, prompts = [], [], []
            expected: list[float] = []
            for i, prompt in enumerate(rng.sample("abcd", 2)):
                size = rng.randint(1, 5)
                group = [rng.choice([1.0, 0.0, -1.0]) if seed % 2 else rng.gauss(0, 1) for _ in range(size)]
                visits.setdefault(prompt, []).append(group)
                rewards += group
                ids += [i] * size
                prompts += [prompt] * size
                expected += reference.smoothed(visits[prompt])
            before = {key: dict(value) for key, value in history.items()}
            ours, after = gw.smoothed_advantages(torch.tensor(rewards, dtype=torch.float64), torch.tensor(ids), prompts, history)
            assert history == before
            close(ours, expected)
            history = after


@pytest.mark.parametrize("mode", ["sequence_mean", "token_mean", "prompt_token_mean", "sequence_sum", "constant"])
def test_token_weights(mode: str) -> None:
    for seed in range(CASES):
        c = case(seed)
        close(gw.token_weights(c.mask_BT, mode, group_ids_B=c.ids_B, max_length=9), reference.weights(c.mask, mode, c.ids, 9))


def test_ratios() -> None:
    for seed in range(CASES):
        c = case(seed)
        token = gw.token_log_ratio(c.logprobs, c.old, c.mask_BT)
        sequence = gw.sequence_log_ratio(c.logprobs, c.old, c.mask_BT)
        sequence_token = gw.sequence_token_log_ratio(c.logprobs, c.old, c.mask_BT)
        for i, row in enumerate(c.mask):
            s = math.log(reference.sequence_ratio(c.logprobs[i].unbind(), c.old[i].unbind(), row)) if any(row) else 0.0
            for t, on in enumerate(row):
                close(token[i, t], float(c.logprobs[i, t] - c.old[i, t]) if on else 0.0)
                close(sequence[i, t], s if on else 0.0)
                close(sequence_token[i, t], s if on else 0.0)


def test_bounds() -> None:
    for seed in range(CASES):
        c = case(seed)
        low, high = gw.dynamic_bounds(c.old, 0.16, 0.2)
        expected = [[reference.dynamic_bounds(math.exp(o)) for o in row] for row in c.old.tolist()]
        close(low, [[b[0] for b in row] for row in expected])
        close(high, [[b[1] for b in row] for row in expected])
        low, high = gw.fixed_bounds(c.old, 0.2, 0.28)
        close(low, torch.full_like(c.old, 0.8))
        close(high, torch.full_like(c.old, 1.28))
        low, high = gw.exponential_bounds(c.old, 0.4, 0.3)
        close(low, torch.full_like(c.old, math.exp(-0.4)))
        close(high, torch.full_like(c.old, math.exp(0.3)))


def test_kl_estimates() -> None:
    for seed in range(CASES):
        c = case(seed)
        d = c.logprobs - c.ref
        close(gw.k1(c.logprobs, c.ref), d)
        close(gw.k2(c.logprobs, c.ref), d * d / 2)
        close(
            gw.k3(c.logprobs, c.ref),
            [[reference.k3(a, b) for a, b in zip(x, y, strict=True)] for x, y in zip(rows(c.logprobs), rows(c.ref), strict=True)],
        )


def test_soft_overlong_penalty() -> None:
    for seed in range(CASES):
        rng = random.Random(seed)
        maximum = rng.randint(2, 100)
        cache = rng.randint(1, maximum)
        lengths = [rng.randint(1, 2 * maximum) for _ in range(10)]
        close(
            gw.soft_overlong_penalty(torch.tensor(lengths), maximum, cache),
            [reference.soft_overlong(length, maximum, cache) for length in lengths],
        )


def test_mixed_groups() -> None:
    for seed in range(CASES):
        c = case(seed)
        correct = [reward > 0.5 for reward in c.rewards]
        outcomes = {i: {right for right, j in zip(correct, c.ids, strict=True) if j == i} for i in c.ids}
        assert gw.mixed_groups(torch.tensor(correct), c.ids_B).tolist() == [len(outcomes[i]) == 2 for i in c.ids]


@pytest.mark.parametrize("name", sorted(NAMED))
def test_named_loss_and_gradient(name: str) -> None:
    for seed in range(CASES):
        c = case(seed)
        advantages = c.advantages
        if name in ("ppo", "grpo_process", "gspo_token"):  # those made for advantages that differ between tokens
            advantages = advantages * torch.linspace(-1, 1, c.length, dtype=torch.float64)
        ours = c.logprobs.clone().requires_grad_()
        loss, metrics = gw.policy_loss(
            gw.named(name), ours, c.old, advantages, c.mask_BT, group_ids_B=c.ids_B, ref_logprobs_BT=c.ref
        )
        theirs = c.logprobs.clone().requires_grad_()
        expected = reference.loss(
            name, rows(theirs), rows(c.old), advantages.tolist(), c.mask, c.ids, rows(c.ref), max_length=c.length
        )
        close(loss.detach(), expected.detach())
        (gradient,) = torch.autograd.grad(loss, ours)
        close(gradient, gradient_of(expected, theirs))
        assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("name", sorted(NAMED))
def test_named_advantages(name: str) -> None:
    """From rewards to [B, T] advantages, through the part that the algorithm names."""
    algorithm = gw.named(name)
    for seed in range(CASES):
        c = case(seed)
        step_rewards, step_ends = steps_of(c)
        components, weights = components_of(c)
        outcomes = Outcomes(
            components_BK=_double(components),
            component_weights_K=_double(weights),
            rewards_B=torch.tensor(c.rewards, dtype=torch.float64),
            group_ids_B=c.ids_B,
            prompt_ids=[str(i) for i in c.ids],
            mask_BT=c.mask_BT,
            step_rewards=step_rewards,
            step_ends=step_ends,
            token_rewards_BT=c.ref,
            values_BT=c.old,
        )
        credit = algorithm.advantage(outcomes)
        expected: Any
        if name == "ppo":
            parts = [reference.gae(r, v, m) for r, v, m in zip(c.ref.tolist(), c.old.tolist(), c.mask, strict=True)]
            close(credit.returns_BT, [returns for _, returns in parts])
            raw = torch.tensor([a for a, _ in parts], dtype=torch.float64)
            trained = raw[c.mask_BT].tolist()
            if len(trained) < 2:
                continue
            expected = torch.where(c.mask_BT, (raw - reference.mean(trained)) / (reference.deviation(trained, 1) + 1e-8), 0)
        elif name == "reinforce_pp":
            to_go = [reference.reward_to_go(r, m) for r, m in zip(c.ref.tolist(), c.mask, strict=True)]
            trained = [a for row, m in zip(to_go, c.mask, strict=True) for a, on in zip(row, m, strict=True) if on]
            if len(set(trained)) < 2:
                continue
            mean, deviation = reference.mean(trained), reference.deviation(trained, 1) + 1e-8
            expected = torch.where(c.mask_BT, (torch.tensor(to_go, dtype=torch.float64) - mean) / deviation, 0)
        elif name == "grpo_process":
            expected = reference.process(step_rewards, step_ends, c.ids, c.length)
        elif name == "gdpo":
            expected = reference.decoupled(components, c.ids, weights) if len(c.ids) > 1 else [0.0]
        elif name == "rloo":
            expected = reference.leave_one_out(c.rewards, c.ids)
        elif name == "dcpo":
            expected = [0.0] * len(c.ids)
            for i in set(c.ids):
                members = [n for n, j in enumerate(c.ids) if j == i]
                for n, a in zip(members, reference.smoothed([[c.rewards[n] for n in members]]), strict=True):
                    expected[n] = a
        else:
            center, scale = {
                "reinforce": ("group", "none"),
                "dr_grpo": ("group", "none"),
                "lite_ppo": ("group", "batch"),
                "maxrl": ("group", "mean"),
            }.get(name, ("group", "group"))
            expected = reference.group_advantages(c.rewards, c.ids, center, scale)
        close(credit.advantages, expected)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("weighted", [False, True])
def test_kl_term_in_the_loss(kind: str, weighted: bool) -> None:
    algorithm = gw.named("grpo", kl=kind, beta=0.3, kl_ratio_weighted=weighted)
    for seed in range(CASES):
        c = case(seed)
        ours, theirs = c.logprobs.clone().requires_grad_(), c.logprobs.clone().requires_grad_()
        loss, _ = gw.policy_loss(algorithm, ours, c.old, c.advantages[:, 0], c.mask_BT, ref_logprobs_BT=c.ref)

        def token(i: int, t: int, c: Case = c, theirs: Tensor = theirs) -> Tensor:
            lp, old, ref = theirs[i, t], c.old[i, t], c.ref[i, t]
            estimate = {"k1": lp - ref, "k2": (lp - ref) ** 2 / 2, "k3": reference.k3(lp, ref)}[kind]
            ratio = torch.exp(lp) / torch.exp(old)
            clip = reference.clip_token(ratio, float(c.advantages[i, 0]), 0.8, 1.2)
            return clip + 0.3 * estimate * (ratio if weighted else 1)

        expected = reference.total(c.mask, "sequence_mean", c.ids, c.length, token)
        close(loss.detach(), expected.detach())
        close(torch.autograd.grad(loss, ours)[0], gradient_of(expected, theirs))


@pytest.mark.parametrize("kind", ["tis", "mis", "icepop"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_corrections(kind: str, level: Any) -> None:
    low = {"correction_low": 0.7} if kind == "icepop" else {}
    algorithm = gw.named("dapo", correction=kind, correction_level=level, correction_high=1.6, **low)
    for seed in range(CASES):
        c = case(seed)
        ours, theirs = c.logprobs.clone().requires_grad_(), c.logprobs.clone().requires_grad_()
        loss, _ = gw.policy_loss(algorithm, ours, c.old, c.advantages[:, 0], c.mask_BT, rollout_logprobs_BT=c.rollout)

        def token(i: int, t: int, c: Case = c, theirs: Tensor = theirs) -> Tensor:
            w = 1.0
            for u, on in enumerate(c.mask[i]):
                if on and (level == "sequence" or u == t):
                    w *= math.exp(c.old[i, u]) / math.exp(c.rollout[i, u])
            if kind == "tis":
                w = min(w, 1.6)
            elif w > 1.6 or (kind == "icepop" and w < 0.7):
                w = 0.0
            ratio = torch.exp(theirs[i, t]) / torch.exp(c.old[i, t])
            return w * reference.clip_token(ratio, float(c.advantages[i, 0]), 0.8, 1.28)

        expected = reference.total(c.mask, "token_mean", c.ids, c.length, token)
        close(loss.detach(), expected.detach())
        close(torch.autograd.grad(loss, ours)[0], gradient_of(expected, theirs))
        assert algorithm.correction(c.old, c.rollout, c.mask_BT).max() <= 1.6


@pytest.mark.parametrize("correction", ["none", "tis", "mis", "icepop"])
@pytest.mark.parametrize("per_token", [False, True])
def test_off_policy_sequence_mask(correction: str, per_token: bool) -> None:
    """Also beside each importance-sampling correction, and with a KL, which the mask leaves alone; denominators stay."""
    algorithm = gw.named("grpo", mask="off_policy", mask_divergence=0.2, correction=correction)
    masked = 0
    for seed in range(CASES):
        c = case(seed)
        tilt = torch.linspace(-1, 1, c.length, dtype=torch.float64) if per_token else 1.0
        advantages = c.advantages * tilt
        ours, theirs = c.logprobs.clone().requires_grad_(), c.logprobs.clone().requires_grad_()
        loss, metrics = gw.policy_loss(
            algorithm, ours, c.old, advantages, c.mask_BT, ref_logprobs_BT=c.ref, rollout_logprobs_BT=c.rollout
        )
        count = 0

        def token(i: int, t: int, c: Case = c, theirs: Tensor = theirs, advantages: Tensor = advantages) -> Tensor:
            nonlocal count
            a, w = float(advantages[i, t]), math.exp(c.old[i, t]) / math.exp(c.rollout[i, t])
            if correction == "tis":
                w = min(w, 2.0)
            elif w > 2 or (correction == "icepop" and w < 0.5):
                w = 0.0
            w = 1.0 if correction == "none" else w
            gone = reference.dropped(a, rows(c.rollout)[i], rows(theirs.detach())[i], c.mask[i], 0.2)
            count += gone
            clip = reference.clip_token(torch.exp(theirs[i, t]) / torch.exp(c.old[i, t]), a, 0.8, 1.2)
            return 0.04 * reference.k3(theirs[i, t], c.ref[i, t]) + (0.0 if gone else w * clip)

        expected = reference.total(c.mask, "sequence_mean", c.ids, c.length, token)
        close(loss.detach(), expected.detach())
        close(torch.autograd.grad(loss, ours)[0], gradient_of(expected, theirs))
        close(metrics["masked_fraction"], count / int(c.mask_BT.sum()))
        masked += count
    assert masked > 100


def test_hit_utility_is_the_probability_of_a_hit() -> None:
    for a, b, n in [(1, 1, 1), (1, 1, 8), (3, 9, 4), (9.5, 2.5, 3), (1, 17, 16)]:
        assert hit_utility(a, b, n) == pytest.approx(reference.hit_probability(a, b, n), abs=1e-6)


def test_hit_utility_sizes_against_every_division() -> None:
    """The largest sum of hit utilities over all ways to divide the completions."""
    for seed in range(CASES):
        rng = random.Random(seed)
        posteriors = [(rng.randint(1, 12), rng.randint(1, 12)) for _ in range(rng.randint(1, 4))]
        smallest = rng.randint(1, 2)
        total = smallest * len(posteriors) + rng.randint(0, 8)
        ways = [w for w in itertools.product(range(smallest, total + 1), repeat=len(posteriors)) if sum(w) == total]
        best = max(sum(hit_utility(*p, n) for p, n in zip(posteriors, w, strict=True)) for w in ways)
        sizes = hit_utility_sizes(posteriors, total, smallest)
        assert sum(sizes) == total and min(sizes) >= smallest
        assert sum(hit_utility(*p, n) for p, n in zip(posteriors, sizes, strict=True)) == pytest.approx(best, abs=1e-12)


def test_dual_clip_and_entropy_bonus() -> None:
    algorithm = gw.named("grpo", beta=0.0, dual_clip=3.0, entropy_bonus=0.1)
    for seed in range(CASES):
        c = case(seed)
        entropy = -c.ref
        ours, theirs = c.logprobs.clone().requires_grad_(), c.logprobs.clone().requires_grad_()
        loss, _ = gw.policy_loss(algorithm, ours, c.old, c.advantages[:, 0], c.mask_BT, entropy_BT=entropy)

        def token(i: int, t: int, c: Case = c, theirs: Tensor = theirs, entropy: Tensor = entropy) -> Tensor:
            a = float(c.advantages[i, 0])
            ratio = torch.exp(theirs[i, t]) / torch.exp(c.old[i, t])
            objective = -reference.clip_token(ratio, a, 0.8, 1.2)
            if a < 0 and float(objective) < 3 * a:  # max(min(...), 3 A)
                objective = torch.tensor(3 * a, dtype=torch.float64)
            return -objective - 0.1 * entropy[i, t]

        expected = reference.total(c.mask, "sequence_mean", c.ids, c.length, token)
        close(loss.detach(), expected.detach())
        close(torch.autograd.grad(loss, ours)[0], gradient_of(expected, theirs))
