"""Closed forms behind the papers' figures, one number at a time: the same formulas as the parts of an algorithm, without tensors.

`groupwise explore` translates this file to JavaScript (`evidence.javascript`), which is where its figures take every number
from. So it keeps to what that translation knows: floats, strings, lists, arithmetic, `if`, `for` over a range or a list, and the
functions of `math` listed there. tests/test_theory.py compares it with the parts over random inputs.
"""

import math

# --- what clipping allows ---------------------------------------------------------------------------------------------


def steps_to_reach(start: float, target: float, clip_high: float) -> float:
    """Updates until a token's probability climbs from start to target when every one of them ends at the upper clip.

    log(target / start) / log(1 + clip_high): what the clip would allow, not what an optimiser does, since a clipped
    gradient stops pushing but does not hold the model weights back.
    """
    return math.log(target / start) / math.log1p(clip_high)


def probability_after(start: float, steps: float, clip_high: float) -> float:
    """min(1, start (1 + clip_high)^steps): the same climb, which ends at 1."""
    return min(1.0, start * math.exp(steps * math.log1p(clip_high)))


def upper_clip_is_inert_above(clip_high: float) -> float:
    """1 / (1 + clip_high): the old probability above which the ceiling (1 + clip_high) pi_old exceeds 1."""
    return 1 / (1 + clip_high)


def log10_product_bound(clip_high: float, tokens: int) -> float:
    """log10 of (1 + clip_high)^tokens, how far a sequence's ratio may drift when each token's is clipped alone."""
    return tokens * math.log1p(clip_high) / math.log(10)


def dead_group_probability(pass_rate: float, group_size: int) -> float:
    """p^G + (1 - p)^G: the chance that a group's answers are all right or all wrong, and teach nothing."""
    return pass_rate**group_size + (1 - pass_rate) ** group_size


def lower_bound(bounds: str, old: float, clip_low: float) -> float:
    """The lower bound on the ratio of a token of old probability `old`, by the name of the bounds in a recipe."""
    if bounds == "fixed":
        return 1 - clip_low
    if bounds == "exponential":
        return math.exp(-clip_low)
    if bounds == "dynamic":
        return 0.5 + 0.5 * math.sqrt(max(1 - 4 * clip_low / old, 0.0))
    return 0.0


def upper_bound(bounds: str, old: float, clip_high: float, cap: float) -> float:
    """The upper bound; `cap` is the largest one of "dynamic" bounds."""
    if bounds == "fixed":
        return 1 + clip_high
    if bounds == "exponential":
        return math.exp(clip_high)
    if bounds == "dynamic":
        return min(cap, 0.5 + 0.5 * math.sqrt(1 + 4 * clip_high / old))
    return math.inf


def clip_ceiling(old: float, clip_high: float) -> float:
    """min(1, (1 + clip_high) old): the probability at the upper bound."""
    return min(1.0, (1 + clip_high) * old)


# --- surrogates: what one token adds to the objective, and the factor of grad log pi in its gradient ------------------


def clip_surrogate(ratio: float, old: float, advantage: float, settings: dict[str, float]) -> list[float]:
    """min(ratio A, clip(ratio) A), with the largest ratio of both signs (DCPO) and of negative ones (dual clip); inf: none."""
    ratio_cap = settings["ratio_cap"]
    low = settings["low"]
    high = min(settings["high"], ratio_cap)
    cap = min(ratio_cap, settings["dual_clip"]) if advantage < 0 else math.inf
    clipped = (advantage > 0 and ratio > high) or (advantage < 0 and (ratio < low or ratio > cap))
    capped = min(ratio, ratio_cap, cap)
    within = min(max(capped, low), high)
    return [min(capped * advantage, within * advantage), 0.0 if clipped else ratio * advantage]


def policy_gradient_surrogate(ratio: float, old: float, advantage: float, settings: dict[str, float]) -> list[float]:
    """A log pi, pi = ratio old."""
    return [advantage * math.log(ratio * old), advantage]


def cispo_surrogate(ratio: float, old: float, advantage: float, settings: dict[str, float]) -> list[float]:
    """sg[min(ratio, ratio_cap)] A log pi."""
    weight = min(ratio, settings["ratio_cap"])
    return [weight * advantage * math.log(ratio * old), weight * advantage]


def sapo_surrogate(ratio: float, old: float, advantage: float, settings: dict[str, float]) -> list[float]:
    """4/tau sigmoid(tau (ratio - 1)) A."""
    tau = settings["gate_positive"] if advantage > 0 else settings["gate_negative"]
    gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
    return [4 / tau * gate * advantage, 4 * gate * (1 - gate) * ratio * advantage]


def gmpo_surrogate(ratio: float, old: float, advantage: float, settings: dict[str, float]) -> list[float]:
    """A times the clipped ratio, which for a completion of one token is the geometric mean of its tokens' clipped ratios."""
    cut = min(ratio, settings["high"]) if advantage > 0 else max(ratio, settings["low"])
    return [cut * advantage, cut * advantage if cut == ratio else 0.0]


def dppo_surrogate(ratio: float, old: float, advantage: float, settings: dict[str, float]) -> list[float]:
    """ratio A, or 0 once |pi - old| > divergence_limit the way A pushes."""
    moved = (ratio * old - old) * advantage
    value = 0.0 if moved > settings["divergence_limit"] * abs(advantage) else ratio * advantage
    return [value, value]


def vespo_surrogate(ratio: float, old: float, advantage: float, settings: dict[str, float]) -> list[float]:
    """sg[w^power e^(decay (1 - w))] A log pi, for a completion of one token, whose w is the ratio."""
    power = settings["power_negative"] if advantage < 0 else settings["power_positive"]
    decay = settings["decay_negative"] if advantage < 0 else settings["decay_positive"]
    kernel = math.exp(power * math.log(ratio) + decay * (1 - ratio))
    return [kernel * advantage * math.log(ratio * old), kernel * advantage]


SURROGATES = {
    "clip": clip_surrogate, "policy_gradient": policy_gradient_surrogate, "cispo": cispo_surrogate, "sapo": sapo_surrogate,
    "gmpo": gmpo_surrogate, "dppo": dppo_surrogate, "vespo": vespo_surrogate,
}  # fmt: skip
"""By their names in a recipe."""


def surrogate(name: str, ratio: float, old: float, advantage: float, settings: dict[str, float]) -> list[float]:
    """[objective, factor of grad log pi] of the surrogate that a recipe calls `name`.

    Args:
        settings: every number that a surrogate reads, `low` and `high` for the bounds on the ratio; inf where there is no cap.
    """
    return SURROGATES[name](ratio, old, advantage, settings)


# --- rewards and token weights ----------------------------------------------------------------------------------------


def overlong_penalty(length: float, limit: float, cache: float) -> float:
    """DAPO's soft overlong punishment: 0 up to limit - cache tokens, then linearly down to -1 at the limit."""
    if cache == 0:
        return -1.0 if length > limit else 0.0
    return -min(max((length - (limit - cache)) / cache, 0.0), 1.0)


def token_weight(mode: str, length: float, lengths: list[float], limit: float) -> float:
    """What a token counts in the loss that is in a completion of `length` tokens, among completions of `lengths`."""
    if mode == "sequence_mean":
        return 1 / (len(lengths) * length)
    if mode == "sequence_sum":
        return 1 / length
    if mode == "constant":
        return 1 / (len(lengths) * limit)
    return 1 / sum(lengths)


# --- advantages -------------------------------------------------------------------------------------------------------


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def deviation(values: list[float], ddof: int) -> float:
    """Standard deviation with len - ddof, at least 1, degrees of freedom; exactly 0 where all are equal."""
    if min(values) == max(values):
        return 0.0
    middle = mean(values)
    return math.sqrt(sum([(value - middle) ** 2 for value in values]) / max(1, len(values) - ddof))


def standardised(values: list[float], ddof: int, eps: float) -> list[float]:
    """(value - mean) / (standard deviation + eps); zeros where all are equal."""
    middle = mean(values)
    scale = deviation(values, ddof)
    return [(value - middle) / (scale + eps) if scale > 0 else 0.0 for value in values]


def grpo_advantages(rewards: list[float], rest: list[float], ddof: int, eps: float) -> list[float]:
    """Centred on the group's mean and divided by its standard deviation."""
    return standardised(rewards, ddof, eps)


def dr_grpo_advantages(rewards: list[float], rest: list[float], ddof: int, eps: float) -> list[float]:
    """Centred alone."""
    middle = mean(rewards)
    return [reward - middle for reward in rewards]


def maxrl_advantages(rewards: list[float], rest: list[float], ddof: int, eps: float) -> list[float]:
    """Divided by the group's mean."""
    middle = mean(rewards)
    return [(reward - middle) / middle if middle > 0 else 0.0 for reward in rewards]


def rloo_advantages(rewards: list[float], rest: list[float], ddof: int, eps: float) -> list[float]:
    """Each against the mean of the others; 0 where there are none."""
    others = len(rewards) - 1
    return [reward - (sum(rewards) - reward) / others if others > 0 else 0.0 for reward in rewards]


def dcpo_advantages(rewards: list[float], rest: list[float], ddof: int, eps: float) -> list[float]:
    """At a prompt's first visit, before there is a history to smooth with."""
    return standardised(rewards, 0, 0.0)


def lite_ppo_advantages(rewards: list[float], rest: list[float], ddof: int, eps: float) -> list[float]:
    """Centred on the group's mean and divided by the batch's standard deviation."""
    middle = mean(rewards)
    scale = deviation([*rewards, *rest], ddof)
    return [(reward - middle) / (scale + eps) for reward in rewards]


def gdpo_advantages(rewards: list[float], rest: list[float], ddof: int, eps: float) -> list[float]:
    """Of one reward: normalised in the group, and again over the batch."""
    within = standardised(rewards, ddof, eps)
    both = [*within, *standardised(rest, ddof, eps)] if len(rest) > 0 else within
    return standardised(both, ddof, eps)[: len(rewards)]


def reinforce_pp_advantages(rewards: list[float], rest: list[float], ddof: int, eps: float) -> list[float]:
    """Normalised over the batch: of completions of one token each, without a KL penalty."""
    return standardised([*rewards, *rest], 1, 1e-8)[: len(rewards)]


ESTIMATORS = {
    "grpo": grpo_advantages, "dr_grpo": dr_grpo_advantages, "maxrl": maxrl_advantages, "rloo": rloo_advantages,
    "dcpo": dcpo_advantages, "lite_ppo": lite_ppo_advantages, "gdpo": gdpo_advantages, "reinforce_pp": reinforce_pp_advantages,
}  # fmt: skip
"""By the algorithms that have them."""


def group_estimate(rewards: list[float], rest: list[float], name: str, ddof: int, eps: float) -> list[float]:
    """The advantages of a group's completions by an estimator; `rest`: rewards of the batch's other group."""
    return ESTIMATORS[name](rewards, rest, ddof, eps)


def smoothed_visits(rights: list[int], size: int) -> list[list[float]]:
    """DCPO's smoothed advantages over the visits of one prompt, for rewards 1 and 0.

    Args:
        rights: how many of the `size` completions are right at each visit.

    Returns:
        For each visit, the smoothed advantage of a right and of a wrong completion, and the right one's within its group alone.
    """
    found: list[list[float]] = []
    count = 0
    middle = 0.0
    variance = 0.0
    for right in rights:
        visit = len(found) + 1
        fresh = right / size
        share = size / (count + size)
        step = fresh - middle
        variance = (1 - share) * variance + share * fresh * (1 - fresh) + share * (1 - share) * step**2
        middle = middle + share * step
        count = count + size
        both = []
        for reward in [1.0, 0.0]:
            alone = (reward - fresh) / math.sqrt(fresh * (1 - fresh)) if 0 < right < size else 0.0
            total = (reward - middle) / math.sqrt(variance) if variance > 0 else 0.0
            by_new = ((visit - 1) * alone + total) / visit
            by_total = (alone + (visit - 1) * total) / visit
            both.append(by_new if abs(by_new) < abs(by_total) else by_total)
        found.append([both[0], both[1], (1 - fresh) / math.sqrt(fresh * (1 - fresh)) if 0 < right < size else 0.0])
    return found


def discounted(rewards: list[float], gamma: float) -> list[float]:
    """Of each reward, itself and those after it, each discounted by gamma per turn."""
    return [sum([gamma ** (j - k) * rewards[j] for j in range(k, len(rewards))]) for k in range(len(rewards))]


def group_credit(group: list[list[float]], gamma: float, ddof: int, eps: float) -> list[list[float]]:
    """The sum of a conversation's rewards, normalised in the group, for each of its turns."""
    totals = standardised([sum(rewards) for rewards in group], ddof, eps)
    return [[totals[i] for _ in group[i]] for i in range(len(group))]


def process_credit(group: list[list[float]], gamma: float, ddof: int, eps: float) -> list[list[float]]:
    """A turn is a step: its reward is normalised over all turns of the group, and a turn gets the sum of those from it on."""
    pool = [reward for rewards in group for reward in rewards]
    scale = deviation(pool, ddof)
    middle = mean(pool)
    steps = [[(reward - middle) / (scale + eps) if scale > 0 else 0.0 for reward in rewards] for rewards in group]
    return [discounted(rewards, 1.0) for rewards in steps]


def turns_credit(group: list[list[float]], gamma: float, ddof: int, eps: float) -> list[list[float]]:
    """Discounted returns, each centred on those of the same turn in the group's other conversations."""
    returns = [discounted(rewards, gamma) for rewards in group]
    turns = max([len(rewards) for rewards in group])
    centred = [[0.0 for _ in rewards] for rewards in group]
    squares = 0.0
    for k in range(turns):
        reached = [values[k] for values in returns if len(values) > k]
        for i in range(len(group)):
            if len(returns[i]) > k and min(reached) < max(reached):
                centred[i][k] = returns[i][k] - mean(reached)
                squares = squares + centred[i][k] ** 2
    freedom = max(1, sum([len(rewards) for rewards in group]) - ddof * turns)
    return [[value / (math.sqrt(squares / freedom) + eps) for value in values] for values in centred]


CREDITS = {"group": group_credit, "process": process_credit, "turns": turns_credit}
"""By their names in a recipe."""


def turn_credit(group: list[list[float]], name: str, gamma: float, ddof: int, eps: float) -> list[list[float]]:
    """The advantage of each turn of each conversation, from the rewards of each conversation's turns; "turns" reads gamma."""
    return CREDITS[name](group, gamma, ddof, eps)


# --- sampling and the gap between sampler and learner -----------------------------------------------------------------


def zipf_probabilities(tokens: int, exponent: float, temperature: float) -> list[float]:
    """Softmax of -exponent log(rank) / temperature: an example of a next-token distribution, likeliest first."""
    weights = [math.exp(-exponent * math.log(rank) / temperature) for rank in range(1, tokens + 1)]
    total = sum(weights)
    return [weight / total for weight in weights]


def truncated_probabilities(probabilities: list[float], top_k: int, top_p: float, min_p: float) -> list[float]:
    """What top-k, top-p and min-p, one after another, leave of a distribution (likeliest first, no two alike), normalised again.

    top_k = 0, top_p = 1 and min_p = 0 leave all.
    """
    size = len(probabilities)
    kept = min(top_k, size) if top_k > 0 else size
    mass = sum(probabilities[:kept])
    before = 0.0
    last = 0
    for i in range(kept):
        if i == 0 or ((top_p == 1 or before < top_p * mass) and probabilities[i] >= min_p * probabilities[0]):
            last = i + 1
        before = before + probabilities[i]
    total = sum(probabilities[:last])
    return [probabilities[i] / total if i < last else 0.0 for i in range(size)]


def tis_weight(ratio: float, low: float, high: float) -> float:
    """Truncated at `high`."""
    return min(ratio, high)


def mis_weight(ratio: float, low: float, high: float) -> float:
    """Masked above `high`."""
    return ratio if ratio <= high else 0.0


def icepop_weight(ratio: float, low: float, high: float) -> float:
    """Masked below `low` and above `high`."""
    return ratio if low <= ratio <= high else 0.0


def no_weight(ratio: float, low: float, high: float) -> float:
    """Without a correction every token counts once."""
    return 1.0


CORRECTIONS = {"none": no_weight, "tis": tis_weight, "mis": mis_weight, "icepop": icepop_weight}
"""By their names in a recipe."""


def correction_weight(name: str, ratio: float, low: float, high: float) -> float:
    """The importance weight of a ratio pi_old / pi_rollout, by the correction's name in a recipe."""
    return CORRECTIONS[name](ratio, low, high)


# --- an example of log ratios -----------------------------------------------------------------------------------------


def normal_noise(count: int) -> list[float]:
    """Normally distributed pseudo-random numbers, the same each time: Lehmer's generator, then Box and Muller's transform."""
    state = 12345.0
    found = []
    for _ in range(count):
        state = math.fmod(state * 16807, 2147483647)
        radius = math.sqrt(-2 * math.log(state / 2147483647))
        state = math.fmod(state * 16807, 2147483647)
        found.append(radius * math.cos(2 * math.pi * state / 2147483647))
    return found


def running_sums(values: list[float]) -> list[float]:
    """Of each value, the sum of it and those before it."""
    found = []
    total = 0.0
    for value in values:
        total = total + value
        found.append(total)
    return found
