"""Rules about what a run learned, and from what: held-out results, rewards, groups, completions. One rule, one function."""

import math

from groupwise.evidence.finding import (
    NOTHING,
    Finding,
    Kind,
    measure_name,
    say,
    sentences,
    setting,
    three_digits,
    under_way,
    warned_of,
)
from groupwise.evidence.held_out import change, improves
from groupwise.evidence.history import Noted
from groupwise.evidence.phrases import Phrase, texts
from groupwise.evidence.runs import Run
from groupwise.text import visible
from groupwise.thresholds import EVERYWHERE_USED, SOLVED

MOST_KINDS = 5
"""Kinds of events that a finding describes."""
FEW_FAILED, MANY_FAILED = 0.01, 0.1
"""Shares of completions that could not be scored: worth a word, and so many that what is learned is biased."""
MANY_TRUNCATED = 0.2
"""Share of completions."""
RIGHT_ALL_THE_SAME = 0.1
"""Share of the truncated completions that are right, above which the limit is no harm: answers of a fixed length."""
ALL = 0.99
"""Share of truncated completions that is all of them."""


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
    """Without its full stop, and with a capital, unless it begins with the name of a setting."""
    word, _, rest = text.rstrip(".").partition(" ")
    return visible(f"{word[:1].upper()}{word[1:]} {rest}" if word.isalpha() else text.rstrip("."), lines=True)


def learned(run: Run) -> Finding | None:
    """Compare the last held-out score with the first one and with the best one."""
    found = change(run)
    if found is None:
        return None
    percent, text_of = found.measure.percent, found.measure.text
    shown = {name: text_of(getattr(found, name)) for name in ("first", "last", "noise", "best")}
    values = {**shown, "measure": measure_name(found.measure, within=True), "steps": found.last_step, "problems": found.problems}
    said = say("learned.change", **values)

    def finding(kind: Kind, title: str, text: str) -> Finding:
        whole = say(
            f"learned.{text}", change=said, step=found.best_step, most=text_of(found.last - found.first + found.noise), **values
        )
        return Finding(kind=kind, title=say(f"learned.{title}"), text=whole, figure="accuracy")

    if found.verdict == "fell from peak":
        return finding("unhealthy", "accuracy_fell" if percent else "reward_fell", "peak")
    if found.verdict == "rose":
        return finding("healthy", "learned", "plain")
    if found.verdict == "fell":
        return finding("unhealthy", "got_worse", "got_worse_text")
    if percent and found.first > 0.97:
        return finding("healthy", "little_to_learn", "plain")
    if found.verdict == "open":
        return finding("watch", "open", "open_text")
    title = "not_yet" if under_way(run) else "did_not_learn"
    return finding("watch", title, "same_text" if found.first == found.last else "did_not_learn_text")


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
    text = say("constant_reward.same_text", steps=steps, reward=three_digits(run.last("reward/shaped_mean")), effect=effect)
    return Finding(kind="unhealthy", title=say("constant_reward.same"), text=text, figure="rewards")


def failed_completions(run: Run) -> Finding | None:
    """Report completions that could not be scored."""
    causes = {name.removeprefix("failed/"): sum(run.values(name)) for name in run.steps.names() if name.startswith("failed/")}
    failed, completions = sum(causes.values()), sum(run.values("rollouts/completions"))
    share = failed / completions if completions else 0.0
    if not share > FEW_FAILED:
        return None
    most = max(causes, key=lambda cause: causes[cause])
    text = say("failed.text", share=share, cause=visible(most), of_these=causes[most] / failed)
    kind: Kind = "unhealthy" if share > MANY_FAILED else "watch"
    return Finding(kind=kind, title=say("failed.title"), text=text, figure="rewards")


def truncated_completions(run: Run) -> Finding | None:
    """Report a token limit that many completions reach."""
    share, before = run.last("length/truncated", max(5, len(run.steps) // 4)), run.first("length/truncated")
    right = run.last("train/pass_rate", max(5, len(run.steps) // 4))
    if not share > MANY_TRUNCATED:
        return _truncated_at_first(run, share)
    found = say("truncated.found", share=share, limit=run.recipe.get("rollouts", {}).get("max_tokens", "?"))
    if before < 0.5 * share and before <= MANY_TRUNCATED:
        text = say("truncated.growing_text", found=found, before=before)
        return Finding(kind="unhealthy", title=say("truncated.growing"), text=text, figure="truncated")
    if right + share - 1 > RIGHT_ALL_THE_SAME * share:
        return None  # At least this share of the truncated ones is right, so that the limit does them no harm.
    remedies = [say("truncated.longer")]
    if not setting(run, "overlong_cache"):
        remedies.append(say("truncated.punish"))
    if not setting(run, "overlong_filter"):
        remedies.append(say("truncated.leave_out"))
    joined = remedies[0]
    for remedy in remedies[1:]:
        joined = say("truncated.several", first=joined, second=remedy)
    graded = math.isnan(right)
    by_design = graded and min(share, before) > ALL and improves(run)  # a reward of completions that all have one length
    falls = share < 0.5 * before and improves(run)
    text = say("truncated.graded_text" if graded else "truncated.many_text", found=found, remedies=joined)
    kind: Kind = "watch" if by_design or falls else "unhealthy"
    return Finding(kind=kind, title=say("truncated.many"), text=text, figure="truncated")


def _truncated_at_first(run: Run, share: float) -> Finding | None:
    """Report a limit that the policy has learned to stay below, where that did not make it better: it answers too soon."""
    before, found = run.first("length/truncated", 5), change(run)
    if not before > MANY_TRUNCATED or found is None or found.verdict == "rose":
        return None
    limit = run.recipe.get("rollouts", {}).get("max_tokens", "?")
    text = say("truncated.first_text", before=before, share=share, limit=limit, measure=measure_name(run.measure, within=True))
    return Finding(kind="unhealthy" if found.ruined else "watch", title=say("truncated.first"), text=text, figure="truncated")


def zero_variance_groups(run: Run) -> Finding | None:
    """Report that most groups have zero variance, unless the algorithm draws a signal from them all the same."""
    window = max(5, len(run.steps) // 4)
    share = run.last("groups/zero_variance", window)
    if not share > 0.5 or constant_reward(run) is not None:
        return None
    graded = not run.values("groups/all_correct")
    right, wrong = run.last("groups/all_correct", window), run.last("groups/all_wrong", window)
    if graded:
        which = say("groups.equal", share=run.last("groups/equal", window))
    else:
        which = say("groups.outcomes", right=right, wrong=wrong)
    if right > wrong and run.last("eval/pass@1", 1) > SOLVED:
        kind: Kind = "watch" if warned_of(run, "zero_variance") else "healthy"
        return Finding(kind=kind, title=say("groups.solved"), text=say("groups.solved_text", which=which), figure="groups")
    if setting(run, "dynamic_sampling"):
        text = say("groups.discarded_text", which=which, rounds=run.last("rollouts/rounds", window))
        return Finding(kind="watch", title=say("groups.discarded"), text=text, figure="groups")
    if not run.last("utilisation", window) < EVERYWHERE_USED:
        return None  # A critic, a reward history or step rewards give advantages to zero-variance groups too.
    advice = "tell_apart" if graded else "too_hard" if wrong > right else "too_easy"
    if graded and improves(run):
        advice = "best_or_stuck"  # The highest possible reward is not known.
    text = say(f"groups.{advice}", which=which, reward=three_digits(run.last("reward/mean", window)))
    return Finding(kind="watch", title=say("groups.title"), text=text, figure="groups")


def length_growth(run: Run) -> Finding | None:
    """Report completions that grow while held-out results do not."""
    first, last = run.first("length/mean"), run.last("length/mean")
    found = change(run)
    if found is None or found.verdict == "rose" or len(run.scores(run.measure.key)[0]) < 3 or not last > 2 * first:
        return None
    title = say("length.accuracy" if run.measure.percent else "length.reward")
    text = say("length.text", first=first, last=last, measure=measure_name(run.measure, within=True))
    return Finding(kind="watch", title=title, text=text, figure="length")
