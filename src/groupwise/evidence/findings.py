"""What a run's numbers say, in words: did it learn, is it healthy, what is the matter. Each rule is one function."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from groupwise.algorithms import Algorithm, named
from groupwise.algorithms.algorithm import NAMED
from groupwise.algorithms.diagnostics import PROBABILITY_EDGES
from groupwise.evidence.runs import Run
from groupwise.evidence.statistics import binomial

Kind = Literal["sick", "watch", "well"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One sentence or three, and the figure that shows it."""

    kind: Kind
    title: str
    text: str
    figure: str


def findings(run: Run) -> list[Finding]:
    """Everything that the rules found, the worst first."""
    found = [finding for rule in RULES if (finding := rule(run)) is not None]
    return sorted(found, key=lambda finding: ("sick", "watch", "well").index(finding.kind))


def setting(run: Run, key: str) -> Any:
    """A setting of the run's algorithm: its own, or that of the name."""
    own = run.recipe.get("algorithm", {})
    if key in own:
        return own[key]
    return getattr(named(run.algorithm) if run.algorithm in NAMED else Algorithm(), key)


def learned(run: Run) -> Finding | None:
    """Held-out accuracy, first against last, and against the best on the way."""
    scores = run.values("eval/pass@1")
    if len(scores) < 2:
        return None
    first, last, best = scores[0], scores[-1], max(scores)
    count = run.recipe.get("training", {}).get("eval_problems", 500)
    noise = math.hypot(binomial(first, count), binomial(last, count))
    change = f"held-out pass@1 went from {first:.1%} to {last:.1%} (± {noise:.1%}) in {run.evaluations[-1]['step']} steps"
    if best - last > max(noise, 0.25 * (best - first) if best > first else 0.0) and best - last > 0.03:
        at = run.evaluations[scores.index(best)]["step"]
        return Finding(
            kind="sick",
            title="It lost what it knew",
            text=f"{change.capitalize()}; it was {best:.1%} at step {at}. The weights of an earlier checkpoint are better.",
            figure="accuracy",
        )
    if last - first > noise:
        return Finding(kind="well", title="It learned", text=f"{change.capitalize()}.", figure="accuracy")
    return Finding(
        kind="sick" if first - last > noise else "watch",
        title="It did not learn",
        text=f"{change.capitalize()}, which is no more than chance.",
        figure="accuracy",
    )


def constant_reward(run: Run) -> Finding | None:
    """No spread among rewards: no advantage, no gradient."""
    if not run.steps or run.last("reward/shaped_spread", len(run.steps)) > 1e-9:
        return None
    return Finding(
        kind="sick",
        title="Every completion gets the same reward",
        text=f"In all {len(run.steps)} steps each completion that was kept had the reward {run.last('reward/shaped_mean'):g}, so every "
        "advantage is zero and no gradient flows. Look at the reward function: does it read the completion at all?",
        figure="rewards",
    )


def updates_too_large(run: Run) -> Finding | None:
    """A policy that moves too far within a step, or updates that were not finite."""
    skipped = run.last("skipped_updates", 1)
    kl = run.values("approx_kl")
    typical = sorted(kl)[len(kl) // 2] if kl else 0.0
    peak, rate = max(kl, default=0.0), run.recipe.get("learner", {}).get("learning_rate")
    if not skipped > 0 and not (typical > 0.05 or peak > 0.5):
        return None
    moved = (
        f"within a step the policy moves by {typical:.2g} nats per token (k3; the largest {peak:.2g}), and the largest token ratio was "
        f"{max(run.values('ratio_max'), default=math.nan):.3g}"
    )
    lost = f"; {skipped:.0f} updates were not finite and were skipped" if skipped > 0 else ""
    return Finding(
        kind="sick",
        title="The updates are too large",
        text=f"{moved.capitalize()}{lost}. Healthy runs stay below 0.01 nats. Lower the learning rate (it is {rate:g}), to a "
        "tenth first.",
        figure="kl",
    )


def clip_too_tight(run: Run) -> Finding | None:
    """A bound on single tokens that most of the update runs into. Sequence ratios are clipped that much by design."""
    share = run.last("clip_fraction", len(run.steps))
    bounds = setting(run, "clip_low"), setting(run, "clip_high")
    if setting(run, "ratio") != "token" or not share > 0.08 or not all(isinstance(bound, float) for bound in bounds):
        return None
    return Finding(
        kind="sick" if share > 0.15 else "watch",
        title="The clip stops most of the learning",
        text=f"{share:.0%} of the trained tokens got no gradient because their ratio was past its bound (1 − {bounds[0]:g}, "
        f"1 + {bounds[1]:g}), while a token's log ratio spreads by {run.last('spread/token', len(run.steps)):.2g}. "
        "Widen clip_low and clip_high (0.2 and 0.28 are usual), or lower the learning rate if the ratios are what is too large.",
        figure="clip",
    )


def cut_off(run: Run) -> Finding | None:
    """A length limit that answers run into."""
    share = run.last("length/truncated", max(5, len(run.steps) // 2))
    if not share > 0.2:
        return None
    limit = run.recipe.get("rollouts", {}).get("max_tokens")
    return Finding(
        kind="sick",
        title="Answers are cut off",
        text=f"{share:.0%} of the completions reached the limit of {limit} tokens and were truncated before they could end, so right "
        "reasoning is scored as wrong. Raise rollouts.max_tokens, or teach brevity: DAPO's soft overlong punishment "
        "(algorithm.overlong_cache), or its overlong filtering (algorithm.overlong_filter).",
        figure="truncated",
    )


def entropy_collapse(run: Run) -> Finding | None:
    """Entropy that falls by most of itself, and whom the upper clip held meanwhile."""
    series = run.series("entropy")
    if len(series) < 4:
        return None
    first = run.first("entropy")
    last = run.last("entropy", 3)
    if not (last < 0.2 * first):
        return None
    low = next(step for step, value in series if value < 0.2 * first)
    held = run.total("by_probability/clipped_high")
    unlikely = sum(held[: PROBABILITY_EDGES.index(0.2) + 1]) / sum(held) if held and sum(held) else 0.0
    clip = f" {unlikely:.0%} of the up-clipped tokens had a probability below 0.2." if unlikely > 0.3 else ""
    symmetric = setting(run, "clip_low") == setting(run, "clip_high")
    advice = " A higher upper bound (clip-higher) is what DAPO proposes." if symmetric else ""
    high = run.last("eval/pass@1", 1) > 0.9
    why = " With pass@1 above 90 % that is what having learned looks like." if high else advice
    return Finding(
        kind="well" if high else "watch",
        title="Entropy fell",
        text=f"Entropy fell by {1 - last / first:.0%} ({first:.3f} to {last:.3f} nats), {low - series[0][0]} steps from the start to the "
        f"80 % mark.{clip}{why}",
        figure="entropy",
    )


def entropy_explosion(run: Run) -> Finding | None:
    first, last = run.first("entropy"), run.last("entropy", 3)
    if not (last > 2 * first and last > 0.3):
        return None
    return Finding(
        kind="sick",
        title="Entropy rises",
        text=f"Entropy rose from {first:.3f} to {last:.3f} nats: the policy is becoming noise rather than an answer. The learning rate or an "
        "entropy bonus may be too high.",
        figure="entropy",
    )


def dead_groups(run: Run) -> Finding | None:
    """Groups that agree, where nothing makes up for them."""
    dead = run.last("groups/dead", max(5, len(run.steps) // 4))
    if not dead > 0.5 or constant_reward(run) is not None:
        return None
    right, wrong = run.last("groups/all_correct"), run.last("groups/all_wrong")
    which = f"{right:.0%} of the groups are all right and {wrong:.0%} all wrong"
    if right > wrong and run.last("eval/pass@1", 1) > 0.9:
        return Finding(
            kind="well",
            title="Most problems are solved",
            text=f"{which.capitalize()}: the task has little left to teach.",
            figure="groups",
        )
    if setting(run, "dynamic_sampling"):
        text = f"{which.capitalize()}; dynamic sampling replaces them at {run.last('rollouts/rounds'):.1f} rounds a step."
    elif wrong > right:
        text = f"{which.capitalize()}, so most rollouts teach nothing. Easier problems, a larger group_size or a warmer start would help."
    else:
        text = f"{which.capitalize()}, so most rollouts teach nothing. Harder problems, or dynamic sampling (DAPO), would help."
    return Finding(kind="watch", title="Most groups teach nothing", text=text, figure="groups")


def engine_mismatch(run: Run) -> Finding | None:
    gap = run.last("sampler_gap_mean", len(run.steps))
    if not gap > 0.02:
        return None
    return Finding(
        kind="watch",
        title="Sampler and learner disagree",
        text=f"Their log-probabilities of the same token differ by {gap:.2g} nats on average. The algorithm's correction (TIS, MIS) "
        "accounts for that; float32 on both sides removes most of it.",
        figure="kl",
    )


def hacked_length(run: Run) -> Finding | None:
    """Answers that grow while they do not get better."""
    first, last = run.first("length/mean"), run.last("length/mean")
    scores = run.values("eval/pass@1")
    if len(scores) < 3 or not last > 2 * first or scores[-1] - scores[0] > 0.02:
        return None
    return Finding(
        kind="watch",
        title="Longer, not better",
        text=f"Completions grew from {first:.0f} to {last:.0f} tokens while held-out pass@1 did not rise.",
        figure="length",
    )


RULES: tuple[Callable[[Run], Finding | None], ...] = (
    constant_reward,
    updates_too_large,
    learned,
    cut_off,
    clip_too_tight,
    entropy_explosion,
    entropy_collapse,
    dead_groups,
    engine_mismatch,
    hacked_length,
)
