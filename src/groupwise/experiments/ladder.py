"""`groupwise ablate`: a ladder of settings, each run for several seeds, and the table that compares them.

Every run is a `groupwise train` of its own in a directory of its own, so a ladder that was stopped goes on where it was.
"""

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import altair as alt
from pydantic import Field, ValidationError

from groupwise.config import Recipe, Section, SftRecipe, Source, explain, find_recipe, is_file, load, read_toml
from groupwise.errors import UserError, nearest, short
from groupwise.evidence.comparing import Compared, against_one
from groupwise.evidence.comparing import compare as compared
from groupwise.evidence.ladders import rung_directory
from groupwise.evidence.naming import Group
from groupwise.evidence.pictures import data
from groupwise.evidence.runs import Measure, Run, finite, measure, open_run
from groupwise.evidence.statistics import FEWEST_SEEDS, Interval, interval
from groupwise.evidence.verdicts import say, text
from groupwise.experiments.processes import Commands
from groupwise.files import PARTIAL, present, write_atomically
from groupwise.training.checkpoints import listed
from groupwise.training.segments import changes, completed

MOST_SEEDS = 10_000


class Rung(Section):
    """One setting of an ablation: changes to the recipe."""

    name: str
    set: dict[str, Any] = Field(default_factory=dict)
    """Recipe keys, dotted, and their values."""
    paper: float | None = None
    """The paper's own score for it."""


class Ladder(Section):
    """An ablation: a base recipe, and the settings (rungs) to compare."""

    title: str
    recipe: str = "default"
    """A shipped recipe or a TOML file beside the ladder."""
    base: str = ""
    """A recipe for `groupwise sft` whose model every run starts from; made once."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Changes to the recipe for every rung."""
    cumulative: bool = False
    """Each rung keeps the changes of those before it, and is compared with the one before; else with the first."""
    seeds: int = Field(default=5, ge=1, le=MOST_SEEDS)
    paper: str = ""
    """Where the paper's scores come from."""
    rungs: list[Rung]

    def settings(self, rung: int) -> dict[str, Any]:
        """All changes that a rung makes to the recipe."""
        first = 0 if self.cumulative else rung
        merged = dict(self.set)
        for item in self.rungs[first : rung + 1]:
            merged |= item.set
        return merged


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of a ladder."""

    rung: int
    seed: int
    path: Path

    @property
    def log(self) -> Path:
        """What the run says; not called seed-…, so that a pattern finds runs only."""
        return self.path.parent / f"log-{self.path.name}.txt"

    @property
    def done(self) -> bool:
        return present(self.path / "model").is_dir()


def shipped_ladders() -> list[str]:
    return sorted(path.name.removesuffix(".toml") for path in (files("groupwise") / "ladders").iterdir())


def find_ladder(name: str) -> Path:
    """The file of a ladder: a path, or a shipped one's name.

    Raises:
        UserError: there is neither.
    """
    if name in shipped_ladders():
        return Path(str(files("groupwise") / "ladders" / f"{name}.toml"))
    if not is_file(Path(name)):
        raise UserError(f"no ladder {short(name, 300)}: neither a file nor a shipped ladder{nearest(name, shipped_ladders())}")
    return Path(name)


def load_ladder(path: Path) -> tuple[Ladder, Path]:
    """Read a ladder file and check the recipe of each of its rungs. Returns the ladder and the path of its base recipe.

    Raises:
        UserError: with file, line and key of what is wrong.
    """
    tree, text = read_toml(path)
    source = Source(path, text)
    try:
        ladder = Ladder.model_validate(tree)
    except ValidationError as error:
        raise explain(error, Ladder, source) from error
    if len(ladder.rungs) < 2:
        raise source.error("rungs", "a comparison needs at least two")
    repeated = [rung.name for rung in ladder.rungs if [other.name for other in ladder.rungs].count(rung.name) > 1]
    if repeated:
        raise source.error("rungs", f"two are called {repeated[0]!r}")
    beside = path.parent / ladder.recipe
    recipe = beside if is_file(beside) else find_recipe(ladder.recipe)
    for rung in range(len(ladder.rungs)):
        load(recipe, Recipe, overrides(ladder.settings(rung)))
    if ladder.base:
        load(find_recipe(ladder.base), SftRecipe)
    return ladder, recipe


def overrides(settings: dict[str, Any]) -> list[str]:
    """Settings as `--set key=value` takes them."""
    return [f"{key}={_inline(value)}" for key, value in settings.items()]


def _inline(value: Any) -> str:
    """A value as TOML on one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_inline(key)} = {_inline(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return f"[{', '.join(map(_inline, value))}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return value.isoformat() if hasattr(value, "isoformat") else repr(value)


def plan(ladder: Ladder, out: Path, seeds: int) -> list[Job]:
    """Every run: all rungs of a seed before the next seed, so that a ladder cut short compares what it has."""
    return [
        Job(rung=i, seed=seed, path=out / rung_directory(i, rung.name) / f"seed-{seed}")
        for seed, (i, rung) in itertools.product(range(seeds), enumerate(ladder.rungs))
    ]


def claim(ladder: Ladder, ladder_path: Path, recipe: Path, out: Path) -> None:
    """Make `out` this ladder's: its ladder.toml, and plan.json with every rung's whole recipe.

    Raises:
        UserError: it holds something else, or was begun with other settings, or cannot be written.
    """
    recipes = [load(recipe, Recipe, overrides(ladder.settings(i)))[0].model_dump() for i in range(len(ladder.rungs))]
    base = find_recipe(ladder.base).read_text(encoding="utf-8") if ladder.base else ""
    plan = json.loads(json.dumps({"recipes": recipes, "base": base}, default=str))  # as it is read again: dates are text
    copy = out / "plan.json"
    if copy.is_file():
        if not _agrees(copy, plan):
            raise UserError(f"--out {out}: holds the runs of another ladder, or of this one before it or its recipe was changed")
        return
    if out.exists() and (not out.is_dir() or any(not _is_ours(path) for path in out.iterdir())):
        raise UserError(f"--out {out}: already there and not empty, and not a ladder's")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from error
    write_atomically(out / "ladder.toml", ladder_path.read_bytes())
    write_atomically(copy, json.dumps(plan, indent=1))  # last: a ladder that has it was claimed


def _agrees(copy: Path, plan: Mapping[str, Any]) -> bool:
    """Whether a plan is that of a file; what an earlier version did not know has its default."""
    try:
        known = json.loads(copy.read_bytes())
        pairs = zip(known["recipes"], plan["recipes"], strict=True)
        return known["base"] == plan["base"] and not any(changes(completed(old), completed(new)) for old, new in pairs)
    except (UserError, ValueError, TypeError, KeyError, AttributeError, RecursionError):  # damaged, or of another version
        return False


def _is_ours(path: Path) -> bool:
    """Whether it is what `claim` leaves if it is killed."""
    return path.name == "ladder.toml" or path.name.startswith(PARTIAL)


def run_all(
    ladder: Ladder, recipe: Path, jobs: Sequence[Job], out: Path, at_once: int, report: Callable[[Job, bool], None]
) -> list[Job]:
    """Run what is not done yet, `at_once` processes sharing the cores; returns the runs that failed.

    `report` is called after each run with whether it succeeded.

    Raises:
        Interrupted: a signal came. The runs under way had it too, and have ended.
    """
    threads = max(1, (os.cpu_count() or 1) // at_once)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    commands = Commands()
    failed: list[Job] = []

    def run(job: Job, model: Path | None) -> None:
        if commands.signals:
            return
        settings = {**ladder.settings(job.rung), "seed": job.seed} | ({"model.path": str(model)} if model else {})
        if listed(job.path / "checkpoints"):
            arguments = ["train", "--resume", str(job.path)]
        else:  # which also begins a run again that was stopped before its first checkpoint
            sets = [f"--set={override}" for override in overrides(settings)]
            arguments = ["train", str(recipe), *sets, "--out", str(job.path)]
        job.path.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("w") as log:
            code = commands.run(arguments, log, environment)
        if code == 0 or not commands.signals:
            failed.extend([job] if code else [])
            report(job, code == 0)

    with commands.interruptible():
        model = make_base(ladder, out, commands, environment) if ladder.base else None
        with ThreadPoolExecutor(max_workers=at_once) as pool:
            list(pool.map(lambda job: run(job, model), [job for job in jobs if not job.done]))
    return failed


def make_base(ladder: Ladder, out: Path, commands: Commands, environment: Mapping[str, str]) -> Path:
    """The model that every run starts from; trained with `groupwise sft` first if it does not exist yet.

    Raises:
        UserError: it could not be made.
    """
    path, log = out / "base", out / "log-base.txt"
    if not (path / "sft.json").is_file():
        shutil.rmtree(path, ignore_errors=True)
        with log.open("w") as output:
            code = commands.run(["sft", str(find_recipe(ladder.base)), "--out", str(path)], output, environment)
        if code != 0 and not commands.signals:
            raise UserError(f"groupwise sft {ladder.base}: {log.read_text(errors='replace').rpartition('error: ')[2].strip()}")
    return path


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What became of a rung."""

    name: str
    seeds: int
    scores: dict[int, float]
    """Held-out score at the end, by seed."""
    measure: Measure
    """What the score is."""
    score: Interval
    change: Compared | None
    """Against the rung before or the first; None for the first, and where one of the two has no result."""
    completions: float
    seconds: float
    paper: float | None
    paper_change: float | None


def compare(ladder: Ladder, jobs: Sequence[Job]) -> list[Row]:
    """A row for each rung, of the runs that are done."""
    runs: dict[int, dict[int, Run]] = {}
    for job in jobs:
        if job.done:
            runs.setdefault(job.rung, {})[job.seed] = open_run(job.path)
    scored = measure(run for found in runs.values() for run in found.values())
    groups = [Group(id=str(i), name=rung.name, runs=list(runs.get(i, {}).values())) for i, rung in enumerate(ladder.rungs)]
    pairs = [(first, second) for first, second in against_one(groups, cumulative=ladder.cumulative) if first.runs and second.runs]
    changes = {int(item.second.id): item for item in compared(pairs) if item.outcomes.measure == "score"}
    rows: list[Row] = []
    for i, rung in enumerate(ladder.rungs):
        found = runs.get(i, {})
        scores = {seed: run.last(scored.key, 1) for seed, run in sorted(found.items())}
        before = rows[i - 1 if ladder.cumulative else 0] if i else None
        totals = [(completions[-1], seconds[-1]) for _, completions, seconds in (run.spent() for run in found.values())]
        known = before is not None and before.paper is not None and rung.paper is not None
        rows.append(
            Row(
                name=rung.name,
                seeds=len(scores),
                scores=scores,
                measure=scored,
                score=interval(finite(scores.values())),
                change=changes.get(i),
                completions=_mean([rollouts for rollouts, _ in totals]),
                seconds=_mean([seconds for _, seconds in totals]),
                paper=rung.paper,
                paper_change=rung.paper - before.paper if known else None,  # type: ignore[operator, union-attr]
            )
        )
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def columns(rows: Sequence[Row]) -> tuple[str, ...]:
    """The headings of a comparison."""
    score = rows[0].measure.name
    return ("", "seeds", score, "change", "completions", "seconds", "paper", "its change")


def cells(row: Row) -> list[str]:
    """A row as text, in the order of `columns`; a change that differences between seeds do not explain is marked with a star."""
    change = ""
    if row.change is not None and math.isfinite(row.change.mean):
        change = f"{row.change.mean:+.3f}"
        if row.change.found is not None:
            change += f" ± {row.change.found.half:.3f}{' *' if row.change.verdict in ('better', 'worse') else ''}"
    return [
        row.name,
        str(row.seeds),
        str(row.score) if row.seeds else "",
        change,
        f"{row.completions:,.0f}" if row.seeds else "",
        f"{row.seconds:,.0f}" if row.seeds else "",
        "" if row.paper is None else f"{row.paper:g}",
        "" if row.paper_change is None else f"{row.paper_change:+g}",
    ]


def as_markdown(ladder: Ladder, rows: Sequence[Row]) -> str:
    paper = f" Paper: {ladder.paper}." if ladder.paper else ""
    against = "the rung before" if ladder.cumulative else "the first"
    changes = [row.change for row in rows if row.change is not None]
    return "\n".join(
        [
            f"# {ladder.title}",
            "",
            "| " + " | ".join(columns(rows)) + " |",
            "|" + "---|" * len(columns(rows)),
            *("| " + " | ".join(cells(row)) + " |" for row in rows),
            "",
            f"{rows[0].measure.name} is on held-out problems; ± is Student's 95 % interval over seeds (from {FEWEST_SEEDS} on). "
            f"Changes are against {against}, * where differences between seeds do not explain them (level 5 % for all "
            f"changes together, by Holm's method).{paper}",
            "",
            *(f"- {say('pair', first=item.first.name, second=item.second.name).en}: {text(item).en}" for item in changes),
            "",
        ]
    )


def picture(ladder: Ladder, rows: Sequence[Row]) -> Any:
    """Each seed as a dot, each mean as a tick, with its interval where there are enough seeds for one."""
    order = [row.name for row in rows]
    scored = rows[0].measure
    dots = [{"rung": row.name, "score": score} for row in rows for score in row.scores.values()]
    means = [{"rung": row.name, "mean": row.score.mean} for row in rows if row.score.count]
    ends = [(row.name, row.score.low, row.score.high) for row in rows if not math.isnan(row.score.half)]
    if scored.percent:
        ends = [(name, max(low, 0.0), min(high, 1.0)) for name, low, high in ends]
    y = alt.Y("rung:N", sort=order, title=None, axis=alt.Axis(labelLimit=300))
    x = alt.X(
        "score:Q",
        title=f"held-out {scored.name}",
        scale=alt.Scale(zero=False),
        axis=alt.Axis(format="%") if scored.percent else alt.Axis(),
    )
    points = alt.Chart(data(dots)).mark_circle(size=45, opacity=0.5).encode(y=y, x=x)
    ticks = alt.Chart(data(means)).mark_tick(thickness=3, size=18, color="#c8553d").encode(y=y, x="mean:Q")
    bars = alt.Chart(data([{"rung": name, "low": low, "high": high} for name, low, high in ends]))
    bars = bars.mark_rule(strokeWidth=2, color="#c8553d").encode(y=y, x="low:Q", x2="high:Q")
    said = ["Dots: seeds. Ticks: means."]
    if ends:
        said.append("Bars: 95 % intervals of the means.")
    if len(ends) < len(means):
        said.append(f"Fewer than {FEWEST_SEEDS} seeds: no interval.")
    title = alt.Title(ladder.title, subtitle=" ".join(said), anchor="start", subtitleColor="#666")
    return alt.layer(points, bars, ticks).properties(width=520, height=alt.Step(34), title=title)
