"""An algorithm as one frozen value, the parts it is composed of, and the named ones.

A setting that chooses a part holds its name here, or a function of the same form; nothing downstream asks which.
"""

import difflib
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch

from groupwise.algorithms import aggregation, clipping, correction, credit, kl, ratios, surrogates


@dataclass(frozen=True, slots=True)
class Part:
    """One choice for a part of an algorithm."""

    function: Callable[..., Any]
    formula: str
    """How `groupwise algorithms` prints it."""
    needs: frozenset[str] = frozenset()
    """What it reads beyond a group's rewards: "steps", "critic", "history"."""


def _unbounded(old_logprobs_BT: torch.Tensor, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros_like(old_logprobs_BT), torch.full_like(old_logprobs_BT, math.inf)


PARTS: dict[str, dict[str, Part]] = {
    "advantage": {
        "group": Part(credit.group, "A_i = (r_i - center) / scale"),
        "leave_one_out": Part(credit.leave_one_out, "A_i = r_i - mean of the group's other rewards"),
        "process": Part(
            credit.process, "A_it = sum of normalised rewards of the steps that end at t or later", frozenset({"steps"})
        ),
        "smoothed": Part(
            credit.smoothed,
            "the smaller of ((i-1) A_new + A_total)/i and (A_new + (i-1) A_total)/i, visit i of the prompt",
            frozenset({"history"}),
        ),
        "gae": Part(
            credit.gae,
            "A_t = sum_l (gamma lambda)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t, whitened",
            frozenset({"critic"}),
        ),
    },
    "ratio": {
        "token": Part(ratios.token_log_ratio, "rho_t = pi(o_t) / pi_old(o_t)"),
        "sequence": Part(ratios.sequence_log_ratio, "s = (pi(o) / pi_old(o))^(1/|o|)"),
        "sequence_token": Part(ratios.sequence_token_log_ratio, "s_t = sg[s] pi(o_t) / sg[pi(o_t)]"),
    },
    "bounds": {
        "fixed": Part(clipping.fixed_bounds, "[1 - clip_low, 1 + clip_high]"),
        "exponential": Part(clipping.exponential_bounds, "[e^-clip_low, e^clip_high]"),
        "dynamic": Part(
            functools.partial(clipping.dynamic_bounds, cap=math.inf),
            "[1/2 + 1/2 sqrt(max(1 - 4 clip_low/q, 0)), 1/2 + 1/2 sqrt(1 + 4 clip_high/q)], q = pi_old(o_t)",
        ),
        "none": Part(_unbounded, "none"),
    },
    "surrogate": {
        "clip": Part(surrogates.clip, "-min(rho A, clip(rho) A)"),
        "policy_gradient": Part(surrogates.policy_gradient, "-A log pi"),
        "cispo": Part(surrogates.cispo, "-sg[min(rho, ratio_cap)] A log pi"),
        "sapo": Part(surrogates.sapo, "-(4/tau) sigmoid(tau (rho - 1)) A, tau by the sign of A"),
        "gmpo": Part(surrogates.gmpo, "-A (prod_t clip(rho_t))^(1/|o|)"),
        "dppo": Part(surrogates.dppo, "-rho A, 0 where |pi - pi_old| > divergence_limit the way A pushes"),
    },
    "aggregation": {
        mode: Part(functools.partial(aggregation.token_weights, mode=mode), formula)
        for mode, formula in {
            "sequence_mean": "1/n sum_i 1/|o_i| sum_t",
            "token_mean": "1/sum|o_i| sum_i sum_t",
            "prompt_token_mean": "mean over prompts of 1/sum|o_i| sum_i sum_t",
            "sequence_sum": "sum_i 1/|o_i| sum_t",
            "constant": "1/(n max_length) sum_i sum_t",
        }.items()
    },
    "kl": {
        "k1": Part(kl.k1, "log(pi/pi_ref)"),
        "k2": Part(kl.k2, "log(pi/pi_ref)^2 / 2"),
        "k3": Part(kl.k3, "pi_ref/pi - log(pi_ref/pi) - 1"),
    },
    "correction": {
        "none": Part(correction.none, "none"),
        "tis": Part(correction.truncate, "min(w, correction_high), w = pi_old/pi_rollout"),
        "mis": Part(correction.mask_above, "w if w <= correction_high else 0, w = pi_old/pi_rollout"),
        "icepop": Part(correction.mask_outside, "w if correction_low <= w <= correction_high else 0, w = pi_old/pi_rollout"),
    },
}
FORMULAS = {
    "beta": "beta kl(pi, pi_ref) added to each token's loss",
    "kl_reward": "r_t = r [t = last] - kl_reward log(pi_old / pi_ref)",
    "dynamic_sampling": "0 < #correct < G",
    "overlong_filter": "truncated completions have no trained token",
    "overlong_cache": "r += -clip((|o| - (L - c)) / c, 0, 1), L = max_tokens, c = overlong_cache L",
    "outcome_rewards": "r of a correct, a wrong and an unparsable answer",
}
"""How `groupwise algorithms` prints settings that are no parts."""
PartName = str | Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """What to estimate, what to weigh, what to clip, what to leave out. Every field is a key of [algorithm] in a recipe."""

    name: str = "custom"

    advantage: PartName = "group"
    """"group", "leave_one_out", "process", "smoothed", "gae", or a function (Outcomes, Algorithm) -> Credit,
    whose attribute `needs` may hold "steps", "critic", "history"."""
    center: Literal["group", "batch", "none"] = "group"
    scale: Literal["group", "batch", "mean", "none"] = "group"
    ddof: Literal[0, 1] = 1
    advantage_eps: float = 1e-6
    gamma: float = 1.0
    gae_lambda: float = 0.95

    ratio: PartName = "token"
    """"token", "sequence", "sequence_token", or a function (logprobs_BT, old_logprobs_BT, mask_BT) -> log ratios [B, T]."""
    bounds: PartName = "fixed"
    """"fixed", "exponential", "dynamic", "none", or a function (old_logprobs_BT, low, high) -> (low_BT, high_BT)."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio_cap: float | None = None
    """The largest ratio, whatever the bounds and the sign of the advantage."""
    dual_clip: float | None = None
    """The largest ratio where the advantage is negative."""

    surrogate: PartName = "clip"
    """"clip", "policy_gradient", "cispo", "sapo", "gmpo", "dppo", or a function Terms -> (token_loss_BT, clipped_BT)."""
    gate_positive: float = 1.0
    gate_negative: float = 1.05
    divergence_limit: float = 0.2
    aggregation: PartName = "sequence_mean"
    """A mode of `token_weights`, or a function (mask_BT, *, group_ids_B, max_length) -> weights [B, T]."""

    kl: PartName = "k3"
    """"k1", "k2", "k3", or a function (logprobs_BT, ref_logprobs_BT) -> [B, T]."""
    beta: float = 0.0
    """Weight of the KL to the reference in the loss; 0: no reference is loaded for it."""
    kl_ratio_weighted: bool = False
    """Multiply the KL estimate by pi_theta / pi_old, for samples of pi_old."""
    kl_reward: float = 0.0
    """Weight of log(pi_old / pi_ref) taken off each token's reward."""
    kl_target: float | None = None
    """Where `kl_reward` is doubled and halved to keep the KL near this (PPO-Penalty)."""
    entropy_bonus: float = 0.0

    correction: PartName = "none"
    """"none", "tis", "mis", "icepop", or a function (ratio_BT, low, high) -> weights [B, T]."""
    correction_level: Literal["token", "sequence"] = "token"
    correction_low: float = 0.5
    correction_high: float = 2.0

    dynamic_sampling: bool = False
    """Generate until the batch is full of groups with both right and wrong answers."""
    overlong_filter: bool = False
    """Truncated completions carry no weight in the loss."""
    overlong_in_baseline: bool = False
    """Whether a filtered completion still counts in its group's baseline."""
    overlong_cache: float = 0.0
    """Share of the token limit over which the soft overlong punishment grows; 0: none."""
    outcome_rewards: tuple[float, float, float] | None = None
    """Rewards of a correct, a wrong and an unparsable answer, where the task's reward is nothing but that verdict;
    None: the task's own."""

    def __post_init__(self) -> None:
        for key in PARTS:
            choice = getattr(self, key)
            if not callable(choice) and choice not in PARTS[key]:
                raise ValueError(f"{key}: there is no {choice!r}{_hint(choice, PARTS[key])}")
        for key, wrong, reason in self._contradictions():
            if wrong:
                raise ValueError(f"{key}: {reason}")

    def _contradictions(self) -> Iterable[tuple[str, bool, str]]:
        """(key, whether it is so, what is wrong with it)."""
        for key in (field.name for field in fields(self)):
            value = getattr(self, key)
            if isinstance(value, float | int) and not isinstance(value, bool):
                yield key, not 0 <= value < math.inf, f"{value} is not a number of at least 0"
        for key in ("gamma", "gae_lambda"):
            yield key, getattr(self, key) > 1, "must lie in 0 to 1"
        for key in ("gate_positive", "gate_negative"):
            yield key, getattr(self, key) == 0, "must be above 0"
        for key, known in (
            ("center", ("group", "batch", "none")),
            ("scale", ("group", "batch", "mean", "none")),
            ("ddof", (0, 1)),
        ):
            yield key, getattr(self, key) not in known, f"{getattr(self, key)!r} is not one of {known}"
        yield "overlong_cache", not 0 <= self.overlong_cache <= 1, "a share of the token limit lies in 0 to 1"
        yield "clip_low", self.bounds == "fixed" and self.clip_low > 1, "a ratio cannot fall below 0, so 1 is the most"
        yield "dual_clip", self.dual_clip is not None and self.dual_clip <= 1, "must be above 1"
        ignored = self.dual_clip is not None and not callable(self.surrogate) and self.surrogate != "clip"
        yield "dual_clip", ignored, f"the surrogate {self.surrogate} does not use it"
        yield "correction_low", self.correction_low > self.correction_high, "is above correction_high, so nothing would count"
        for key in ("kl_reward", "overlong_cache"):
            wrong = bool("steps" in self.needs and getattr(self, key))
            yield key, wrong, "changes the reward of a completion, and process supervision reads those of its steps; set it to 0"
        yield "ratio_cap", self.ratio_cap is not None and self.ratio_cap <= 1, "must be above 1"
        yield "ratio_cap", self.surrogate == "cispo" and self.ratio_cap is None, "the surrogate cispo needs one, such as 5.0"
        yield (
            "scale",
            self.scale == "mean" and self.center != "group",
            "dividing by the group's mean asks for center = 'group'",
        )
        yield (
            "ratio",
            (self.ratio == "sequence" or self.surrogate == "gmpo") and bool({"steps", "critic"} & self.needs),
            "one ratio for the sequence cannot carry advantages that differ between tokens; use 'sequence_token'",
        )
        yield (
            "bounds",
            self.bounds == "dynamic" and self.ratio != "token" and not callable(self.ratio),
            "dynamic bounds follow from a token's own probability, so they ask for ratio = 'token'",
        )
        yield (
            "surrogate",
            self.surrogate == "gmpo" and self.ratio != "token" and not callable(self.ratio),
            "gmpo takes its own mean over the sequence, so it asks for ratio = 'token'",
        )
        yield "kl_target", self.kl_target is not None and self.kl_reward == 0, "needs kl_reward above 0 to start from"
        yield (
            "overlong_in_baseline",
            self.overlong_in_baseline and not self.overlong_filter,
            "only a filtered completion can be left out of the baseline; set overlong_filter = true",
        )

    def part(self, key: str) -> Callable[..., Any]:
        """The function of a part, one of the keys of `PARTS`."""
        choice = getattr(self, key)
        return choice if callable(choice) else PARTS[key][choice].function

    @property
    def needs(self) -> frozenset[str]:
        """What its advantage reads beyond a group's rewards: "steps", "critic", "history"."""
        if callable(self.advantage):
            return frozenset(getattr(self.advantage, "needs", ()))
        return PARTS["advantage"][self.advantage].needs

    @property
    def zero_advantage_is_idle(self) -> bool:
        """Whether a row whose advantages are all zero adds nothing to the gradient, so that it need not be run."""
        return self.beta == 0 and self.entropy_bonus == 0 and not callable(self.surrogate)

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0 or self.kl_reward > 0


def _hint(word: object, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


_GRPO = Algorithm(name="grpo", beta=0.04)
_DCPO = Algorithm(
    name="dcpo",
    advantage="smoothed",
    bounds="dynamic",
    clip_low=0.16,
    clip_high=0.2,
    ratio_cap=10.0,
    aggregation="sequence_sum",
    outcome_rewards=(1.0, 0.0, -1.0),
)
_GSPO = Algorithm(name="gspo", ratio="sequence", clip_low=3e-4, clip_high=4e-4)
NAMED: dict[str, tuple[Algorithm, str, str]] = {
    algorithm.name: (algorithm, summary, paper)
    for algorithm, summary, paper in [
        (
            Algorithm(name="ppo", advantage="gae", kl_reward=0.05),
            "a learned critic's advantages, token ratios, a KL penalty in the reward",
            "arXiv 1707.06347",
        ),
        (
            Algorithm(name="reinforce", scale="none", bounds="none", surrogate="policy_gradient"),
            "reward minus the group's mean, times log pi",
            "Williams 1992",
        ),
        (_GRPO, "rewards normalised within the group, token ratios, k3 penalty", "arXiv 2402.03300"),
        (replace(_GRPO, name="grpo_process", advantage="process"), "GRPO on rewards of steps", "arXiv 2402.03300"),
        (
            Algorithm(
                name="dapo",
                clip_high=0.28,
                aggregation="token_mean",
                dynamic_sampling=True,
                overlong_cache=0.2,
                outcome_rewards=(1.0, -1.0, -1.0),
            ),
            "decoupled clip, dynamic sampling, token-level loss, overlong shaping",
            "arXiv 2503.14476",
        ),
        (_GSPO, "one ratio per sequence: the geometric mean of its tokens'", "arXiv 2507.18071"),
        (replace(_GSPO, name="gspo_token", ratio="sequence_token"), "GSPO with advantages per token", "arXiv 2507.18071"),
        (_DCPO, "clip bounds by token probability, advantages smoothed over visits", "arXiv 2509.02333"),
        (
            Algorithm(name="dr_grpo", scale="none", aggregation="constant"),
            "GRPO without the std and without 1/|o|",
            "arXiv 2503.20783",
        ),
        (
            Algorithm(name="lite_ppo", scale="batch", aggregation="token_mean"),
            "group mean, batch std, token-level loss",
            "arXiv 2508.08221",
        ),
        (
            Algorithm(name="rloo", advantage="leave_one_out", bounds="none", surrogate="policy_gradient", aggregation="constant"),
            "reward minus the mean of the others', times log pi of the whole sequence",
            "arXiv 2402.14740",
        ),
        (
            Algorithm(name="reinforce_pp", center="batch", scale="batch", aggregation="token_mean"),
            "rewards whitened over the batch, token ratios",
            "arXiv 2501.03262",
        ),
        (
            Algorithm(name="cispo", surrogate="cispo", bounds="none", ratio_cap=5.0, aggregation="token_mean"),
            "the ratio clipped as a weight, so that every token keeps its gradient",
            "arXiv 2506.13585",
        ),
        (Algorithm(name="sapo", surrogate="sapo", bounds="none"), "a smooth gate in place of the clip", "arXiv 2511.20347"),
        (
            Algorithm(name="gmpo", surrogate="gmpo", bounds="exponential", clip_low=0.4, clip_high=0.4),
            "the geometric mean of clipped token ratios",
            "arXiv 2507.20673",
        ),
        (
            Algorithm(name="dppo", surrogate="dppo", bounds="none", aggregation="token_mean"),
            "tokens masked by how far their probability moved",
            "arXiv 2602.04879",
        ),
        (
            Algorithm(name="maxrl", scale="mean", aggregation="token_mean"),
            "advantages over the group's pass rate: hard prompts count more",
            "arXiv 2602.02710",
        ),
    ]
}
"""Name -> (algorithm, one line, paper)."""


def named(name: str, **changes: Any) -> Algorithm:
    """A named algorithm with its paper's defaults, some of them changed.

    Args:
        name: one of `NAMED`.
        changes: fields of `Algorithm`.

    Raises:
        ValueError: an unknown name or setting (the nearest known one is in the message), or a mix without meaning.
    """
    if name not in NAMED:
        raise ValueError(f"there is no algorithm {name!r}{_hint(name, NAMED)}")
    known = [field.name for field in fields(Algorithm)]
    for key in changes:
        if key not in known:
            raise ValueError(f"{key}: no algorithm has this setting{_hint(key, known)}")
    return replace(NAMED[name][0], **changes)
