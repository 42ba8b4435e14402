"""Rules about the policy and its updates: KL, clipping, entropy, sampler and learner. One rule, one function."""

from groupwise.algorithms.diagnostics import PROBABILITY_EDGES
from groupwise.evidence.finding import EARLY, NOTHING, Finding, say, setting, under_way, warned_of
from groupwise.evidence.held_out import change, improves
from groupwise.evidence.runs import Run
from groupwise.thresholds import ENTROPY_LEFT, LARGEST_GAP, SOLVED

LARGE_KL, RUINOUS_KL, PEAK_KL = 0.05, 0.5, 1.0
"""Nats per token between π_old and π, within a step: the median of the steps is large; so large that few ratios are within any clip
bounds; and the largest of a step."""
WRONG_GAP = 0.3
"""Nats between sampler and learner that no rounding explains: they have different weights, or different settings."""
TIGHT = 0.05
"""Clip bounds that are narrower than any paper's for ratios of tokens."""


def updates_too_large(run: Run) -> Finding | None:
    """Report a policy that moves far from π_old within a step, and updates skipped for a loss or gradient that was not finite.

    A large divergence alone is no harm: small models at high learning rates learn with it. It is where results fall or stay, or where
    it is so large that the ratios mean nothing.
    """
    skipped, learner, rollouts = run.last("skipped_updates", 1), run.recipe.get("learner", {}), run.recipe.get("rollouts", {})
    updates = len(run.steps) * learner.get("minibatches", 1) * rollouts.get("epochs", 1)
    kl = sorted(run.values("approx_kl"))
    typical, peak = (kl[len(kl) // 2], kl[-1]) if kl else (0.0, 0.0)
    large = typical > LARGE_KL or peak > PEAK_KL
    if not skipped > 0 and not large:
        return None
    found = change(run)
    harmed = found is not None and (found.ruined or (found.verdict == "level" and typical > LARGE_KL and not under_way(run)))
    unhealthy = skipped > 0.1 * updates or typical > RUINOUS_KL or (large and harmed)
    rate = learner.get("learning_rate", "?")
    moved = say("updates.moved", typical=typical, peak=peak)
    lost = say("updates.lost", skipped=skipped) if skipped > 0 else NOTHING
    advice = say("updates.lower" if unhealthy or not improves(run) else "updates.learns", rate=rate)
    return Finding(
        kind="unhealthy" if unhealthy else "watch",
        title=say(
            "updates.too_large"
            if unhealthy and len(run.steps) >= EARLY
            else "updates.large"
            if large or unhealthy
            else "updates.skipped"
        ),
        text=say("updates.text", moved=moved, lost=lost, advice=advice)
        if kl
        else say("updates.only_lost", skipped=skipped, rate=rate),
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
    tight = min(low, high) < TIGHT
    unhealthy = share > 0.15 and (tight or not improves(run))
    spread = run.last("spread/token", len(run.steps))
    return Finding(
        kind="unhealthy" if unhealthy else "watch",
        title=say("clip.title"),
        text=say("clip.tight" if tight else "clip.usual", share=share, low=low, high=high, spread=spread),
        figure="clip",
    )


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
    clipped = sum(clipped_high)
    unlikely = sum(clipped_high[: PROBABILITY_EDGES.index(0.2) + 1]) / clipped if clipped else 0.0
    symmetric = setting(run, "clip_low") == setting(run, "clip_high") and clipped > 0
    solved = run.last("eval/pass@1", 1) > SOLVED
    why = say("entropy.solved") if solved else say("entropy.clip_higher") if symmetric else NOTHING
    return Finding(
        kind="healthy" if solved and not warned_of(run, "entropy_collapse") else "watch",
        title=say("entropy.fell"),
        text=say(
            "entropy.fell_text",
            share=1 - last / first,
            first=first,
            last=last,
            steps=low - series[0][0],
            clip=say("entropy.unlikely", share=unlikely) if unlikely > 0.3 else NOTHING,
            why=why,
        ),
        figure="entropy",
    )


def entropy_explosion(run: Run) -> Finding | None:
    """Report entropy that more than doubles, unless results improve: a policy that learns to vary its completions has more."""
    first, last = run.first("entropy"), run.last("entropy", 3)
    if not (last > 2 * first and last > 0.3):
        return None
    better = improves(run)
    text = say("entropy.varied" if better else "entropy.rose_text", first=first, last=last)
    return Finding(kind="watch" if better else "unhealthy", title=say("entropy.rose"), text=text, figure="entropy")


def sampler_mismatch(run: Run) -> Finding | None:
    """Report sampler and learner log-probabilities that differ where the settings do not explain it."""
    rollouts = run.recipe.get("rollouts", {})
    limited = rollouts.get("top_p", 1) < 1 or rollouts.get("top_k", 0) or rollouts.get("min_p", 0)
    not_recorded = limited and rollouts.get("sampler", "native") != "native"  # which tokens the limits left
    by_design = not_recorded or rollouts.get("max_age", 0) or run.recipe.get("cluster", {}).get("staleness", 0)
    gap = run.last("sampler_gap_mean", len(run.steps))
    if by_design or not gap > LARGEST_GAP:
        return None
    wrong = gap > WRONG_GAP
    text = say("sampler.wrong" if wrong else "sampler.text", gap=gap)
    return Finding(kind="unhealthy" if wrong else "watch", title=say("sampler.title"), text=text, figure="kl")
