"""What a page about runs is drawn from, as JSON: the report has it inside, the live page gets it and its changes from its server.

Texts in two languages are objects {"en": ..., "zh": ...} (`Phrase.as_json`). Names, paths and texts of users are strings, with
hidden characters made visible. Colours and layout are the page's own.
"""

from collections.abc import Sequence
from typing import Any, Literal, NotRequired, TypedDict

Text = dict[str, str]
"""One text in each language."""


class Line(TypedDict):
    """One line of a figure. All lists have one entry for each point, ascending in `steps`."""

    id: str
    """Unique in its figure, the same after every update."""
    setting: str
    """The id of its setting."""
    run: str | None
    """The id of its run; None: the mean over the seeds of its setting."""
    label: Text
    """What it measures, where a figure has several metrics."""
    dash: int
    """Its place among the metrics of the figure, from 0: the page draws each with a stroke of its own."""
    steps: Sequence[int]
    values: Sequence[float | None]
    low: Sequence[float | None] | None
    """Lower end of the 95 % interval over seeds; None: the line has no intervals."""
    high: Sequence[float | None] | None
    means: Sequence[float | None] | None
    """Of all values of a point's stretch, for smoothing; None: every step has its point."""
    seeds: int
    """How many runs the values are means of."""
    stretch: int
    """How many steps one pair of points stands for, their lowest and their highest value; 1: every step has its point."""


class Mark(TypedDict):
    """Something noted at a step."""

    step: int
    text: str


class Axis(TypedDict):
    title: Text
    percent: bool
    log: bool
    """Whether the figure opens with a logarithmic axis."""


class About(TypedDict):
    """What must be known of settings to read their lines; the page says it once for all figures of a group."""

    settings: list[str]
    text: Text


class Constant(TypedDict):
    """A metric that had one value in all steps of all runs: said as a line of text, not drawn."""

    label: Text
    value: str


class Figure(TypedDict):
    id: str
    group: Literal["learning", "health", "policy", "cost"]
    title: Text
    caption: Text
    kind: Literal["lines", "bars", "dots", "curve"]
    """lines: over training steps, in `lines`. The others have `series` over an x axis of their own."""
    x: NotRequired[Axis]
    """Of kinds other than lines."""
    y: Axis
    lines: NotRequired[list[Line]]
    series: NotRequired[list["Series"]]
    bins: NotRequired[list[str]]
    """Of bars: the names of the places along x."""
    constants: NotRequired[list[Constant]]
    """A figure all of whose lines are constant has only these, and is a line of text."""
    band: NotRequired[Text]
    """What the intervals of its lines are, where they are not those of means over seeds."""
    note: NotRequired[Text]
    """What must be known to read it."""
    about: NotRequired[list[About]]


class Series(TypedDict):
    """Points of a figure whose x axis is not a training step; `x` of bars is the place among `bins`."""

    id: str
    setting: str
    label: Text
    dash: int
    x: Sequence[float]
    y: Sequence[float | None]
    tips: NotRequired[Sequence[str]]
    """What a point stands for: the token's text."""
    flags: NotRequired[Sequence[bool]]
    """Of dots: whether the token was clipped."""


class Clock(TypedDict):
    """Completions generated and seconds spent by step, of a run or in the mean over a setting's; between entries they are interpolated."""

    steps: Sequence[int]
    completions: Sequence[float]
    seconds: Sequence[float]


class Setting(TypedDict):
    """Runs that differ in their seed only."""

    id: str
    name: str
    """Short: `dapo`, or a ladder's rung; what differs is in the table of differences."""
    runs: list[str]
    clock: Clock


class Status(TypedDict):
    """How far a run is."""

    state: Literal["beginning", "training", "silent", "finished", "stopped", "gone"]
    """stopped: an event or an exported model does not say that it ended, and nobody works in it. silent: no step for much longer than
    one takes. gone: its directory cannot be read any more."""
    step: int
    steps: int
    """How many it is to do; 0: not known."""
    seconds_left: float | None
    seconds_per_step: float | None
    since: str
    """When something was last written, in UTC, "2026-11-27T18:00:00Z"."""


class RunShape(TypedDict):
    id: str
    name: str
    """Short: `run1 · dapo`."""
    path: str
    setting: str
    seed: int
    status: Status
    readable: "Readable"
    recipe: str
    """TOML."""
    clock: NotRequired[Clock]
    """Its own, where its setting has other runs."""


class Readable(TypedDict):
    """The steps of which completions can be read, ascending."""

    tokens: list[int]
    """Training steps with every completion, each token with its numbers."""
    texts: list[tuple[int, int]]
    """Ranges of training steps with the best and the worst completion of each group, as text; first and last step of each."""
    held_out: list[int]
    """Evaluations with the completions of held-out problems, as text."""


class Tile(TypedDict):
    id: Literal["score", "reward", "time", "speed", "health", "progress"]
    label: Text
    value: Text
    detail: Text
    kind: Literal["", "unhealthy", "watch", "healthy"]


class Finding(TypedDict):
    setting: str
    kind: Literal["unhealthy", "watch", "healthy"]
    title: Text
    text: Text
    figure: str
    """The id of the figure that shows it, or "events"."""


class Noted(TypedDict):
    run: str
    step: int
    time: str
    kind: str
    text: str
    advice: str


class SegmentShape(TypedDict):
    run: str
    first: int
    started: str
    version: str
    changed: list[str]


class Differences(TypedDict):
    """The settings in which runs differ."""

    keys: list[str]
    rows: list["DifferenceRow"]


class DifferenceRow(TypedDict):
    setting: str
    values: list[str]


class Comparison(TypedDict):
    """What can be said of two settings in one measure: their held-out scores, or what it took to reach a score."""

    first: str
    second: str
    """Ids of settings."""
    measure: Literal["score", "completions", "seconds"]
    verdict: Literal["better", "worse", "open", "unknown"]
    """Of the second: better or worse by more than differences between seeds explain; open: these could explain it; unknown: too few
    seeds to say."""
    difference: Text
    """Of the second from the first, short: "+2.3 points", "1.4 ×"; empty: not known."""
    low: float | None
    middle: float | None
    high: float | None
    """The difference and the ends of its 95 % interval: in the measure's unit, of completions and seconds the logarithm of the ratio.
    None: too few seeds."""
    text: Text


class SummaryRow(TypedDict):
    setting: str
    runs: list[str]
    """Their short names, of many the first ones."""
    seeds: int
    steps: int
    before: str
    after: str
    completions: str
    seconds: "Text | str"
    tokens_per_second: str


class Document(TypedDict):
    """Everything of a page but the completions."""

    title: str
    measure: Text
    """What held-out results are measured by."""
    settings: list[Setting]
    runs: list[RunShape]
    tiles: list[Tile]
    summary: list[SummaryRow]
    differences: Differences
    comparisons: list[Comparison]
    findings: list[Finding]
    events: list[Noted]
    segments: list[SegmentShape]
    left_out: list[str]
    marks: list[Mark]
    """What was noted, for all figures over training steps."""
    figures: list[Figure]


class TurnToRead(TypedDict):
    """Consecutive texts of a completion that one side of the conversation said."""

    role: str
    label: str
    """More of it than the role, where it was recorded: "tool, 1 failed"."""
    start: int
    """Index of the first of its texts, among those that were not left out."""
    end: int
    """Index after the last."""


class Completion(TypedDict):
    """One completion to read. The lists of numbers have one entry for each shown token, and are empty where only the text was recorded."""

    row: int
    text: list[str]
    """Its tokens; where only the text was recorded, the text of each turn."""
    tokens: int | None
    """How many tokens it has; None: not recorded."""
    reward: float | None
    """None: it could not be scored."""
    parts: dict[str, float]
    """The reward's components, as they were trained on; they sum to the reward. Empty: not recorded."""
    correct: bool | None
    stop: str
    left_out: int
    """Tokens that are not shown, after the first `start`."""
    start: int
    turns: list[TurnToRead]
    """Empty: all of it is one turn of the policy."""
    advantage: list[float | None]
    ratio: list[float | None]
    probability: list[float | None]
    entropy: list[float | None]
    clipped: list[int | None]
    """1: its gradient was clipped at the upper bound of the ratio, -1: at the lower one, 0: it was not."""


class GroupToRead(TypedDict):
    prompt: str
    key: str
    """The same for the same problem in other steps and runs: a hash of the prompt and the answer."""
    answer: str
    completions: list[Completion]


class StepToRead(TypedDict):
    """Completions of one step of one run."""

    run: str
    step: int
    source: Literal["tokens", "texts", "held_out"]
    first: int
    """The place of the first of `groups` among the step's."""
    groups: list[GroupToRead]
    left_out: int
    """Groups that are not here."""


Patch = dict[str, Any]
"""What changed of a Document: see `live.patches`."""
