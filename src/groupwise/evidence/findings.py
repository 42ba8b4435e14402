"""Rules that read a run's metrics and say in words whether it learned, whether it is healthy and what to change. One rule, one function."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from groupwise.algorithms import NAMED, named
from groupwise.algorithms.diagnostics import PROBABILITY_EDGES
from groupwise.evidence.history import Noted
from groupwise.evidence.runs import Run
from groupwise.evidence.statistics import binomial
from groupwise.thresholds import ENTROPY_LEFT, EVERYWHERE_USED, LARGEST_GAP, SOLVED

Kind = Literal["unhealthy", "watch", "healthy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one rule found in a run."""

    kind: Kind
    title: str
    text: str
    """One to three sentences: the numbers, what they mean, what to change."""
    figure: str
    """The id of the figure that shows it."""


def findings(run: Run) -> list[Finding]:
    """Apply every rule to a run; the worst findings come first."""
    found = [finding for rule in RULES if (finding := rule(run)) is not None]
    return worst_first(found)


def worst_first(found: list[Finding]) -> list[Finding]:
    return sorted(found, key=lambda finding: ("unhealthy", "watch", "healthy").index(finding.kind))


def setting(run: Run, key: str) -> Any:
    """A setting of the run's algorithm: from its recipe, else the named algorithm's own value; None where it is not in use."""
    name = run.algorithm
    usual = named(name if name in NAMED else "custom").settings().get(key)
    own = run.recipe.get("algorithm", {}).get(key, usual)
    damaged = isinstance(usual, int | float) and not isinstance(own, int | float)
    return usual if damaged else own


def learned(run: Run) -> Finding | None:
    """Compare the last held-out score with the first one and with the best one."""
    measure = run.measure
    series = run.series(measure.key)
    scores = [score for _, score in series]
    if len(scores) < 2:
        return None
    first, last, best = scores[0], scores[-1], max(scores)
    noise = noise_of_change(run)
    change = (
        f"The held-out {measure.name} went from {measure.text(first)} to {measure.text(last)} in {series[-1][0]} steps "
        f"(95 % interval of the change: ± {measure.text(noise)})"
    )
    least = 0.05 if measure.percent else 0.0
    if best - last > max(1.5 * noise, least, 0.25 * (best - first)):  # The best of many noisy evaluations is high by chance.
        at = series[scores.index(best)][0]
        text = f"{change}; its highest value was {measure.text(best)} at step {at}."
        fell = "Accuracy" if measure.percent else f"The {measure.name}"
        return Finding(kind="unhealthy", title=f"{fell} fell after its peak", text=text, figure="accuracy")
    if last - first > noise:
        return Finding(kind="healthy", title="It learned", text=f"{change}.", figure="accuracy")
    if first - last > noise:
        text = f"{change}, a fall that sampling noise does not explain."
        return Finding(kind="unhealthy", title="It got worse", text=text, figure="accuracy")
    if measure.percent and first > 0.97:
        return Finding(kind="healthy", title="There was little to learn", text=f"{change}.", figure="accuracy")
    text = f"{change}, which sampling noise alone could explain."
    return Finding(kind="watch", title="It did not learn", text=text, figure="accuracy")


def noise_of_change(run: Run) -> float:
    """Half the width of the 95 % interval of the change between the first and the last evaluation."""
    key = run.measure.key
    scored = [record for record in run.evaluations if record.get(key) is not None]
    first, last = scored[0], scored[-1]
    count = max(1, int(last.get("eval_problems") or run.recipe.get("training", {}).get("eval_problems", 500)))
    if run.measure.percent:
        return math.hypot(binomial(first[key], count), binomial(last[key], count))
    return math.hypot(*(1.96 * (record.get("eval/reward_std") or 0.0) / math.sqrt(count) for record in (first, last)))


def nothing_recorded(run: Run) -> Finding | None:
    """Report a run that ended before its first training step was recorded."""
    if run.steps:
        return None
    text = (
        "The run has just begun, or stopped before it finished its first training step; the error message is then in the terminal "
        "where it ran."
    )
    return Finding(kind="watch", title="No step was recorded", text=text, figure="accuracy")


def events_recorded(run: Run) -> Finding | None:
    """Report the warnings and faults that the run noted while it ran, each kind once."""
    noted: dict[str, list[Noted]] = {}
    for event in run.events:
        if event.kind != "note":
            noted.setdefault(event.name or event.text, []).append(event)
    if not noted:
        return None
    faults = any(event.kind == "fault" for events in noted.values() for event in events)
    lines = [_sentences(events) for events in list(noted.values())[:5]]
    more = f" {len(noted) - 5} more kinds are in the table of events." if len(noted) > 5 else ""
    return Finding(
        kind="unhealthy" if faults else "watch",
        title=f"{'Faults' if faults else 'Warnings'} were noted while it ran",
        text=" ".join(lines) + more,
        figure="events",
    )


def _sentences(events: list[Noted]) -> str:
    """What was seen, when, and what to do, of events of one name."""
    first, more = events[0], f" and {len(events) - 1:,} more" if len(events) > 1 else ""
    seen = f"{first.text[:1].upper()}{first.text[1:].rstrip('.')} (step {first.step:,}{more})."
    return f"{seen} {first.advice[:1].upper()}{first.advice[1:].rstrip('.')}." if first.advice else seen


def warned_of(run: Run, name: str) -> bool:
    """Whether the run noted a warning or a fault of this name."""
    return any(event.name == name and event.kind != "note" for event in run.events)


def constant_reward(run: Run) -> Finding | None:
    """Report rewards whose standard deviation is zero in every step."""
    if not run.last("reward/shaped_spread", len(run.steps)) <= 1e-9:
        return None
    has_signal = run.last("utilisation", len(run.steps)) > 0
    effect = "" if has_signal else " Every advantage is zero, so the policy gets no gradient from them."
    if run.last("train/pass_rate", len(run.steps)) == 0:
        text = (
            f"None of the completions of the {len(run.steps)} steps was correct.{effect} Use easier problems, or first fine-tune the "
            "model on examples (groupwise sft)."
        )
        return Finding(kind="unhealthy", title="No completion was ever right", text=text, figure="groups")
    text = (
        f"In all {len(run.steps)} steps every completion of the training batch had the reward {run.last('reward/shaped_mean'):g}.{effect} "
        "Check that the reward function depends on the completion."
    )
    return Finding(kind="unhealthy", title="Every completion gets the same reward", text=text, figure="rewards")


def updates_too_large(run: Run) -> Finding | None:
    """Report a policy that moves far from π_old within a step, and updates skipped for a loss or gradient that was not finite."""
    skipped, taken = run.last("skipped_updates", 1), len(run.steps)
    kl = sorted(run.values("approx_kl"))
    typical, peak = (kl[len(kl) // 2], kl[-1]) if kl else (0.0, 0.0)
    large = typical > 0.05 or peak > 1
    if not skipped > 0 and not large:
        return None
    rate = run.recipe.get("learner", {}).get("learning_rate", "?")
    moved = f"The KL divergence between π_old and π within a step is {typical:.2g} nats per token (median of the steps, k3 estimate), at most {peak:.2g}"
    lost = f"; {skipped:.0f} updates were skipped because their loss or gradient was not finite" if skipped > 0 else ""
    return Finding(
        kind="unhealthy" if large or skipped > 0.1 * taken else "watch",
        title="The updates are too large" if large or skipped > 0.1 * taken else "A few updates were skipped",
        text=f"{moved}{lost}. In runs that learn it is typically below 0.01. Try a tenth of the learning rate (now {rate}).",
        figure="kl",
    )


def clip_too_tight(run: Run) -> Finding | None:
    """Report fixed bounds on token ratios that clip many tokens. Sequence ratios are left out: GSPO clips that many by design."""
    low, high = setting(run, "clip_low"), setting(run, "clip_high")
    ppo_clip = {"ratio": "token", "bounds": "fixed", "surrogate": "clip"}
    tokens = sum(run.total("by_probability/tokens"))
    if any(setting(run, key) != value for key, value in ppo_clip.items()) or not tokens:
        return None
    share = sum(run.total("by_probability/clipped_low") + run.total("by_probability/clipped_high")) / tokens
    if not share > 0.08:
        return None
    return Finding(
        kind="unhealthy" if share > 0.15 else "watch",
        title="Many tokens are clipped",
        text=f"{share:.0%} of the tokens in the policy updates got no gradient because their ratio was outside [1 − {low:g}, 1 + {high:g}]; "
        f"the standard deviation of the tokens' log ratios is {run.last('spread/token', len(run.steps)):.2g}. Widen clip_low and clip_high "
        "(0.2 and 0.28 are usual), or lower the learning rate if it is the ratios that are too large.",
        figure="clip",
    )


def truncated_completions(run: Run) -> Finding | None:
    """Report a token limit that many completions reach."""
    share, before = run.last("length/truncated", max(5, len(run.steps) // 2)), run.first("length/truncated")
    if not share > 0.2:
        return None
    limit = run.recipe.get("rollouts", {}).get("max_tokens")
    found = f"{share:.0%} of the completions were truncated at the limit of {limit} tokens"
    if before < 0.5 * share:
        text = (
            f"{found}; at the start it was {before:.0%}. Either the policy has learned to write more than the limit allows, or it no "
            "longer emits an end-of-sequence token."
        )
        return Finding(kind="unhealthy", title="More and more completions are truncated", text=text, figure="truncated")
    remedies = ["raise rollouts.max_tokens"]
    if not setting(run, "overlong_cache"):
        remedies.append("penalise length with DAPO's soft overlong punishment (algorithm.overlong_cache)")
    if not setting(run, "overlong_filter"):
        remedies.append("leave truncated completions out of the loss (algorithm.overlong_filter)")
    text = f"{found}, so correct but unfinished reasoning is scored as wrong. Possible remedies: {'; '.join(remedies)}."
    return Finding(kind="unhealthy", title="Many completions are truncated", text=text, figure="truncated")


def entropy_collapse(run: Run) -> Finding | None:
    """Report entropy that falls by more than 80 %, and how unlikely the tokens were that the upper bound clipped meanwhile."""
    series = run.series("entropy")
    if len(series) < 4:
        return None
    first = run.first("entropy")
    last = run.last("entropy", 3)
    if not (last < ENTROPY_LEFT * first):
        return None
    low = next(step for step, value in series if value < ENTROPY_LEFT * first)
    clipped_high = run.total("by_probability/clipped_high")
    unlikely = (
        sum(clipped_high[: PROBABILITY_EDGES.index(0.2) + 1]) / sum(clipped_high) if clipped_high and sum(clipped_high) else 0.0
    )
    clip = f" {unlikely:.0%} of the tokens clipped at the upper bound had π_old below 0.2." if unlikely > 0.3 else ""
    symmetric = setting(run, "clip_low") == setting(run, "clip_high") and sum(clipped_high) > 0
    advice = " DAPO proposes a higher upper bound against this (clip-higher: raise algorithm.clip_high)." if symmetric else ""
    high = run.last("eval/pass@1", 1) > SOLVED
    why = (
        " With held-out pass@1 above 90 % this is expected: the policy has become certain of answers that are mostly correct."
        if high
        else advice
    )
    return Finding(
        kind="healthy" if high and not warned_of(run, "entropy_collapse") else "watch",
        title="Entropy fell",
        text=f"Entropy fell by {1 - last / first:.0%}, from {first:.3f} to {last:.3f} nats, and first passed the 80 % mark after "
        f"{low - series[0][0]} steps.{clip}{why}",
        figure="entropy",
    )


def entropy_explosion(run: Run) -> Finding | None:
    """Report entropy that more than doubles."""
    first, last = run.first("entropy"), run.last("entropy", 3)
    if not (last > 2 * first and last > 0.3):
        return None
    return Finding(
        kind="unhealthy",
        title="Entropy rose",
        text=f"Entropy rose from {first:.3f} to {last:.3f} nats: the policy is approaching random output. The learning rate or the "
        "entropy bonus may be too high.",
        figure="entropy",
    )


def zero_variance_groups(run: Run) -> Finding | None:
    """Report that most groups have zero variance, unless the algorithm draws a signal from them all the same."""
    share = run.last("groups/zero_variance", max(5, len(run.steps) // 4))
    if not share > 0.5 or constant_reward(run) is not None:
        return None
    graded = not run.values("groups/all_correct")
    right, wrong = run.last("groups/all_correct"), run.last("groups/all_wrong")
    which = f"{right:.0%} of the groups are all correct and {wrong:.0%} all wrong"
    if graded:
        which = f"In {run.last('groups/equal'):.0%} of the groups all completions have the same reward"
    if right > wrong and run.last("eval/pass@1", 1) > SOLVED:
        return Finding(
            kind="watch" if warned_of(run, "zero_variance") else "healthy",
            title="Most problems are solved",
            text=f"{which}: few problems are left that the policy can learn from.",
            figure="groups",
        )
    if setting(run, "dynamic_sampling"):
        text = f"{which}; dynamic sampling discards them and generates others, {run.last('rollouts/rounds'):.1f} rounds a step."
        return Finding(kind="watch", title="Dynamic sampling discards most groups", text=text, figure="groups")
    if not run.last("utilisation") < EVERYWHERE_USED:
        return None  # A critic, a reward history or step rewards give advantages to zero-variance groups too.
    if graded:
        text = f"{which}. Such zero-variance groups give no gradient. Use a larger group_size, or a reward that tells more answers apart."
    elif wrong > right:
        text = f"{which}. Such zero-variance groups give no gradient. Use easier problems, a larger group_size or a better initial model."
    else:
        text = f"{which}. Such zero-variance groups give no gradient. Use harder problems or dynamic sampling (DAPO)."
    return Finding(kind="watch", title="Most groups have zero variance", text=text, figure="groups")


def sampler_mismatch(run: Run) -> Finding | None:
    """Report sampler and learner log-probabilities that differ where the settings do not explain it."""
    rollouts = run.recipe.get("rollouts", {})
    limited = rollouts.get("top_p", 1) < 1 or rollouts.get("top_k", 0) or rollouts.get("min_p", 0)
    not_recorded = limited and rollouts.get("sampler", "native") != "native"  # which tokens the limits left
    by_design = not_recorded or rollouts.get("max_age", 0) or run.recipe.get("cluster", {}).get("staleness", 0)
    gap = run.last("sampler_gap_mean", len(run.steps))
    if by_design or not gap > LARGEST_GAP:
        return None
    return Finding(
        kind="watch",
        title="Sampler and learner log-probabilities differ",
        text=f"For the same token they differ by {gap:.2g} nats on average. An importance-sampling correction "
        "(algorithm.correction: TIS, MIS or IcePop) accounts for the difference; float32 in both removes most of it.",
        figure="kl",
    )


def length_growth(run: Run) -> Finding | None:
    """Report completions that grow while held-out results do not."""
    first, last = run.first("length/mean"), run.last("length/mean")
    scores = run.values(run.measure.key)
    if (
        len(scores) < 3
        or not last > 2 * first
        or scores[-1] - scores[0] > (0.02 if run.measure.percent else noise_of_change(run))
    ):
        return None
    return Finding(
        kind="watch",
        title=f"Completions grew, {'accuracy' if run.measure.percent else 'the mean reward'} did not",
        text=f"The mean completion length grew from {first:.0f} to {last:.0f} tokens while the held-out {run.measure.name} did not rise.",
        figure="length",
    )


RULES: tuple[Callable[[Run], Finding | None], ...] = (
    nothing_recorded,
    events_recorded,
    constant_reward,
    updates_too_large,
    learned,
    truncated_completions,
    clip_too_tight,
    entropy_explosion,
    entropy_collapse,
    zero_variance_groups,
    sampler_mismatch,
    length_growth,
)
