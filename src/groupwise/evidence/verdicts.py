"""What comparisons say in words, for the page and for the terminal."""

import math
import statistics
from collections.abc import Sequence

from rich.text import Text

from groupwise.evidence.comparing import Compared, compare, contrasts
from groupwise.evidence.finding import measure_name, sentences
from groupwise.evidence.headline import duration
from groupwise.evidence.naming import Group, differences
from groupwise.evidence.outcomes import evaluated, noise, problems_of
from groupwise.evidence.phrases import Phrase, phrase, same
from groupwise.evidence.runs import SCORE_KEYS
from groupwise.evidence.shapes import Comparison
from groupwise.evidence.statistics import FEWEST_SEEDS, LEVEL, Difference, detectable, seeds_needed

MOST_SEEDS = 100
"""More seeds are not planned for."""
MOST_KEYS = 3
"""How many of them are named."""
COLOURS = {"better": "green", "worse": "red", "open": "yellow", "unknown": "dim"}


def comparisons(groups: Sequence[Group]) -> list[Comparison]:
    """For the page: every pair that is compared, its score first."""
    return [_shape(item) for item in compare(contrasts(groups))]


def as_text(groups: Sequence[Group]) -> list[Text]:
    """A line for each comparison, for the terminal; pairs with too few seeds are only counted where there are several."""
    every = compare(contrasts(groups))
    unknown = [item for item in every if item.verdict == "unknown"]
    shown = [item for item in every if _is_printed(item) or (item.verdict == "unknown" and len(unknown) == 1)]
    lines = [_line(item) for item in shown]
    if len(unknown) > 1:
        few = say("unknown.many", count=len(unknown), fewest=FEWEST_SEEDS)
        lines.append(Text.assemble(("unknown", COLOURS["unknown"]), f"  {few.en}"))
    return lines


def _is_printed(item: Compared) -> bool:
    """Every score, and costs that differ; the page has the others."""
    return item.verdict in ("better", "worse") or (item.verdict == "open" and item.outcomes.measure == "score")


def _line(item: Compared) -> Text:
    names = say("pair", first=item.first.name, second=item.second.name)
    return Text.assemble((item.verdict, COLOURS[item.verdict]), f"  {names.en}: {text(item).en}")


def say(key: str, **values: object) -> Phrase:
    """A text of `templates/comparing_text.toml`."""
    return phrase("comparing", key, **values)


def _shape(item: Compared) -> Comparison:
    found = item.found
    return {
        "first": item.first.id,
        "second": item.second.id,
        "measure": item.outcomes.measure,
        "verdict": item.verdict,
        "difference": (_change(item, item.mean) if item.outcomes.first and item.outcomes.second else same("")).as_json(),
        "low": found.mean - found.half if found else None,
        "middle": found.mean if found else None,
        "high": found.mean + found.half if found else None,
        "text": text(item).as_json(),
    }


def text(item: Compared) -> Phrase:
    """What was found, whether seeds explain it, and what would decide it."""
    if not (item.outcomes.first and item.outcomes.second):
        every = all(evaluated(group.runs, item.scored) for group in (item.first, item.second))
        return sentences([say("unknown.no_common_step" if every else "unknown.no_result"), *_cautions(item)])
    if item.found is None:
        return sentences([_too_few(item), *_cautions(item)])
    parts = [_evidence(item, item.found)]
    if item.outcomes.measure == "score":
        parts.append(say(f"decided.{item.verdict}"))
    if item.verdict == "open":
        if item.found.p < LEVEL:
            parts.append(say("decided.by_chance", family=item.family))
        parts.append(_plan(item, item.found))
    return sentences([*parts, *_cautions(item)])


def _head(item: Compared) -> Phrase:
    """The values of both and their difference. Where seeds are paired the values are those of the pairs, so that they agree."""
    first, second = item.outcomes.first, item.outcomes.second
    if item.found is not None and item.found.paired:
        shared = first.keys() & second.keys()
        first, second = ({seed: of[seed] for seed in shared} for of in (first, second))
    before, after = statistics.fmean(first.values()), statistics.fmean(second.values())
    name = measure_name(item.scored)
    if item.outcomes.measure == "score":
        values = {"after": item.scored.text(after), "before": item.scored.text(before)}
        return say("head.score", measure=name, difference=_change(item, item.mean), **values)
    shown = duration if item.outcomes.measure == "seconds" else _count
    target, ratio = item.scored.text(item.outcomes.target), _ratio(item.mean)
    spent = {"after": shown(math.exp(after)), "before": shown(math.exp(before))}
    return say(f"head.{item.outcomes.measure}", measure=name, target=target, ratio=ratio, **spent)


def _count(value: float) -> Phrase:
    return same(f"{value:,.0f}")


def _change(item: Compared, value: float) -> Phrase:
    """A difference in the measure's unit: "+2.3 points", "1.4 ×"."""
    if item.outcomes.measure != "score":
        return say("words.times", value=_ratio(value))
    return say("words.points", value=_end(item, value)) if item.scored.percent else same(_end(item, value))


def _end(item: Compared, value: float) -> str:
    """An end of an interval, without its unit."""
    if item.outcomes.measure != "score":
        return _ratio(value)
    shown = f"{100 * value:+.1f}" if item.scored.percent else f"{value:+.3g}"
    return shown.replace("-", "−") if shown.strip("+-0.") else shown.lstrip("+-")


def _ratio(log: float) -> str:
    ratio = math.exp(min(log, 700))  # of what a damaged file may say
    return f"{ratio:.2f}" if 0.1 < ratio < 100 else f"{ratio:.3g}"


def _evidence(item: Compared, found: Difference) -> Phrase:
    """What was found, with its interval and p-value."""
    values = {"low": _end(item, found.mean - found.half), "high": _end(item, found.mean + found.half)}
    p = say("evidence.one", p=_p(found.p))
    if item.family > 1:
        p = say("evidence.several", p=_p(found.p), family=item.family, adjusted=_p(item.adjusted))
    if found.paired:
        return say("evidence.paired", head=_head(item), count=found.counts[0], p=p, **values)
    first, second = found.counts
    return say("evidence.separate", head=_head(item), first=first, second=second, p=p, **values)


def _p(value: float) -> str:
    return "p\u00a0<\u00a00.001" if value < 0.001 else f"p\u00a0=\u00a0{value:.2g}"


def _plan(item: Compared, found: Difference) -> Phrase:
    """How many seeds would decide it, and what those that are there could have shown."""
    if found.error == 0:
        return say("plan.equal")
    least = detectable(found, item.level)
    shown = say("words.times", value=_ratio(least))
    if item.outcomes.measure == "score":
        value = f"{100 * least:.1f}" if item.scored.percent else f"{least:.3g}"
        shown = say("words.points", value=value) if item.scored.percent else same(value)
    if found.mean == 0:
        return say("plan.none", detectable=shown)
    needed = seeds_needed(found, item.level, MOST_SEEDS)
    if needed is None:
        return say("plan.many", most=MOST_SEEDS, detectable=shown)
    counts = [say("words.count", count=count) for count in found.counts]
    same_number = len(set(found.counts)) == 1
    present = counts[0] if same_number else say("words.and", second=found.counts[1], first=found.counts[0])
    return say("plan.seeds", needed=needed, present=present, detectable=shown)


def _too_few(item: Compared) -> Phrase:
    """Why nothing is said: with one seed each, whether the noise of two evaluations alone explains the difference."""
    seeds = (len(item.outcomes.first), len(item.outcomes.second))
    head = _head(item)
    if seeds != (1, 1):
        return say("unknown.few", head=head, first=seeds[0], second=seeds[1], fewest=FEWEST_SEEDS)
    runs = [evaluated(group.runs, item.scored)[0] for group in (item.first, item.second)]
    problems = min(problems_of(run, item.outcomes.step) for run in runs)
    if not problems:
        return say("unknown.one", head=head, fewest=FEWEST_SEEDS)
    half = math.hypot(*(noise(run, item.scored, item.outcomes.step) for run in runs))
    shown = say("words.points", value=f"{100 * half:.1f}") if item.scored.percent else same(f"{half:.3g}")
    key = "unknown.one_larger" if abs(item.mean) > half else "unknown.one_noise"
    return say(key, head=head, problems=f"{problems:,}", noise=shown, fewest=FEWEST_SEEDS)


def _cautions(item: Compared) -> list[Phrase]:
    """What else has to be known to read a comparison of scores."""
    if item.outcomes.measure != "score":
        return []
    found = []
    if item.outcomes.step is not None:
        found.append(say("caution.at_step", step=f"{item.outcomes.step:,}"))
    groups = (item.first, item.second)
    counted = [evaluated(group.runs, item.scored) for group in groups]
    left_out = sum(len(group.runs) - len(runs) for group, runs in zip(groups, counted, strict=True))
    lengths = [max((run.last_step for run in runs), default=0) for runs in counted]
    if item.outcomes.step is None and all(lengths) and lengths[0] != lengths[1]:
        found.append(say("caution.lengths", first=f"{lengths[0]:,}", second=f"{lengths[1]:,}"))
    if left_out and all(counted):
        found.append(say("caution.left_out", count=left_out))
    if any(len({run.seed for run in runs}) < len(runs) for runs in counted):
        found.append(say("caution.repeated"))
    keys = [key for key in differences(groups)["keys"] if key.startswith(SCORE_KEYS)]
    if keys:
        more, named = len(keys) > MOST_KEYS, keys[:MOST_KEYS]
        shown = Phrase(", ".join(named) + (" …" if more else ""), f" {'、'.join(named)} {'等' if more else ''}")
        found.append(say("caution.problems", keys=shown))
    return found
