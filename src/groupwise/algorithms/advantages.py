"""How much better each completion, or token, was than expected.

The critic-free estimates compare the completions of one prompt (GRPO, arXiv 2402.03300, section 4.1.2 and 4.1.3; RLOO,
arXiv 2402.14740; DCPO, arXiv 2509.02333; GDPO, arXiv 2601.05242); `gae` uses a critic's values (arXiv 1506.02438).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def group_sums(values_B: Tensor, group_B: Tensor, groups: int) -> Tensor:
    """Sum over each group, [groups]; `group_B` counts groups from 0."""
    return torch.zeros(groups, dtype=values_B.dtype, device=values_B.device).index_add(0, group_B, values_B)


def _has_variance_B(values_B: Tensor, group_B: Tensor, groups: int) -> Tensor:
    """bool [B]: whether the row's group holds two different values. Exact, where a computed deviation may round."""
    empty = torch.zeros(groups, dtype=values_B.dtype, device=values_B.device)
    high = empty.scatter_reduce(0, group_B, values_B, "amax", include_self=False)
    low = empty.scatter_reduce(0, group_B, values_B, "amin", include_self=False)
    return (high > low)[group_B]


def group_advantages(
    rewards_B: Tensor,
    group_ids_B: Tensor,
    *,
    center: str = "group",
    scale: str = "group",
    ddof: int = 1,
    eps: float = 1e-6,
) -> Tensor:
    """Rewards relative to those of the same prompt (GRPO, section 4.1.2, outcome supervision).

    Args:
        rewards_B: float [B], one per completion.
        group_ids_B: int [B], equal for completions of one prompt; any numbers.
        center: what is subtracted: the "group" mean, the "batch" mean (REINFORCE++), or "none".
        scale: what is divided by: the standard deviation of the "group" (GRPO) or of the whole "batch" (LitePPO), the
            group's "mean" (MaxRL; 0 where it is not positive), or "none" (Dr.GRPO).
        ddof: 1 for Bessel's correction, 0 for the population's deviation.
        eps: added to a standard deviation.

    Returns:
        float [B]. A zero-variance group gets exact zeros wherever its own mean or deviation is used.

    Raises:
        ValueError: an unknown center or scale.
    """
    if center not in ("group", "batch", "none") or scale not in ("group", "batch", "mean", "none"):
        raise ValueError(f"center {center!r} or scale {scale!r} is unknown: group, batch, none; group, batch, mean, none")
    ids, group_B = torch.unique(group_ids_B, return_inverse=True)
    counts = group_sums(torch.ones_like(rewards_B), group_B, len(ids))
    means = group_sums(rewards_B, group_B, len(ids)) / counts
    if center == "group":
        advantages_B = rewards_B - means[group_B]
    else:
        advantages_B = rewards_B - rewards_B.mean() if center == "batch" else rewards_B.clone()
    if scale == "group":
        squares = group_sums((rewards_B - means[group_B]) ** 2, group_B, len(ids))
        advantages_B = advantages_B / ((squares / (counts - ddof).clamp(min=1)).sqrt()[group_B] + eps)
    elif scale == "batch":
        advantages_B = advantages_B / (rewards_B.std(correction=ddof) + eps) if len(rewards_B) > ddof else advantages_B * 0
    elif scale == "mean":
        mean_B = means[group_B]
        advantages_B = torch.where(mean_B > 0, advantages_B / mean_B.clamp(min=torch.finfo(mean_B.dtype).tiny), 0)
    if center == "group" or scale == "group":
        varied_B = _has_variance_B(rewards_B, group_B, len(ids))
        advantages_B = torch.where(varied_B, advantages_B, 0)
    if (center == "batch" or scale == "batch") and bool((rewards_B == rewards_B[0]).all()):
        advantages_B = torch.zeros_like(advantages_B)
    return advantages_B


def leave_one_out_advantages(rewards_B: Tensor, group_ids_B: Tensor) -> Tensor:
    """Reward minus the mean of the *other* completions' rewards (RLOO, arXiv 2402.14740, section 3.3).

    Returns:
        float [B]; exact zeros for a zero-variance group, a group of one included.
    """
    ids, group_B = torch.unique(group_ids_B, return_inverse=True)
    counts_B = group_sums(torch.ones_like(rewards_B), group_B, len(ids))[group_B]
    sums_B = group_sums(rewards_B, group_B, len(ids))[group_B]
    advantages_B = rewards_B - (sums_B - rewards_B) / (counts_B - 1).clamp(min=1)
    return torch.where(_has_variance_B(rewards_B, group_B, len(ids)), advantages_B, 0)


def decoupled_advantages(
    components_BK: Tensor, group_ids_B: Tensor, weights_K: Tensor, *, ddof: int = 1, eps: float = 1e-6
) -> Tensor:
    """Each reward normalised within the group, their weighted sum normalised over the batch (GDPO, arXiv 2601.05242, eq. 4-6).

    The weighted sums of a group add up to 0, and so do the batch's: what the paper subtracts as the batch's mean is rounding.

    Args:
        components_BK: float [B, K], one reward a column; NaN where it does not apply to the completion, which then counts in no
            mean and no deviation of that reward.
        group_ids_B: int [B].
        weights_K: float [K], what each normalised reward counts.
        ddof, eps: as in `group_advantages`, for the deviations of groups and of the batch.

    Returns:
        float [B]; exact zeros where no reward with a weight differs within the group.
    """
    _, group_B = torch.unique(group_ids_B, return_inverse=True)
    groups = int(group_B.max()) + 1 if len(group_B) else 0
    sums_B = torch.zeros(len(group_B), dtype=components_BK.dtype, device=components_BK.device)
    varied_B = torch.zeros(len(group_B), dtype=torch.bool, device=components_BK.device)
    for values_B, weight in zip(components_BK.unbind(1), weights_K.tolist(), strict=True):
        rows = (~values_B.isnan()).nonzero()[:, 0]
        if weight == 0 or not len(rows):
            continue
        sums_B[rows] += weight * group_advantages(values_B[rows], group_B[rows], ddof=ddof, eps=eps)
        varied_B[rows] |= _has_variance_B(values_B[rows], group_B[rows], groups)
    if not varied_B.any() or len(sums_B) <= ddof:
        return torch.zeros_like(sums_B)
    return torch.where(varied_B, (sums_B - sums_B.mean()) / (sums_B.std(correction=ddof) + eps), 0)


def process_advantages(
    step_rewards: Sequence[Sequence[float]],
    step_ends: Sequence[Sequence[int]],
    group_ids: Sequence[int] | Tensor,
    length: int,
    *,
    ddof: int = 1,
    eps: float = 1e-6,
) -> Tensor:
    """Process supervision (GRPO, section 4.1.3): each token gets the sum of the normalised rewards of its step and later ones.

    Args:
        step_rewards: B lists, a reward for each step of the completion (an empty list: no steps).
        step_ends: B lists of the same lengths, the index of each step's last token.
        group_ids: B ids; steps are normalised over all steps of all completions of a group.
        length: T.
        ddof, eps: as in `group_advantages`.

    Returns:
        float64 [B, T]; exact zeros for a group whose steps all have the same reward.

    Raises:
        ValueError: the lists do not match, or an end lies outside the completion.
    """
    ids = [int(i) for i in group_ids]
    advantages_BT = torch.zeros(len(ids), length, dtype=torch.float64)
    pools: dict[int, list[float]] = {}
    for i, rewards, ends in zip(ids, step_rewards, step_ends, strict=True):
        if len(rewards) != len(ends) or any(not 0 <= end < length for end in ends):
            raise ValueError(f"step_ends {list(ends)} do not fit {len(rewards)} step rewards in {length} tokens")
        pools.setdefault(i, []).extend(rewards)
    for row, (i, rewards, ends) in enumerate(zip(ids, step_rewards, step_ends, strict=True)):
        pool = torch.tensor(pools[i], dtype=torch.float64)
        if not len(pool) or pool.max() == pool.min():
            continue
        mean, deviation = pool.mean(), pool.std(correction=ddof) + eps
        for reward, end in zip(rewards, ends, strict=True):
            advantages_BT[row, : end + 1] += (reward - mean) / deviation
    return advantages_BT


def turn_advantages(
    turn_rewards: Sequence[Sequence[float]],
    turn_ends: Sequence[Sequence[int]],
    group_ids: Sequence[int] | Tensor,
    length: int,
    *,
    gamma: float = 1.0,
    ddof: int = 1,
    eps: float = 1e-6,
) -> Tensor:
    """Credit for turns: each turn gets what it and later turns earned, compared with the same turn of the group's others.

    Turn k of completion i earned r_ik, such as how much better the state became: the difference of a state's score after and
    before the turn. Discounted backwards from the last turn K_i, G_ik = r_ik + gamma G_i,k+1 and G_iK = r_iK, where r_iK includes
    the reward of the whole completion. Its baseline b_k is the mean of G_jk over the completions j of the group that have a k-th
    turn, and s is the standard deviation of all G_ik - b_k of the group, with one degree of freedom less for each k if ddof = 1:

        A_ik = (G_ik - b_k) / (s + eps)

    on all tokens of the turn. With one turn each this is `group_advantages`. A turn that no other completion of the group has, or
    at which all have the same G, gets exactly 0. (Differences of scores, discounted backwards: prime-rl, pull request 3282.)

    Args:
        turn_rewards: B lists, the reward of each turn of the policy.
        turn_ends: B lists of the same lengths, the index of each turn's last token; a turn begins after the one before.
        group_ids: B ids.
        length: T.
        gamma: discount of one turn.
        ddof, eps: as in `group_advantages`.

    Returns:
        float64 [B, T].

    Raises:
        ValueError: the lists do not match, or ends do not increase or lie outside the completion.
    """
    ids = [int(i) for i in group_ids]
    advantages_BT = torch.zeros(len(ids), length, dtype=torch.float64)
    rows_of: dict[int, list[int]] = {}
    for row, (i, rewards, ends) in enumerate(zip(ids, turn_rewards, turn_ends, strict=True)):
        increasing = all(a < b for a, b in itertools.pairwise([-1, *ends, length]))
        if len(rewards) != len(ends) or not increasing:
            raise ValueError(f"turn_ends {list(ends)} do not fit {len(rewards)} turn rewards in {length} tokens")
        rows_of.setdefault(i, []).append(row)
    for rows in rows_of.values():
        returns = {row: _discounted(turn_rewards[row], gamma) for row in rows}
        centred: dict[tuple[int, int], float] = {}
        turns = max(len(values) for values in returns.values())
        for k in range(turns):
            at_k = {row: values[k] for row, values in returns.items() if k < len(values)}
            equal = len(set(at_k.values())) == 1
            mean = sum(at_k.values()) / len(at_k)
            centred |= {(row, k): 0.0 if equal else value - mean for row, value in at_k.items()}
        freedom = max(1, len(centred) - ddof * turns)
        scale = math.sqrt(sum(value**2 for value in centred.values()) / freedom) + eps
        for (row, k), value in centred.items():
            start = turn_ends[row][k - 1] + 1 if k else 0
            advantages_BT[row, start : turn_ends[row][k] + 1] = value / scale
    return advantages_BT


def _discounted(rewards: Sequence[float], gamma: float) -> list[float]:
    """Of each reward, itself and those after it, discounted."""
    found: list[float] = []
    for reward in reversed(rewards):
        found.append(reward + gamma * (found[-1] if found else 0.0))
    return found[::-1]


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates (arXiv 1506.02438, equation 16) along the trained tokens of each row.

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}, where t + 1 is the next *trained* token of
    the row: a token that the mask leaves out is passed over, with its reward and value. Both are 0 after the last.

    Args:
        rewards_BT, values_BT: float [B, T].
        mask_BT: bool [B, T].

    Returns:
        (advantages_BT, returns_BT): returns = advantages + values; both 0 where masked.
    """
    advantages_BT = torch.zeros_like(values_BT)
    next_value_B = next_advantage_B = values_BT.new_zeros(len(values_BT))
    for t in reversed(range(values_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = delta_B + gamma * lam * next_advantage_B
        next_advantage_B = torch.where(mask_BT[:, t], advantage_B, next_advantage_B)
        next_value_B = torch.where(mask_BT[:, t], values_BT[:, t], next_value_B)
        advantages_BT[:, t] = torch.where(mask_BT[:, t], advantage_B, 0)
    return advantages_BT, torch.where(mask_BT, advantages_BT + values_BT, 0)


def whiten(values_BT: Tensor, mask_BT: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Mean 0 and variance 1 over the trained tokens of the whole batch (PPO); 0 where masked."""
    trained = values_BT[mask_BT]
    if len(trained) < 2 or bool((trained == trained[0]).all()):
        return torch.zeros_like(values_BT)
    return torch.where(mask_BT, (values_BT - trained.mean()) / (trained.std() + eps), 0)


History = dict[str, dict[str, float]]


def smoothed_advantages(
    rewards_B: Tensor,
    group_ids_B: Tensor,
    prompt_ids: Sequence[str],
    history: Mapping[str, Mapping[str, Any]],
) -> tuple[Tensor, History]:
    """This visit's standardised rewards blended with all visits' (DCPO's SAS, arXiv 2509.02333, section 3.2).

    On the i-th visit of a prompt, with population moments throughout:
    S_new = ((i-1) A_new + A_total) / i and S_total = (A_new + (i-1) A_total) / i; the advantage is the one smaller in
    absolute value, S_total in a tie. A standard deviation of zero gives exact zeros.

    Args:
        rewards_B: float [B].
        group_ids_B: int [B]. Two groups of one prompt in a call are two visits, in order of appearance.
        prompt_ids: B identities of prompts.
        history: what an earlier call returned, {} at the start; left unchanged. Plain and serialisable: for each prompt
            its visits, and the count, mean and population variance of all its rewards so far.

    Returns:
        (advantages_B, history).
    """
    after: History = {key: dict(value) for key, value in history.items()}
    advantages_B = torch.zeros_like(rewards_B)
    for i in dict.fromkeys(group_ids_B.tolist()):
        rows = (group_ids_B == i).nonzero()[:, 0]
        prompt = prompt_ids[int(rows[0])]
        rewards = rewards_B[rows].double()
        now = _moments(rewards)
        total = after[prompt] = _merged(after[prompt], now) if prompt in after else now
        visit = total["visits"]
        a_new, a_total = _standardised(rewards, now), _standardised(rewards, total)
        s_new = ((visit - 1) * a_new + a_total) / visit
        s_total = (a_new + (visit - 1) * a_total) / visit
        advantages_B[rows] = torch.where(s_new.abs() < s_total.abs(), s_new, s_total).to(rewards_B.dtype)
    return advantages_B, after


def _moments(rewards: Tensor) -> dict[str, float]:
    uniform = bool((rewards == rewards[0]).all())
    return {
        "visits": 1,
        "count": len(rewards),
        "mean": float(rewards[0] if uniform else rewards.mean()),
        "variance": 0.0 if uniform else float(rewards.var(correction=0)),
    }


def _merged(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """Moments of both together. With equal counts this is the paper's recursion; with unequal ones it stays exact."""
    count = before["count"] + now["count"]
    share = now["count"] / count
    step = now["mean"] - before["mean"]
    return {
        "visits": before["visits"] + 1,
        "count": count,
        "mean": before["mean"] + share * step,
        "variance": (1 - share) * before["variance"] + share * now["variance"] + share * (1 - share) * step**2,
    }


def _standardised(rewards: Tensor, moments: Mapping[str, float]) -> Tensor:
    if moments["variance"] == 0:
        return torch.zeros_like(rewards)
    standardised: Tensor = (rewards - moments["mean"]) / moments["variance"] ** 0.5
    return standardised
