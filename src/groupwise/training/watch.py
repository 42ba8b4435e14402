"""What is remarkable about a step, seen in its metrics and those of the steps before: a few rules, each with what to do.

Each says its finding once, and again only after it was gone for a while. Nothing but the metrics decides, so that a resumed
run, which is told those of the steps that are done, says the same as one that was never stopped.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from groupwise.config import Recipe
from groupwise.thresholds import ENTROPY_LEFT, EVERYWHERE_USED, LARGEST_GAP, SOLVED
from groupwise.training.events import Warned
from groupwise.training.metrics_file import TRAINED, parse
from groupwise.types import Metrics

REMEMBERED = 32
"""Steps that are kept."""
EARLY = 5
"""Steps at the start, whose values later ones are compared with."""
LATE = 3
"""Steps that a comparison is the mean of."""
ALIKE = 0.8
"""Share of zero-variance groups that makes low entropy a collapse."""
NO_ENTROPY = 1e-3
"""Nats: below it sampling is deterministic, whatever the entropy was at first."""
RISES = 0.02
"""By what share of it the reward must rise within `MANY` steps, half against half, to count as learning."""
RISE = 5.0
"""How many times its early level the gap between sampler and learner must exceed."""
ZERO_VARIANCE, MANY = 0.9, 10
"""Share of zero-variance groups, and in how many steps in a row."""
SLOWER, LEAST_DELAY = 5.0, 30.0
"""A slow step takes so many times the median of those before, and so many seconds more."""
LARGEST = 2**1000
"""Of integers that become a float."""

Found = tuple[str, str]
"""What was seen, and what to do."""


class Watch:
    """Looks at one step after the other."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.early: list[Mapping[str, float]] = []
        """Metrics of the first steps."""
        self.recent: deque[Mapping[str, float]] = deque(maxlen=REMEMBERED)
        """Of the last ones, the newest at the end."""
        self.seconds: deque[float] = deque(maxlen=REMEMBERED)
        """What these took; NaN for the first step that a process did."""
        self.warms_up = True
        """Whether the next step is this process's first, which compiles, and fills caches."""
        self.steps = 0
        """How many have been looked at."""
        self.held: dict[Callable[[Watch], Found | None], int] = {}
        """Rule -> the last of these steps in which it found something."""

    def look(self, step: int, metrics: Metrics) -> list[Warned]:
        """The events of a step."""
        numbers = {name: math.nan if value is None else value for name, value in metrics.items() if not isinstance(value, list)}
        if len(self.early) < EARLY:
            self.early.append(numbers)
        self.recent.append(numbers)
        self.seconds.append(math.nan if self.warms_up else _seconds(numbers))
        self.warms_up = False
        self.steps += 1
        events = []
        for name, rule, quiet in RULES:
            if (found := rule(self)) is None:
                continue
            if rule not in self.held or self.steps - self.held[rule] > quiet:
                text, advice = found
                events.append(Warned(step=step, name=name, text=text, advice=advice))
            self.held[rule] = self.steps
        return events

    def catch_up(self, metrics: Path) -> None:
        """Look at the steps that a resumed run has recorded already."""
        for line in metrics.read_bytes().splitlines() if metrics.exists() else ():
            record = parse(line)
            if record is not None and TRAINED in record:
                self.look(0, {name: value for name, value in record.items() if value is None or _is_number(value)})
        self.warms_up = True

    # --- what rules ask

    def now(self, name: str) -> float:
        """The last step's value; NaN if it has none."""
        return self.recent[-1].get(name, math.nan)

    def first(self, name: str, count: int = LATE) -> float:
        return _mean(self.early[:count], name)

    def last(self, name: str, count: int = LATE) -> float:
        return _mean(list(self.recent)[-count:], name)


def _is_number(value: object) -> bool:
    """Whether a value of a file that may be damaged can be reckoned with."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) <= LARGEST)


def _mean(records: Sequence[Mapping[str, float]], name: str) -> float:
    """Of the values that are there and finite; NaN if there is none."""
    values = [record[name] for record in records if math.isfinite(record.get(name, math.nan))]
    return sum(values) / len(values) if values else math.nan


def nonfinite_update(watch: Watch) -> Found | None:
    """Updates were skipped in the last steps."""
    counts = [record["skipped_updates"] for record in list(watch.recent)[-MANY - 1 :] if "skipped_updates" in record]
    skipped = counts[-1] - (counts[0] if watch.steps > MANY else 0) if counts else 0.0
    if not skipped > 0:
        return None
    settings = watch.recipe.learner
    return (
        f"updates were skipped ({skipped:.0f} in the last {min(MANY, watch.steps)} steps): their loss or gradient was not finite",
        f"Lower learner.learning_rate (now {settings.learning_rate:g}) or raise learner.warmup_steps; after "
        f"{settings.max_bad_updates} in a row (learner.max_bad_updates) the run stops.",
    )


def entropy_collapse(watch: Watch) -> Found | None:
    """The policy has hardly varied its completions for many steps, so that most groups teach nothing, and gets no better though
    much is left to learn. Entropy alone says little: it also falls as far in runs that go on to solve their problems."""
    first, recent = watch.first("entropy"), list(watch.recent)[-MANY:]
    gone = all(record.get("entropy", math.nan) < max(ENTROPY_LEFT * first, NO_ENTROPY) for record in recent)
    early, late = (_mean(part, "reward/mean") for part in (recent[: MANY // 2], recent[MANY // 2 :]))
    rises = late > early + RISES * abs(early)
    alike = watch.last("groups/zero_variance", MANY) >= ALIKE
    if watch.steps < MANY + LATE or not gone or rises or not alike or watch.last("train/pass_rate", MANY) > SOLVED:
        return None
    return (
        f"the entropy has collapsed from {first:.3g} to {watch.last('entropy'):.3g} nats per token: the completions of a group "
        "hardly differ, and the reward does not rise",
        _if_not_the_best(
            watch,
            "Raise algorithm.clip_high or set algorithm.entropy_bonus, lower learner.learning_rate "
            f"(now {watch.recipe.learner.learning_rate:g}), or go on from a checkpoint before this.",
        ),
    )


def _if_not_the_best(watch: Watch, advice: str) -> str:
    """Advice on a policy that gets no better. Where nothing says what is right, the best possible reward is not known."""
    if not math.isnan(watch.last("train/pass_rate", MANY)):
        return advice
    return f"If a higher mean reward than {watch.last('reward/mean', MANY):.3g} is possible: {advice[0].lower()}{advice[1:]}"


def zero_variance(watch: Watch) -> Found | None:
    """Nearly all groups have equal rewards, for many steps."""
    recent = list(watch.recent)[-MANY:]
    shares = [record.get("groups/zero_variance", math.nan) for record in recent]
    solved = watch.last("train/pass_rate", MANY) > SOLVED
    discarded = watch.last("dropped/zero_variance", MANY) > 0  # by dynamic sampling, so that all that is left is used
    used = watch.last("utilisation", MANY) >= EVERYWHERE_USED and not discarded
    if len(recent) < MANY or not all(share >= ZERO_VARIANCE for share in shares) or solved or used:
        return None
    right, wrong = watch.last("groups/all_correct", MANY), watch.last("groups/all_wrong", MANY)
    if math.isnan(right):
        advice = _if_not_the_best(watch, "Raise rollouts.group_size, or use a reward that tells more completions apart.")
    elif wrong > right:
        advice = "Use easier problems, raise rollouts.group_size or rollouts.max_tokens, or warm the model up with groupwise sft."
    else:
        advice = "Use harder problems."
    share = sum(shares) / len(shares)
    return f"in the last {MANY} steps {share:.0%} of the groups had equal rewards, which give no gradient", advice


def sampler_gap(watch: Watch) -> Found | None:
    """Sampler and learner drift apart. With groups of earlier steps' weights they differ by design."""
    early, last = watch.first("sampler_gap_mean", EARLY), watch.last("sampler_gap_mean")
    stale = watch.recipe.rollouts.max_age or watch.recipe.cluster.staleness
    if watch.steps <= EARLY or stale or not last > max(LARGEST_GAP, RISE * early):
        return None
    return (
        f"the sampler's log-probabilities are {last:.2g} nats from the learner's on average, at first {early:.2g}",
        'algorithm.correction = "tis" corrects this; rollouts.dtype, rollouts.cache_dtype and learner.precision = "float32" '
        "remove what rounding causes; a sampler of your own may not load the weights that it is given.",
    )


def slow_step(watch: Watch) -> Found | None:
    """A step took far longer than those before it. The first one of a process does so rightly."""
    *before, last = watch.seconds
    before = [seconds for seconds in before if not math.isnan(seconds)]
    if len(before) < EARLY:
        return None
    usual = statistics.median(before)
    if not (last > SLOWER * usual and last > usual + LEAST_DELAY):
        return None
    parts = {name: watch.now(f"seconds/{name}") for name in ("scoring", "rollouts", "learner")}
    parts["rollouts"] -= parts["scoring"] if math.isfinite(parts["scoring"]) else 0.0
    most = max(parts, key=lambda name: parts[name] if math.isfinite(parts[name]) else 0.0)
    advice = {
        "scoring": "Scores were waited for: see whether the reward or its server hangs, and lower task.reward_timeout.",
        "rollouts": "Generation took it: see whether completions grow (length/mean), or other processes use the device.",
        "learner": "The updates took it: see whether memory is short (memory/peak_mib), or other processes use the device.",
    }[most]
    return f"the step took {last:.0f} s, those before it {usual:.0f} s", advice


def _seconds(record: Mapping[str, float]) -> float:
    return record.get("seconds/rollouts", 0.0) + record.get("seconds/learner", 0.0)


def micro_batches_halved(watch: Watch) -> Found | None:
    """Memory did not suffice for the learner's micro-batches."""
    return _halved(watch, "micro_batch_tokens", "learner.micro_batch_tokens", watch.recipe.learner.micro_batch_tokens)


def rows_halved(watch: Watch) -> Found | None:
    """Memory did not suffice for the rows that were generated at once."""
    return _halved(watch, "rollouts/max_rows", "rollouts.max_rows", watch.recipe.rollouts.max_rows)


def _halved(watch: Watch, metric: str, key: str, asked: int) -> Found | None:
    before = [float(asked), *(record[metric] for record in list(watch.recent)[:-1] if metric in record)][-1]
    now = watch.now(metric)
    if not now < before:
        return None
    text = f"out of memory with {key} = {before:.0f}: what failed was done again with {now:.0f}, which holds from now on"
    return text, f"Set {key} = {now:.0f} to begin with that."


RULES: Sequence[tuple[str, Callable[[Watch], Found | None], int]] = (
    ("nonfinite_update", nonfinite_update, MANY),
    ("entropy_collapse", entropy_collapse, 3 * MANY),
    ("zero_variance", zero_variance, 3 * MANY),
    ("sampler_gap", sampler_gap, MANY),
    ("slow_step", slow_step, 0),
    ("out_of_memory", micro_batches_halved, 0),
    ("out_of_memory", rows_halved, 0),
)
"""Name of the event, its rule, and for how many steps that must have found nothing before it is said again."""
