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
    return worst_first(found)


def worst_first(found: list[Finding]) -> list[Finding]:
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
    count = int(run.evaluations[-1].get("eval_problems") or run.recipe.get("training", {}).get("eval_problems", 500))
    noise = math.hypot(binomial(first, count), binomial(last, count))
    change = f"Held-out pass@1 went from {first:.1%} to {last:.1%} (± {noise:.1%}) in {run.evaluations[-1]['step']} steps"
    if best - last > max(1.5 * noise, 0.05, 0.25 * (best - first)):  # the best of many is high by chance
        at = run.evaluations[scores.index(best)]["step"]
        text = f"{change}; it was {best:.1%} at step {at}."
        return Finding(kind="sick", title="It lost what it knew", text=text, figure="accuracy")
    if last - first > noise:
        return Finding(kind="well", title="It learned", text=f"{change}.", figure="accuracy")
    if first - last > noise:
        return Finding(kind="sick", title="It got worse", text=f"{change}, which is more than chance.", figure="accuracy")
    if first > 0.97:
        return Finding(kind="well", title="There was little to learn", text=f"{change}.", figure="accuracy")
    return Finding(kind="watch", title="It did not learn", text=f"{change}, which is no more than chance.", figure="accuracy")


def nothing_recorded(run: Run) -> Finding | None:
    if run.steps:
        return None
    text = "The run stopped before its first step was over; what it said then is on the terminal it ran in."
    return Finding(kind="sick", title="No step was recorded", text=text, figure="accuracy")


def constant_reward(run: Run) -> Finding | None:
    """No spread among rewards."""
    if not run.last("reward/shaped_spread", len(run.steps)) <= 1e-9:
        return None
    teaches = run.last("utilisation", len(run.steps)) > 0
    effect = "" if teaches else " Every advantage is zero, so no completion teaches anything."
    if run.last("train/pass_rate", len(run.steps)) == 0:
        text = f"In all {len(run.steps)} steps no completion was right.{effect} Easier problems, or a warmer start (groupwise sft), would help."
        return Finding(kind="sick", title="No completion was ever right", text=text, figure="groups")
    text = (
        f"In all {len(run.steps)} steps each completion that was kept had the reward {run.last('reward/shaped_mean'):g}.{effect} "
        "Look at the reward function: does it read the completion at all?"
    )
    return Finding(kind="sick", title="Every completion gets the same reward", text=text, figure="rewards")


def updates_too_large(run: Run) -> Finding | None:
    """A policy that moves too far within a step, or updates that were not finite."""
    skipped, taken = run.last("skipped_updates", 1), len(run.steps)
    kl = sorted(run.values("approx_kl"))
    typical, peak = (kl[len(kl) // 2], kl[-1]) if kl else (0.0, 0.0)
    large = typical > 0.05 or peak > 1
    if not skipped > 0 and not large:
        return None
    rate = run.recipe.get("learner", {}).get("learning_rate", "?")
    moved = f"Within a step the policy typically moves by {typical:.2g} nats per token (k3; the most {peak:.2g})"
    lost = f"; {skipped:.0f} updates were not finite and were skipped" if skipped > 0 else ""
    return Finding(
        kind="sick" if large or skipped > 0.1 * taken else "watch",
        title="The updates are too large" if large or skipped > 0.1 * taken else "A few updates were skipped",
        text=f"{moved}{lost}. Runs that learn typically move by less than 0.01. Try a tenth of the learning rate (it is {rate}).",
        figure="kl",
    )


def clip_too_tight(run: Run) -> Finding | None:
    """A fixed bound on tokens' ratios that much of the update runs into; sequence ratios are clipped that much by design."""
    low, high = setting(run, "clip_low"), setting(run, "clip_high")
    plain = {"ratio": "token", "bounds": "fixed", "surrogate": "clip"}
    tokens = sum(run.total("by_probability/tokens"))
    if any(setting(run, key) != value for key, value in plain.items()) or not tokens:
        return None
    share = sum(run.total("by_probability/clipped_low") + run.total("by_probability/clipped_high")) / tokens
    if not share > 0.08:
        return None
    return Finding(
        kind="sick" if share > 0.15 else "watch",
        title="The clip stops much of the learning",
        text=f"{share:.0%} of the tokens that were run got no gradient because their ratio was past its bound (1 − {low:g}, 1 + {high:g}), "
        f"while a token's log ratio spreads by {run.last('spread/token', len(run.steps)):.2g}. Widen clip_low and clip_high (0.2 and 0.28 "
        "are usual), or lower the learning rate if the ratios are what is too large.",
        figure="clip",
    )


def cut_off(run: Run) -> Finding | None:
    """A length limit that answers run into."""
    share, before = run.last("length/truncated", max(5, len(run.steps) // 2)), run.first("length/truncated")
    if not share > 0.2:
        return None
    limit = run.recipe.get("rollouts", {}).get("max_tokens")
    found = f"{share:.0%} of the completions reached the limit of {limit} tokens and were truncated before they could end"
    if before < 0.5 * share:
        text = f"{found}; at the start it was {before:.0%}. Either answers have learned to be longer than the limit, or they no longer end."
        return Finding(kind="sick", title="Answers do not end in time", text=text, figure="truncated")
    ways = ["raise rollouts.max_tokens"]
    if not setting(run, "overlong_cache"):
        ways.append("teach brevity with DAPO's soft overlong punishment (algorithm.overlong_cache)")
    if not setting(run, "overlong_filter"):
        ways.append("keep them out of the loss (algorithm.overlong_filter)")
    text = f"{found}, so right reasoning is scored as wrong. Ways out: {'; '.join(ways)}."
    return Finding(kind="sick", title="Answers are cut off", text=text, figure="truncated")


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
    symmetric = setting(run, "clip_low") == setting(run, "clip_high") and sum(held) > 0
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
        text = f"{which.capitalize()}; dynamic sampling replaces them, at {run.last('rollouts/rounds'):.1f} rounds a step."
        return Finding(kind="watch", title="Most rollouts are thrown away", text=text, figure="groups")
    if not run.last("utilisation") < 0.6:
        return None  # a critic, a history or rewards of steps teach from groups that agree
    if wrong > right:
        text = f"{which.capitalize()}, so most rollouts teach nothing. Easier problems, a larger group_size or a warmer start would help."
    else:
        text = f"{which.capitalize()}, so most rollouts teach nothing. Harder problems, or dynamic sampling (DAPO), would help."
    return Finding(kind="watch", title="Most groups teach nothing", text=text, figure="groups")


def engine_mismatch(run: Run) -> Finding | None:
    rollouts = run.recipe.get("rollouts", {})
    by_design = rollouts.get("top_p", 1) < 1 or rollouts.get("top_k", 0) or rollouts.get("min_p", 0) or rollouts.get("max_age", 0)
    gap = run.last("sampler_gap_mean", len(run.steps))
    if by_design or not gap > 0.02:
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
    nothing_recorded,
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
