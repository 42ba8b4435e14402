"""An algorithm as one frozen value, composed of parts.

Nothing downstream asks for an algorithm's name, or which part it holds: parts are called, and say what they need.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from groupwise.algorithms import (
    aggregation,
    allocation,
    clipping,
    correction,
    credit,
    kl,
    masks,
    ratios,
    selection,
    surrogates,
)
from groupwise.algorithms.allocation import Allocation, Candidates
from groupwise.algorithms.part import Choice, negative_numbers, refuse, settings_of
from groupwise.algorithms.selection import Results

PARTS: dict[str, dict[str, Choice]] = {
    "advantage": {
        "group": Choice(credit.Group, "A_i = (r_i - center) / scale"),
        "leave_one_out": Choice(credit.LeaveOneOut, "A_i = r_i - mean of the group's other rewards"),
        "decoupled": Choice(
            credit.Decoupled, "A_i = sum_k w_k (r_ik - mean_k) / std_k of the group, normalised over the batch; r = sum_k w_k r_k"
        ),
        "process": Choice(credit.Process, "A_it = sum of normalised rewards of the steps that end at t or later"),
        "turns": Choice(
            credit.Turns, "A_ik = (G_ik - b_k)/s, G_ik = sum_{j >= k} gamma^(j-k) r_ij over turns, b_k the group's mean at turn k"
        ),
        "smoothed": Choice(
            credit.Smoothed, "the smaller of ((i-1) A_new + A_total)/i and (A_new + (i-1) A_total)/i, visit i of the prompt"
        ),
        "gae": Choice(credit.Gae, "A_t = sum_l (gamma lambda)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t, whitened"),
        "reward_to_go": Choice(credit.RewardToGo, "A_t = sum_{s >= t} r_s, whitened over the batch's tokens"),
    },
    "ratio": {
        "token": Choice(ratios.token_log_ratio, "rho_t = pi(o_t) / pi_old(o_t)"),
        "sequence": Choice(ratios.sequence_log_ratio, "s = (pi(o) / pi_old(o))^(1/|o|)"),
        "sequence_token": Choice(ratios.sequence_token_log_ratio, "s_t = sg[s] pi(o_t) / sg[pi(o_t)]"),
    },
    "bounds": {
        "fixed": Choice(clipping.Fixed, "[1 - clip_low, 1 + clip_high]"),
        "exponential": Choice(clipping.Exponential, "[e^-clip_low, e^clip_high]"),
        "dynamic": Choice(
            clipping.Dynamic,
            "[1/2 + 1/2 sqrt(max(1 - 4 clip_low/q, 0)), 1/2 + 1/2 sqrt(1 + 4 clip_high/q)], q = pi_old(o_t)",
        ),
        "none": Choice(clipping.unbounded, "none"),
    },
    "surrogate": {
        "clip": Choice(surrogates.Clip, "-min(rho A, clip(rho) A)"),
        "policy_gradient": Choice(surrogates.PolicyGradient, "-A log pi"),
        "cispo": Choice(surrogates.Cispo, "-sg[min(rho, ratio_cap)] A log pi"),
        "sapo": Choice(surrogates.Sapo, "-(4/tau) sigmoid(tau (rho - 1)) A, tau by the sign of A"),
        "gmpo": Choice(surrogates.Gmpo, "-A (prod_t clip(rho_t))^(1/|o|)"),
        "dppo": Choice(surrogates.Dppo, "-rho A, 0 where |pi - pi_old| > divergence_limit the way A pushes"),
        "vespo": Choice(
            surrogates.Vespo, "-sg[w^power e^(decay (1 - w))] A log pi, w = prod_t rho_t; power and decay by the sign of A"
        ),
    },
    "aggregation": {
        "sequence_mean": Choice(aggregation.sequence_mean, "1/n sum_i 1/|o_i| sum_t"),
        "token_mean": Choice(aggregation.token_mean, "1/sum|o_i| sum_i sum_t"),
        "prompt_token_mean": Choice(aggregation.prompt_token_mean, "mean over prompts of 1/sum|o_i| sum_i sum_t"),
        "sequence_sum": Choice(aggregation.sequence_sum, "sum_i 1/|o_i| sum_t"),
        "constant": Choice(aggregation.constant, "1/(n max_length) sum_i sum_t"),
    },
    "kl": {
        "k1": Choice(kl.k1, "log(pi/pi_ref)"),
        "k2": Choice(kl.k2, "log(pi/pi_ref)^2 / 2"),
        "k3": Choice(kl.k3, "pi_ref/pi - log(pi_ref/pi) - 1"),
    },
    "correction": {
        "none": Choice(correction.no_correction, "none"),
        "tis": Choice(correction.Truncate, "min(w, correction_high), w = pi_old/pi_rollout"),
        "mis": Choice(correction.MaskAbove, "w if w <= correction_high else 0, w = pi_old/pi_rollout"),
        "icepop": Choice(correction.MaskOutside, "w if correction_low <= w <= correction_high else 0, w = pi_old/pi_rollout"),
    },
    "mask": {
        "none": Choice(masks.keep_all, "none"),
        "off_policy": Choice(masks.OffPolicySequence, "loss 0 where A < 0 and mean_t log(pi_rollout/pi) > mask_divergence"),
    },
    "selection": {
        "mixed": Choice(selection.Mixed, "0 < #correct < G; of graded rewards, std(r) > spread_above"),
        "band": Choice(selection.Band, "band_low <= pass rate, or mean reward where it is graded, <= band_high"),
    },
    "allocation": {
        "uniform": Choice(allocation.uniform, "the next prompts, group_size completions each"),
        "thompson": Choice(
            allocation.Thompson, "of the candidates those with the least (p - target_rate)^2, p ~ Beta(1 + right, 1 + wrong)"
        ),
        "hit_utility": Choice(
            allocation.HitUtility, "n_q with the largest sum_q P(at least one of n_q is right), p ~ Beta(1 + right, 1 + wrong)"
        ),
    },
}
"""Kind of part -> name in a recipe -> the part. To add one: write it beside its kin, and one line here."""

FORMULAS = {
    "beta": "beta kl(pi, pi_ref) added to each token's loss",
    "kl_reward": "r_t = r [t = last] - kl_reward log(pi_old / pi_ref)",
    "dynamic_sampling": "generate until the batch is full of groups that the selection keeps",
    "overlong_filter": "truncated completions have no trained token",
    "overlong_cache": "r += -clip((|o| - (L - c)) / c, 0, 1), L = max_tokens, c = overlong_cache L",
    "outcome_rewards": "r of a correct, a wrong and an unparsable answer",
}
"""How `groupwise algorithms` prints settings that belong to no part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """What to estimate, what to weigh, what to clip, what to leave out.

    Made by `groupwise.named` from flat settings, which are the keys of [algorithm] in a recipe; `settings` gives them back.
    """

    name: str = "custom"

    advantage: Callable[[credit.Outcomes], credit.Credit] = credit.Group()
    """From rewards to advantages."""
    ratio: Callable[[Tensor, Tensor, Tensor], Tensor] = ratios.token_log_ratio
    """(logprobs_BT, old_logprobs_BT, mask_BT) -> log ratios [B, T]."""
    bounds: Callable[[Tensor], tuple[Tensor, Tensor]] = clipping.Fixed()
    """old_logprobs_BT -> (low_BT, high_BT), bounds on the ratio."""
    surrogate: Callable[[surrogates.Terms], tuple[Tensor, Tensor]] = surrogates.Clip()
    """Terms -> (token_loss_BT, clipped_BT)."""
    aggregation: Callable[..., Tensor] = aggregation.sequence_mean
    """`(mask_BT, *, group_ids_B, max_length)` -> token weights [B, T]."""
    kl: Callable[[Tensor, Tensor], Tensor] = kl.k3
    """(logprobs_BT, ref_logprobs_BT) -> estimate of the KL [B, T]."""
    correction: Callable[[Tensor, Tensor, Tensor], Tensor] = correction.no_correction
    """(old_logprobs_BT, rollout_logprobs_BT, mask_BT) -> importance weights [B, T]."""
    mask: Callable[[surrogates.Terms, Tensor], Tensor] = masks.keep_all
    """(Terms, rollout_logprobs_BT) -> bool [B, T], False where the surrogate's loss is dropped."""
    selection: Callable[[Results], bool] = selection.Mixed()
    """The results of a group -> whether dynamic sampling keeps it."""
    allocation: Callable[[Candidates], Allocation] = allocation.uniform
    """The prompts at hand -> which to generate completions for, and how many."""

    beta: float = 0.0
    """Weight of the KL to the reference in the loss; 0: no reference is loaded for it."""
    kl_ratio_weighted: bool = False
    """Multiply the KL estimate by pi_theta / pi_old, for samples of pi_old."""
    kl_reward: float = 0.0
    """Weight of log(pi_old / pi_ref) subtracted from each token's reward."""
    kl_target: float | None = None
    """Where `kl_reward` is doubled and halved to keep the KL near this (PPO-Penalty)."""
    entropy_bonus: float = 0.0
    """Weight of each token's entropy, subtracted from its loss."""
    dynamic_sampling: bool = False
    """Generate until the batch is full of groups that `selection` keeps."""
    overlong_filter: bool = False
    """Truncated completions carry no weight in the loss."""
    overlong_in_baseline: bool = False
    """Whether a filtered completion still counts in its group's baseline."""
    overlong_cache: float = 0.0
    """Share of the token limit over which the soft overlong punishment grows; 0: none."""
    outcome_rewards: tuple[float, float, float] | None = None
    """Rewards of a correct, a wrong and an unparsable answer, where the task's reward is nothing but that verdict;
    None ("none" in a recipe): the task's own."""

    references: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Of parts from the user's files: kind -> "file.py:name"."""

    def __post_init__(self) -> None:
        refuse(itertools.chain(negative_numbers(self), self._contradictions()))

    def _contradictions(self) -> Iterable[tuple[str, bool, str]]:
        """(setting, whether it is wrong, what is wrong with it)."""
        yield "overlong_cache", self.overlong_cache > 1, "a share of the token limit lies in 0 to 1"
        yield "kl_target", self.kl_target is not None and self.kl_reward == 0, "needs kl_reward above 0 to start from"
        yield (
            "overlong_in_baseline",
            self.overlong_in_baseline and not self.overlong_filter,
            "only a filtered completion can be left out of the baseline; set overlong_filter = true",
        )
        for key in ("kl_reward", "overlong_cache"):
            wrong = "steps" in self.needs and bool(getattr(self, key))
            yield key, wrong, "changes the reward of a completion, and process supervision reads those of its steps; set it to 0"
        yield (
            "kl_reward",
            self.kl_reward > 0 and "components" in self.needs,
            f"takes from the reward as a whole, and the advantage {self.choice('advantage')} reads its components; set it to 0",
        )
        yield (
            "selection",
            self.selection != selection.Mixed() and not self.dynamic_sampling,
            "is how dynamic sampling chooses groups; set dynamic_sampling = true",
        )
        one_ratio = self.ratio is ratios.sequence_log_ratio or getattr(self.surrogate, "one_ratio_per_sequence", False)
        yield (
            "ratio",
            one_ratio and getattr(self.advantage, "per_token", False),
            "one ratio for the sequence cannot carry advantages that differ between tokens; use 'sequence_token'",
        )
        yield (
            "kl_ratio_weighted",
            self.kl_ratio_weighted and self.beta == 0,
            "weighs the KL in the loss, so it needs beta above 0",
        )
        yield "kl", self.kl is not kl.k3 and self.beta == 0, "is the estimate of the KL in the loss, so it needs beta above 0"
        rewards = self.outcome_rewards
        three = rewards is None or (isinstance(rewards, tuple) and len(rewards) == 3)
        yield "outcome_rewards", not three, f"expected three numbers (correct, wrong, unparsed), not {rewards!r}"
        yield (
            "ratio",
            self.ratio is not ratios.token_log_ratio and not getattr(self.surrogate, "reads_ratio", True),
            f"the surrogate {self.choice('surrogate')} uses no ratio; leave it at 'token'",
        )
        sequence = self.ratio in (ratios.sequence_log_ratio, ratios.sequence_token_log_ratio)
        yield (
            "bounds",
            sequence and getattr(self.bounds, "token_ratio_only", False),
            "dynamic bounds follow from a token's own probability, so they ask for ratio = 'token'",
        )
        yield (
            "surrogate",
            sequence and getattr(self.surrogate, "one_ratio_per_sequence", False),
            f"{self.choice('surrogate')} takes its own mean or product over the sequence, so it asks for ratio = 'token'",
        )
        yield (
            "bounds",
            self.bounds is not clipping.unbounded and not getattr(self.surrogate, "reads_bounds", True),
            f"the surrogate {self.choice('surrogate')} clips nothing to bounds; set bounds = 'none'",
        )

    def choice(self, kind: str) -> str:
        """The name of the part of a kind, as a recipe has it."""
        part = getattr(self, kind)
        for name, known in PARTS[kind].items():
            if part is known.make or (isinstance(known.make, type) and type(part) is known.make):
                return name
        own = part if hasattr(part, "__qualname__") else type(part)
        return self.references.get(kind) or f"{own.__module__}:{own.__qualname__}"

    def settings(self) -> dict[str, Any]:
        """Every setting in use, flat, as the keys of [algorithm]: `named("custom", **settings)` is this algorithm again."""
        flat: dict[str, Any] = {}
        for item in fields(self):
            if item.name in PARTS:
                flat |= {item.name: self.choice(item.name), **settings_of(getattr(self, item.name))}
            elif item.name not in ("name", "references"):
                flat[item.name] = getattr(self, item.name)
        return flat

    @property
    def needs(self) -> frozenset[str]:
        """What its advantage reads beyond a group's rewards: "components", "steps", "turns", "critic", "history"."""
        return frozenset(getattr(self.advantage, "needs", ()))

    @property
    def zero_advantage_is_idle(self) -> bool:
        """Whether a row whose advantages are all zero adds nothing to the gradient, so that it need not be run."""
        return self.beta == 0 and self.entropy_bonus == 0 and getattr(self.surrogate, "zero_advantage_is_idle", False)

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen reference model is compared with."""
        return self.beta > 0 or self.kl_reward > 0

    @property
    def needs_rollout_logprobs(self) -> bool:
        """Whether the loss reads the log-probabilities as the sampler returned them."""
        return self.corrects_mismatch or self.mask is not masks.keep_all

    @property
    def corrects_mismatch(self) -> bool:
        """Whether it corrects for the difference between sampler and learner."""
        return self.correction is not correction.no_correction
