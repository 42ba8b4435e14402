"""Rules about what a run learned, and from what: held-out results, rewards, groups, completions. One rule, one function."""

import math
from typing import Literal

from groupwise.evidence.finding import NOTHING, Finding, measure_name, say, sentences, setting, warned_of
from groupwise.evidence.history import Noted
from groupwise.evidence.phrases import Phrase, texts
from groupwise.evidence.runs import Run
from groupwise.evidence.statistics import binomial
from groupwise.text import visible
from groupwise.thresholds import EVERYWHERE_USED, SOLVED

MOST_KINDS = 5
"""Kinds of events that a finding describes."""


def nothing_recorded(run: Run) -> Finding | None:
    """Report a run that ended before its first training step was recorded."""
    if run.steps:
        return None
    title, text = say("nothing_recorded.title"), say("nothing_recorded.text")
    return Finding(kind="watch", title=title, text=text, figure="accuracy")


def events_recorded(run: Run) -> Finding | None:
    """Report the warnings and faults that the run noted while it ran, each kind once."""
    noted: dict[str, list[Noted]] = {}
    for event in run.events:
        if event.kind != "note":
            noted.setdefault(event.name or event.text, []).append(event)
    if not noted:
        return None
    faults = any(event.kind == "fault" for events in noted.values() for event in events)
    parts = [part for events in list(noted.values())[:MOST_KINDS] for part in _sentences(events)]
    if len(noted) > MOST_KINDS:
        parts.append(say("events.more", count=len(noted) - MOST_KINDS))
    return Finding(
        kind="unhealthy" if faults else "watch",
        title=say("events.faults" if faults else "events.warnings"),
        text=sentences(parts),
        figure="events",
    )


def _sentences(events: list[Noted]) -> list[Phrase]:
    """What was seen, when, and what to do, of events of one name."""
    first, more = events[0], len(events) - 1
    text: str | Phrase = _as_sentence(first.text)
    if name := texts("findings")["events"]["names"].get(first.name):
        text = say("events.named", text=text, name=name)
    seen = say("events.seen_often" if more else "events.seen", text=text, step=first.step, more=more)
    return [seen, say("events.advice", advice=_as_sentence(first.advice))] if first.advice else [seen]


def _as_sentence(text: str) -> str:
    """Without its full stop, and with a capital."""
    return visible(f"{text[:1].upper()}{text[1:].rstrip('.')}", lines=True)


def learned(run: Run) -> Finding | None:
    """Compare the last held-out score with the first one and with the best one."""
    measure = run.measure
    series = run.series(measure.key)
    scores = [score for _, score in series]
    if len(scores) < 2:
        return None
    first, last, best = scores[0], scores[-1], max(scores)
    noise = noise_of_change(run)
    shown = {name: measure.text(value) for name, value in (("first", first), ("last", last), ("noise", noise))}
    change = say("learned.change", measure=measure_name(measure), steps=series[-1][0], **shown)
    least = 0.05 if measure.percent else 0.0
    if best - last > max(1.5 * noise, least, 0.25 * (best - first)):  # The best of many noisy evaluations is high by chance.
        title = say("learned.accuracy_fell" if measure.percent else "learned.reward_fell")
        text = say("learned.peak", change=change, best=measure.text(best), step=series[scores.index(best)][0])
        return Finding(kind="unhealthy", title=title, text=text, figure="accuracy")
    plain = say("learned.plain", change=change)
    if last - first > noise:
        return Finding(kind="healthy", title=say("learned.learned"), text=plain, figure="accuracy")
    if first - last > noise:
        text = say("learned.got_worse_text", change=change)
        return Finding(kind="unhealthy", title=say("learned.got_worse"), text=text, figure="accuracy")
    if measure.percent and first > 0.97:
        return Finding(kind="healthy", title=say("learned.little_to_learn"), text=plain, figure="accuracy")
    text = say("learned.did_not_learn_text", change=change)
    return Finding(kind="watch", title=say("learned.did_not_learn"), text=text, figure="accuracy")


def noise_of_change(run: Run) -> float:
    """Half the width of the 95 % interval of the change between the first and the last evaluation."""
    key = run.measure.key
    scored = [record for record in run.evaluations if record.get(key) is not None]
    first, last = scored[0], scored[-1]
    count = max(1, int(last.get("eval_problems") or run.recipe.get("training", {}).get("eval_problems", 500)))
    if run.measure.percent:
        return math.hypot(binomial(first[key], count), binomial(last[key], count))
    return math.hypot(*(1.96 * (record.get("eval/reward_std") or 0.0) / math.sqrt(count) for record in (first, last)))


def constant_reward(run: Run) -> Finding | None:
    """Report rewards whose standard deviation is zero in every step."""
    steps = len(run.steps)
    if not run.last("reward/shaped_spread", steps) <= 1e-9:
        return None
    effect = NOTHING if run.last("utilisation", steps) > 0 else say("constant_reward.no_gradient")
    if run.last("train/pass_rate", steps) == 0:
        title = say("constant_reward.never_right")
        text = say("constant_reward.never_right_text", steps=steps, effect=effect)
        return Finding(kind="unhealthy", title=title, text=text, figure="groups")
    text = say("constant_reward.same_text", steps=steps, reward=run.last("reward/shaped_mean"), effect=effect)
    return Finding(kind="unhealthy", title=say("constant_reward.same"), text=text, figure="rewards")


def truncated_completions(run: Run) -> Finding | None:
    """Report a token limit that many completions reach."""
    share, before = run.last("length/truncated", max(5, len(run.steps) // 2)), run.first("length/truncated")
    if not share > 0.2:
        return None
    found = say("truncated.found", share=share, limit=run.recipe.get("rollouts", {}).get("max_tokens"))
    if before < 0.5 * share:
        text = say("truncated.growing_text", found=found, before=before)
        return Finding(kind="unhealthy", title=say("truncated.growing"), text=text, figure="truncated")
    remedies = [say("truncated.longer")]
    if not setting(run, "overlong_cache"):
        remedies.append(say("truncated.punish"))
    if not setting(run, "overlong_filter"):
        remedies.append(say("truncated.leave_out"))
    joined = remedies[0]
    for remedy in remedies[1:]:
        joined = say("truncated.several", first=joined, second=remedy)
    text = say("truncated.many_text", found=found, remedies=joined)
    return Finding(kind="unhealthy", title=say("truncated.many"), text=text, figure="truncated")


def zero_variance_groups(run: Run) -> Finding | None:
    """Report that most groups have zero variance, unless the algorithm draws a signal from them all the same."""
    share = run.last("groups/zero_variance", max(5, len(run.steps) // 4))
    if not share > 0.5 or constant_reward(run) is not None:
        return None
    graded = not run.values("groups/all_correct")
    right, wrong = run.last("groups/all_correct"), run.last("groups/all_wrong")
    if graded:
        which = say("groups.equal", share=run.last("groups/equal"))
    else:
        which = say("groups.outcomes", right=right, wrong=wrong)
    if right > wrong and run.last("eval/pass@1", 1) > SOLVED:
        kind: Literal["watch", "healthy"] = "watch" if warned_of(run, "zero_variance") else "healthy"
        return Finding(kind=kind, title=say("groups.solved"), text=say("groups.solved_text", which=which), figure="groups")
    if setting(run, "dynamic_sampling"):
        text = say("groups.discarded_text", which=which, rounds=run.last("rollouts/rounds"))
        return Finding(kind="watch", title=say("groups.discarded"), text=text, figure="groups")
    if not run.last("utilisation") < EVERYWHERE_USED:
        return None  # A critic, a reward history or step rewards give advantages to zero-variance groups too.
    advice = "tell_apart" if graded else "too_hard" if wrong > right else "too_easy"
    return Finding(kind="watch", title=say("groups.title"), text=say(f"groups.{advice}", which=which), figure="groups")


def length_growth(run: Run) -> Finding | None:
    """Report completions that grow while held-out results do not."""
    first, last = run.first("length/mean"), run.last("length/mean")
    scores = run.values(run.measure.key)
    if len(scores) < 3 or not last > 2 * first:
        return None
    if scores[-1] - scores[0] > (0.02 if run.measure.percent else noise_of_change(run)):
        return None
    title = say("length.accuracy" if run.measure.percent else "length.reward")
    text = say("length.text", first=first, last=last, measure=measure_name(run.measure))
    return Finding(kind="watch", title=title, text=text, figure="length")
