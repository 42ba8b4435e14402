"""The formulas again, from the papers: float64, plain loops, one number at a time. Shares no code with groupwise.

Lists of lists stand for [B, T]; a log-probability is a 0-d float64 tensor, so that autograd gives the gradient of what is
written here. Settings stand as the papers' literal numbers, so a default that drifts in groupwise is caught.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Row = Sequence[Tensor]
Rows = Sequence[Row]
Mask = Sequence[Sequence[bool]]


# --- advantages -------------------------------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def deviation(values: Sequence[float], ddof: int) -> float:
    m = mean(values)
    return math.sqrt(sum((v - m) ** 2 for v in values) / (len(values) - ddof))


def group_advantages(
    rewards: Sequence[float], ids: Sequence[int], center: str = "group", scale: str = "group", ddof: int = 1, eps: float = 1e-6
) -> list[float]:
    result = []
    for reward, i in zip(rewards, ids, strict=True):
        group = [r for r, j in zip(rewards, ids, strict=True) if j == i]
        uniform = min(group) == max(group)
        a = reward
        if center == "group":
            a = reward - mean(group)
        if center == "batch":
            a = reward - mean(rewards)
        if scale == "group" and not uniform:
            a = a / (deviation(group, ddof) + eps)
        if scale == "batch":
            a = 0.0 if min(rewards) == max(rewards) else a / (deviation(rewards, ddof) + eps)
        if scale == "mean":
            a = a / mean(group) if mean(group) > 0 else 0.0
        if uniform and (center == "group" or scale == "group"):
            a = 0.0
        if center == "batch" and min(rewards) == max(rewards):
            a = 0.0
        result.append(a)
    return result


def leave_one_out(rewards: Sequence[float], ids: Sequence[int]) -> list[float]:
    result = []
    for n, reward in enumerate(rewards):
        others = [r for m, r in enumerate(rewards) if ids[m] == ids[n] and m != n]
        result.append(reward - mean(others) if others else 0.0)
    return result


def decoupled(
    components: Sequence[Sequence[float]], ids: Sequence[int], w: Sequence[float], ddof: int = 1, eps: float = 1e-6
) -> list[float]:
    """GDPO, equations 4 to 6; a component that is NaN is no member of its group."""
    sums, varied = [], []
    for row, i in zip(components, ids, strict=True):
        total, differs = 0.0, False
        for k, weight in enumerate(w):
            pool = [other[k] for other, j in zip(components, ids, strict=True) if j == i and not math.isnan(other[k])]
            if not math.isnan(row[k]) and min(pool) != max(pool):
                total += weight * (row[k] - mean(pool)) / (deviation(pool, ddof) + eps)
                differs = differs or weight != 0
        sums.append(total)
        varied.append(differs)
    if not any(varied):
        return [0.0] * len(sums)
    m, s = mean(sums), deviation(sums, ddof) + eps
    return [(a - m) / s if differs else 0.0 for a, differs in zip(sums, varied, strict=True)]


def process(
    step_rewards: Sequence[Sequence[float]],
    step_ends: Sequence[Sequence[int]],
    ids: Sequence[int],
    length: int,
    ddof: int = 1,
    eps: float = 1e-6,
) -> list[list[float]]:
    result = []
    for rewards, ends, i in zip(step_rewards, step_ends, ids, strict=True):
        pool = [r for steps, j in zip(step_rewards, ids, strict=True) if j == i for r in steps]
        row = []
        for t in range(length):
            a = 0.0
            for reward, end in zip(rewards, ends, strict=True):
                if end >= t and max(pool) != min(pool):
                    a += (reward - mean(pool)) / (deviation(pool, ddof) + eps)
            row.append(a)
        result.append(row)
    return result


def turns(
    turn_rewards: Sequence[Sequence[float]],
    turn_ends: Sequence[Sequence[int]],
    ids: Sequence[int],
    length: int,
    gamma: float = 1.0,
    ddof: int = 1,
    eps: float = 1e-6,
) -> list[list[float]]:
    def to_go(rewards: Sequence[float], k: int) -> float:
        return sum(gamma ** (j - k) * rewards[j] for j in range(k, len(rewards)))

    result = []
    for rewards, ends, i in zip(turn_rewards, turn_ends, ids, strict=True):
        group = [other for other, j in zip(turn_rewards, ids, strict=True) if j == i]
        counts = max(len(other) for other in group)
        baselines = [mean([to_go(other, k) for other in group if len(other) > k]) for k in range(counts)]
        squares = [(to_go(other, k) - baselines[k]) ** 2 for other in group for k in range(len(other))]
        s = math.sqrt(sum(squares) / max(1, len(squares) - ddof * counts))
        row = []
        for t in range(length):
            k = sum(end < t for end in ends)
            row.append((to_go(rewards, k) - baselines[k]) / (s + eps) if k < len(ends) else 0.0)
        result.append(row)
    return result


def gae(
    rewards: Sequence[float], values: Sequence[float], mask: Sequence[bool], gamma: float = 1.0, lam: float = 0.95
) -> tuple[list[float], list[float]]:
    """One row: A_t = sum_l (gamma lam)^l delta_{t+l}, over its trained tokens."""
    trained = [t for t in range(len(mask)) if mask[t]]
    deltas = []
    for n, t in enumerate(trained):
        following = values[trained[n + 1]] if n + 1 < len(trained) else 0.0
        deltas.append(rewards[t] + gamma * following - values[t])
    advantages, returns = [0.0] * len(mask), [0.0] * len(mask)
    for n, t in enumerate(trained):
        advantages[t] = sum((gamma * lam) ** (m - n) * deltas[m] for m in range(n, len(trained)))
        returns[t] = advantages[t] + values[t]
    return advantages, returns


def smoothed(visits: Sequence[Sequence[float]]) -> list[float]:
    """Advantages of the last visit of one prompt, from the raw rewards of every visit."""

    def standardise(r: float, pool: Sequence[float]) -> float:
        return 0.0 if min(pool) == max(pool) else (r - mean(pool)) / deviation(pool, 0)

    i = len(visits)
    everything = [r for visit in visits for r in visit]
    result = []
    for r in visits[-1]:
        a_new, a_total = standardise(r, visits[-1]), standardise(r, everything)
        s_new = ((i - 1) * a_new + a_total) / i
        s_total = (a_new + (i - 1) * a_total) / i
        result.append(s_new if abs(s_new) < abs(s_total) else s_total)
    return result


# --- weights ----------------------------------------------------------------------------------------------------------


def weights(mask: Mask, mode: str, ids: Sequence[int], max_length: int) -> list[list[float]]:
    sizes = [sum(row) for row in mask]
    n = sum(size > 0 for size in sizes)
    result = []
    for row, size, i in zip(mask, sizes, ids, strict=True):
        group = sum(s for s, j in zip(sizes, ids, strict=True) if j == i)
        prompts = len({j for s, j in zip(sizes, ids, strict=True) if s > 0})
        of_a_token = {
            "sequence_mean": lambda n=n, size=size: 1 / n / size,
            "token_mean": lambda: 1 / sum(sizes),
            "prompt_token_mean": lambda group=group, prompts=prompts: 1 / prompts / group,
            "sequence_sum": lambda size=size: 1 / size,
            "constant": lambda n=n: 1 / (n * max_length),
        }[mode]
        result.append([of_a_token() if trained else 0.0 for trained in row])
    return result


def reward_to_go(rewards: Sequence[float], mask: Sequence[bool]) -> list[float]:
    """REINFORCE++, equation 8: what is paid from each trained token on."""
    return [sum(r for r, on in zip(rewards[t:], mask[t:], strict=True) if on) for t in range(len(rewards))]


# --- bounds and penalties ---------------------------------------------------------------------------------------------


def dynamic_bounds(q: float, low: float = 0.16, high: float = 0.2, cap: float = 10.0) -> tuple[float, float]:
    lower = 0.5 + 0.5 * math.sqrt(max(1 - 4 * low / q, 0))
    return lower, min(0.5 + 0.5 * math.sqrt(1 + 4 * high / q), cap)


def soft_overlong(length: int, max_length: int, cache: int) -> float:
    if length <= max_length - cache:
        return 0.0
    if length <= max_length:
        return ((max_length - cache) - length) / cache
    return -1.0


def k3(logprob: Tensor, ref: Tensor) -> Tensor:
    ratio = torch.exp(ref) / torch.exp(logprob)
    return ratio - torch.log(ratio) - 1


def dropped(a: float, rollout: Row, logprobs: Row, mask: Sequence[bool], delta: float) -> bool:
    """DeepSeek-V3.2, equation 9: M = 0 where A < 0 and 1/|o| sum_t log(pi_old / pi_theta) > delta."""
    logs = [math.log(math.exp(o) / math.exp(lp)) for o, lp, on in zip(rollout, logprobs, mask, strict=True) if on]
    return a < 0 and mean(logs) > delta


# --- allocation -------------------------------------------------------------------------------------------------------


def hit_probability(a: float, b: float, n: int, cells: int = 20_000) -> float:
    """P(at least one of n is right) for a pass rate from Beta(a, b): 1 - integral of (1 - p)^n over its density, by midpoints."""
    norm = math.gamma(a + b) / math.gamma(a) / math.gamma(b)
    points = [(i + 0.5) / cells for i in range(cells)]
    return 1 - sum(norm * p ** (a - 1) * (1 - p) ** (b - 1 + n) for p in points) / cells


# --- losses -----------------------------------------------------------------------------------------------------------


def clip_token(ratio: Tensor, a: float, low: float, high: float) -> Tensor:
    """-min(ratio A, clip(ratio, low, high) A), the minimum taken by comparing."""
    clipped = ratio if low <= float(ratio) <= high else torch.tensor(min(max(float(ratio), low), high), dtype=torch.float64)
    return -(ratio * a if float(ratio * a) <= float(clipped * a) else clipped * a)


def total(mask: Mask, mode: str, ids: Sequence[int], max_length: int, token: Callable[[int, int], Tensor]) -> Tensor:
    w = weights(mask, mode, ids, max_length)
    loss = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(mask):
        for t, trained in enumerate(row):
            if trained:
                loss = loss + w[i][t] * token(i, t)
    return loss


def sequence_ratio(logprobs: Row, old: Row, mask: Sequence[bool]) -> Tensor:
    """s_i = (pi(o)/pi_old(o))^(1/|o|): the |o|-th root of the ratio of products."""
    size = sum(mask)
    product = torch.ones((), dtype=torch.float64)
    for lp, o, trained in zip(logprobs, old, mask, strict=True):
        if trained:
            product = product * torch.exp(lp) / torch.exp(o)
    return product ** (1 / size)


def loss(
    name: str, lp: Rows, old: Rows, a: Sequence[Sequence[float]], mask: Mask, ids: Sequence[int], ref: Rows, max_length: int
) -> Tensor:
    """The loss of a named algorithm as its paper writes it; `a` per token."""

    def ratio(i: int, t: int) -> Tensor:
        return torch.exp(lp[i][t]) / torch.exp(old[i][t])

    def clipped(low: float, high: float) -> Callable[[int, int], Tensor]:
        return lambda i, t: clip_token(ratio(i, t), a[i][t], 1 - low, 1 + high)

    def grpo(i: int, t: int) -> Tensor:
        return clipped(0.2, 0.2)(i, t) + 0.04 * k3(lp[i][t], ref[i][t])

    def gspo(i: int, t: int) -> Tensor:
        return clip_token(sequence_ratio(lp[i], old[i], mask[i]), a[i][t], 1 - 3e-4, 1 + 4e-4)

    def gspo_token(i: int, t: int) -> Tensor:
        s = sequence_ratio(lp[i], old[i], mask[i]).detach() * torch.exp(lp[i][t]) / torch.exp(lp[i][t]).detach()
        return clip_token(s, a[i][t], 1 - 3e-4, 1 + 4e-4)

    def dcpo(i: int, t: int) -> Tensor:
        low, high = dynamic_bounds(float(torch.exp(old[i][t])))
        r = ratio(i, t)
        r = r if float(r) <= 10 else torch.tensor(10.0, dtype=torch.float64)
        return clip_token(r, a[i][t], low, high)

    def policy_gradient(i: int, t: int) -> Tensor:
        return -a[i][t] * lp[i][t]

    def cispo(i: int, t: int) -> Tensor:
        return -min(float(ratio(i, t)), 5.0) * a[i][t] * lp[i][t]

    def sapo(i: int, t: int) -> Tensor:
        tau = 1.0 if a[i][t] > 0 else 1.05
        return -(4 / tau) / (1 + torch.exp(-tau * (ratio(i, t) - 1))) * a[i][t]

    def gmpo(i: int, t: int) -> Tensor:
        product = torch.ones((), dtype=torch.float64)
        for u, trained in enumerate(mask[i]):
            if trained:
                r = ratio(i, u)
                if a[i][u] > 0 and float(r) > math.exp(0.4):
                    r = torch.tensor(math.exp(0.4), dtype=torch.float64)
                if a[i][u] <= 0 and float(r) < math.exp(-0.4):
                    r = torch.tensor(math.exp(-0.4), dtype=torch.float64)
                product = product * r
        return -a[i][t] * product ** (1 / sum(mask[i]))

    def dppo(i: int, t: int) -> Tensor:
        moved = float(torch.exp(lp[i][t]) - torch.exp(old[i][t]))
        outside = (a[i][t] > 0 and moved > 0.2) or (a[i][t] < 0 and -moved > 0.2)
        return 0 * lp[i][t] if outside else -ratio(i, t) * a[i][t]

    def vespo(i: int, t: int) -> Tensor:
        w = 1.0
        for u, trained in enumerate(mask[i]):
            if trained:
                w *= float(ratio(i, u))
        c1, c2 = (2.0, 3.0) if a[i][t] >= 0 else (3.0, 2.0)
        return -(w**c1) * math.exp(c2 * (1 - w)) * a[i][t] * lp[i][t]

    token, mode = {
        "vespo": (vespo, "token_mean"),
        "gdpo": (clipped(0.2, 0.2), "sequence_mean"),
        "ppo": (clipped(0.2, 0.2), "sequence_mean"),
        "reinforce": (policy_gradient, "sequence_mean"),
        "grpo": (grpo, "sequence_mean"),
        "grpo_process": (grpo, "sequence_mean"),
        "dapo": (clipped(0.2, 0.28), "token_mean"),
        "gspo": (gspo, "sequence_mean"),
        "gspo_token": (gspo_token, "sequence_mean"),
        "dcpo": (dcpo, "sequence_sum"),
        "dr_grpo": (clipped(0.2, 0.2), "constant"),
        "lite_ppo": (clipped(0.2, 0.2), "token_mean"),
        "rloo": (policy_gradient, "constant"),
        "reinforce_pp": (clipped(0.2, 0.2), "token_mean"),
        "cispo": (cispo, "token_mean"),
        "sapo": (sapo, "sequence_mean"),
        "gmpo": (gmpo, "sequence_mean"),
        "dppo": (dppo, "token_mean"),
        "maxrl": (clipped(0.2, 0.2), "token_mean"),
    }[name]
    return total(mask, mode, ids, max_length, token)


# --- truncated sampling -----------------------------------------------------------------------------------------------


def limited(logits: Sequence[float], top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> list[int]:
    """The tokens that top-k, then top-p of what is left, then min-p leave, ascending."""
    ranked = sorted(range(len(logits)), key=lambda j: -logits[j])
    if top_k:
        ranked = ranked[:top_k]
    total = sum(math.exp(logits[j] - logits[ranked[0]]) for j in ranked)
    nucleus, before = [], 0.0
    for j in ranked:
        if before < top_p:
            nucleus.append(j)
        before += math.exp(logits[j] - logits[ranked[0]]) / total
    return sorted(j for j in nucleus if math.exp(logits[j] - logits[ranked[0]]) >= min_p)


def replayed(logits: Sequence[Tensor], kept: Sequence[int], token: int) -> tuple[Tensor, Tensor]:
    """(log-probability of the token, entropy) of the softmax over the kept tokens alone, arXiv 2512.02556 section 3.1."""
    total = torch.zeros((), dtype=torch.float64)
    for j in kept:
        total = total + torch.exp(logits[j])
    entropy = torch.zeros((), dtype=torch.float64)
    for j in kept:
        p = torch.exp(logits[j]) / total
        entropy = entropy - p * torch.log(p)
    return logits[token] - torch.log(total), entropy
