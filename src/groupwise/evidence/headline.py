"""The numbers at the top of a page about runs: its tiles, and the table with a row for each setting."""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from groupwise.evidence.finding import Kind, measure_name, three_digits
from groupwise.evidence.naming import Group, differences, short_names
from groupwise.evidence.outcomes import by_seed, common_step, ends_of, problems_of, score_at
from groupwise.evidence.phrases import Phrase, phrase, same
from groupwise.evidence.runs import SCORE_KEYS, Measure, Run, finite, measure
from groupwise.evidence.shapes import Finding, Status, SummaryRow, Tile
from groupwise.evidence.statistics import FEWEST_SEEDS, Interval, interval

SHOWN_SCORES = 4
"""How many seeds' scores a tile lists where they are too few for an interval."""
SHOWN_RUNS = 8
"""How many runs of a setting the table names."""
REWARDED = (3, 5)
"""Steps at the start and at the end of a run that its rewards are means over, if there are so many."""
KINDS: tuple[Kind, ...] = ("unhealthy", "watch", "healthy")


def tiles(groups: Sequence[Group], findings: Sequence[Finding], statuses: Sequence[Status]) -> list[Tile]:
    """The headline numbers that can be told, in the order in which they are shown."""
    runs = [run for group in groups for run in group.runs]
    made = (
        _score(groups, measure(runs)),
        _reward(groups),
        _health(groups, findings),
        _progress(statuses),
        _time(groups),
        _speed(groups),
    )
    return [tile for tile in made if tile is not None]


def summary(groups: Sequence[Group]) -> list[SummaryRow]:
    """A row for each setting: held-out scores before and after, and what they cost; means over its runs."""
    scored = measure(run for group in groups for run in group.runs)
    rows: list[SummaryRow] = []
    for group in groups:
        before, after = _before(group, scored), _after(group, scored)
        completions = [float(run.spent()[1][-1]) for run in group.runs if len(run.column("rollouts/completions")[0])]
        rows.append(
            {
                "setting": group.id,
                "runs": _some(short_names(group.runs)),
                "seeds": len({run.seed for run in group.runs}),
                "steps": max((run.last_step for run in group.runs), default=0),
                "before": _with_interval(before, scored),
                "after": _with_interval(after, scored),
                "completions": _number(_mean(completions), ",.0f"),
                "seconds": duration(seconds).as_json() if (seconds := _mean(_seconds(group.runs))) else "–",
                "tokens_per_second": _number(_mean(_speeds(group)), ",.0f"),
            }
        )
    return rows


def _some(names: Sequence[str]) -> list[str]:
    return [*names[:SHOWN_RUNS], *([f"… ({len(names)})"] if len(names) > SHOWN_RUNS else [])]


def _before(group: Group, scored: Measure) -> list[float]:
    """Each seed's first held-out score, of the runs that have a later one too, if any has: the same as `_after` tells of."""
    runs = _twice(group, scored) or [run for run in group.runs if len(run.scores(scored.key)[0])]
    return finite(by_seed(runs, lambda run: float(run.scores(scored.key)[1][0])).values())


def _after(group: Group, scored: Measure, step: int | None = None) -> list[float]:
    """The held-out score of each seed whose runs were evaluated more than once, after a step; None: the last one."""
    return finite(by_seed(_twice(group, scored), lambda run: score_at(run, scored, step)).values())


def _twice(group: Group, scored: Measure) -> list[Run]:
    """The runs with two evaluations that can be compared."""
    return [run for run in group.runs if len(run.scores(scored.key)[0]) > 1]


def _with_interval(scores: Sequence[float], scored: Measure) -> str:
    if not scores:
        return "–"
    found = interval(scores)
    if found.count < FEWEST_SEEDS:
        return scored.text(found.mean)
    if _leaves_range(found, scored):
        return f"{scored.text(found.mean)} ({_range(found.low, found.high, scored)})"
    return f"{scored.text(found.mean)} ± {scored.text(found.half)}"


def _leaves_range(found: Interval, scored: Measure) -> bool:
    """Whether an interval holds values that a share cannot have."""
    return scored.percent and (found.low < 0 or found.high > 1)


def _range(low: float, high: float, scored: Measure) -> str:
    if scored.percent:
        low, high = max(low, 0.0), min(high, 1.0)
    return f"{scored.text(low)}\N{NO-BREAK SPACE}–\N{NO-BREAK SPACE}{scored.text(high)}"


def _score(groups: Sequence[Group], scored: Measure) -> Tile | None:
    """The held-out score before and after; of several settings the best one's, and where the others are."""
    step = common_step([run for group in groups for run in _twice(group, scored)], scored) if len(groups) > 1 else None
    ended = [(group, _after(group, scored, step or None)) for group in groups]
    ended = [(group, scores) for group, scores in ended if scores]
    values = {"name": measure_name(scored)}
    if not ended:
        first = [score for group in groups for score in _before(group, scored)]
        if not first:
            return None
        changed = any(len(run.evaluations) > 1 for group in groups for run in group.runs)
        detail = phrase("summary", "score.one_since" if changed else "score.one_evaluation")
        return _tile("score", phrase("summary", "score.label", **values), same(scored.text(_mean(first))), detail)
    if len(ended) > 1 and (step == 0 or any(key.startswith(SCORE_KEYS) for key in differences(groups)["keys"])):
        spread = _spread([_mean(scores) for _, scores in ended], scored.text)
        why = phrase("summary", "score.at_no_step" if step == 0 else "score.other_problems", count=len(ended))
        return _tile("score", phrase("summary", "score.label", **values), same(spread), why)
    best, scores = max(ended, key=lambda item: _mean(item[1]))
    before = _before(best, scored)
    change = f"{scored.text(_mean(before))} → {scored.text(_mean(scores))}" if before else scored.text(_mean(scores))
    sure = _sure(best, scores, scored, step)
    if len(groups) == 1:
        return _tile("score", phrase("summary", "score.label", **values), same(change), sure)
    others = [_mean(found) for group, found in ended if group is not best]
    if not others:
        where = phrase("summary", "score.alone", setting=best.name)
    else:
        spread = _spread(others, scored.text)
        where = phrase(
            "summary", "score.others" if len(others) > 1 else "score.other", setting=best.name, spread=spread, count=len(others)
        )
    if step is not None:
        where = phrase("summary", "score.at_step", where=where, step=f"{step:,}")
    detail = phrase("summary", "score.best_detail", where=where, noise=sure)
    return _tile("score", phrase("summary", "score.best", **values), same(change), detail)


def _sure(group: Group, scores: Sequence[float], scored: Measure, step: int | None) -> Phrase:
    """How sure the score after a step, None: the last one, of a setting is: over its seeds, or of the one evaluation."""
    if len(scores) >= FEWEST_SEEDS:
        found = interval(scores)
        if _leaves_range(found, scored):
            return phrase("summary", "score.seeds_range", count=len(scores), range=_range(found.low, found.high, scored))
        return phrase("summary", "score.seeds", count=len(scores), half=_half(found.half, scored))
    if len(scores) > 1:
        shown = " · ".join(scored.text(score) for score in scores[:SHOWN_SCORES])
        return phrase("summary", "score.few_seeds", count=len(scores), scores=shown)
    run = _twice(group, scored)[0]
    ends, problems = ends_of(run, scored, step), problems_of(run, step)
    if problems < 2 or not all(map(math.isfinite, ends)):
        return phrase("summary", "score.no_interval")
    return phrase("summary", "score.problems", range=_range(*ends, scored), problems=f"{problems:,}")


def _half(value: float, scored: Measure) -> Phrase:
    """Half the width of an interval; of a share in percentage points."""
    return phrase("comparing", "words.points", value=f"{100 * value:.1f}") if scored.percent else same(scored.text(value))


def _reward(groups: Sequence[Group]) -> Tile | None:
    """The mean reward of the training completions, at the start and at the end."""
    known = [[run for run in group.runs if len(run.column("reward/mean")[1])] for group in groups]
    known = [runs for runs in known if runs]
    if not known:
        return None
    label, shortest = phrase("summary", "reward.label"), min(len(run.steps) for runs in known for run in runs)
    at_first, at_last = (max(1, min(most, shortest // 2)) for most in REWARDED)  # not the same steps at both ends
    last = [_mean([run.last("reward/mean", at_last) for run in runs]) for runs in known]
    if len(known) > 1:
        key = "settings" if at_last > 1 else "settings_one"
        detail = phrase("summary", f"reward.{key}", steps=at_last, count=len(known))
        return _tile("reward", label, same(_spread(last, three_digits)), detail)
    if shortest == 1:
        return _tile("reward", label, same(three_digits(last[0])), phrase("summary", "reward.one_step"))
    first = _mean([run.first("reward/mean", at_first) for run in known[0]])
    detail = phrase("summary", "reward.detail" if at_first > 1 else "reward.two_steps", first=at_first, last=at_last)
    return _tile("reward", label, same(f"{three_digits(first)} → {three_digits(last[0])}"), detail)


def _health(groups: Sequence[Group], findings: Sequence[Finding]) -> Tile:
    """The worst kind of finding, and which findings are of that kind."""
    label = phrase("summary", "health.label")
    worst = next((kind for kind in KINDS if any(finding["kind"] == kind for finding in findings)), None)
    if worst is None:
        return _tile("health", label, phrase("summary", "health.unknown"), phrase("summary", "health.nothing"))
    of_kind = [finding for finding in findings if finding["kind"] == worst]
    first = Phrase(**of_kind[0]["title"])
    ill = len({finding["setting"] for finding in of_kind})
    if len(groups) > 1:
        setting = next(group.name for group in groups if group.id == of_kind[0]["setting"])
        detail = phrase("summary", "health.settings", count=ill, all=len(groups), setting=setting, first=first)
    elif len(of_kind) > 1:
        detail = phrase("summary", "health.more", first=first, count=len(of_kind) - 1)
    else:
        detail = first
    tile = _tile("health", label, phrase("summary", f"kinds.{worst}"), detail)
    tile["kind"] = worst
    return tile


def _progress(statuses: Sequence[Status]) -> Tile | None:
    """How far the runs are."""
    if not statuses:
        return None
    label = phrase("summary", "progress.label")
    if len(statuses) > 1:
        return _progress_of_all(statuses, label)
    status = statuses[0]
    value = f"{status['step']:,} / {status['steps']:,}" if status["steps"] else f"{status['step']:,}"
    return _tile("progress", label, same(value), _listed([phrase("summary", f"states.{status['state']}"), *_left(statuses)]))


def _left(statuses: Sequence[Status]) -> list[Phrase]:
    """How long the run that takes longest will take."""
    left = [status["seconds_left"] for status in statuses if status["seconds_left"] is not None]
    return [phrase("summary", "progress.left", left=duration(max(left)))] if left else []


def _listed(parts: Sequence[Phrase]) -> Phrase:
    return Phrase("; ".join(part.en for part in parts), "；".join(part.zh for part in parts))


def _progress_of_all(statuses: Sequence[Status], label: Phrase) -> Tile:
    counts = Counter(status["state"] for status in statuses)
    steps = _spread([status["step"] for status in statuses], lambda step: f"{step:,.0f}")
    others = [phrase("summary", f"progress.{state}", count=count) for state, count in counts.items() if state != "finished"]
    detail = _listed([phrase("summary", "progress.steps", spread=steps), *others, *_left(statuses)])
    return _tile("progress", label, phrase("summary", "progress.runs", done=counts["finished"], all=len(statuses)), detail)


def _time(groups: Sequence[Group]) -> Tile | None:
    """The seconds of rollouts and learner."""
    seconds = [_mean(_seconds(group.runs)) for group in groups]
    label = phrase("summary", "time.label")
    if not any(seconds):
        return None
    if len(groups) > 1:
        low, high = duration(min(seconds)), duration(max(seconds))
        value = low if low == high else phrase("summary", "time.range", low=low, high=high)
        return _tile("time", label, value, phrase("summary", "time.settings", count=len(groups)))
    runs = groups[0].runs
    steps = sum(len(run.steps) for run in runs)
    per_step = phrase("summary", "time.step", step=duration(sum(_seconds(runs)) / max(1, steps)))
    if len(runs) > 1:
        return _tile("time", label, duration(seconds[0]), phrase("summary", "time.mean", count=len(runs), step=per_step))
    return _tile("time", label, duration(seconds[0]), per_step)


def _seconds(runs: Sequence[Run]) -> list[float]:
    return [float(run.spent()[2][-1]) for run in runs]


def _speed(groups: Sequence[Group]) -> Tile | None:
    """Tokens of the training batches per second of a whole step."""
    speeds = [_mean(found) for group in groups if (found := _speeds(group))]
    if not speeds:
        return None
    value = _spread(speeds, lambda speed: f"{speed:,.0f}")
    detail = phrase("summary", "speed.settings" if len(groups) > 1 else "speed.detail", count=len(speeds))
    return _tile("speed", phrase("summary", "speed.label"), same(value), detail)


def _speeds(group: Group) -> list[float]:
    """The median over each run's steps."""
    return [float(np.median(values)) for run in group.runs if len(values := run.column("tokens_per_second")[1])]


def duration(seconds: float) -> Phrase:
    """Seconds as a person says them: "45 s", "12 min 5 s", "3 h 20 min", "2 d 4 h"."""
    if seconds < 10:
        return phrase("summary", "duration.seconds", seconds=f"{seconds:.2g}" if seconds < 9.95 else "10")
    if seconds < 59.5:
        return phrase("summary", "duration.seconds", seconds=f"{seconds:.0f}")
    total = round(seconds)
    if total < 3600:
        return phrase("summary", "duration.minutes", minutes=total // 60, seconds=total % 60)
    total = round(seconds / 60)
    if total < 24 * 60:
        return phrase("summary", "duration.hours", hours=total // 60, minutes=total % 60)
    total = round(seconds / 3600)
    return phrase("summary", "duration.days", days=total // 24, hours=total % 24)


def _tile(id: str, label: Phrase, value: Phrase, detail: Phrase) -> Tile:
    return {"id": id, "label": label.as_json(), "value": value.as_json(), "detail": detail.as_json(), "kind": ""}  # type: ignore[typeddict-item]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _spread(values: Sequence[float], text: Callable[[float], str]) -> str:
    """The lowest and the highest, as text; one where they read the same."""
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low}\N{NO-BREAK SPACE}–\N{NO-BREAK SPACE}{high}"


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "–"
