"""groupwise plan."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table
from rich.text import Text

from groupwise.cli.common import Overrides, app, console, exit_codes
from groupwise.config import Recipe, find_recipe, load


@app.command()
def plan(
    recipe: Annotated[str | None, typer.Argument(help="A TOML file, or the name of a shipped recipe.")] = None,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="How many GPUs there are.")] = 1,
    gpu: Annotated[str, typer.Option("--gpu", help="Their kind: h100, h200, a100, ...")] = "h100",
    rates: Annotated[Path | None, typer.Option("--rates", help="A run's directory: lengths and times as measured there.")] = None,
    mean_length: Annotated[
        float | None, typer.Option("--mean-length", min=1, help="Of completions, in tokens; by default 0.4 of the longest.")
    ] = None,
    variation: Annotated[
        float, typer.Option("--length-cv", min=0, help="Standard deviation of lengths over their mean (lognormal).")
    ] = 1.0,
    prompt_tokens: Annotated[
        int | None, typer.Option("--prompt-tokens", min=1, help="Of every prompt, instead of drawing some from the task.")
    ] = None,
) -> None:
    """Whether a recipe fits on so many GPUs, and how to split them. Nothing is trained; of the model only its configuration is
    read."""
    from groupwise.cluster.planning import planner

    with exit_codes():
        settings, source = load(find_recipe(recipe), Recipe, overrides or [])
        found = planner.plan(
            settings, source, gpus=gpus, gpu=gpu, run=rates, mean=mean_length, variation=variation, prompt_tokens=prompt_tokens
        )
        _show(found)


def _show(found: Any) -> None:
    console.print(_memory(found))
    console.print(_options(found))
    console.print(LEGEND, soft_wrap=True)
    for line in found.notes:
        console.print(Text(f"assumed: {line}", style="dim"), soft_wrap=True)
    best = found.best
    console.print()
    if best.samplers:
        lines = [f"--set {key}={str(value).lower()}" for key, value in best.settings().items()]
        console.print("to run it so: " + " ".join(lines), soft_wrap=True)
    else:
        console.print("one GPU: one process samples and learns in turn, and no key needs to be set", soft_wrap=True)


def _memory(found: Any) -> Table:
    """Of a GPU of each kind of process, by part."""
    from groupwise.memory import size

    best, limit = found.best, found.usable
    pieces = {"learner": best.learner, "sampler": best.sampler} if best.samplers else {"the process": best.learner}
    title = f"Memory of a GPU ({found.gpu}, {size(limit)} to use); the model has {found.parameters:,} parameters"
    table = Table("part", *pieces, title=title)
    for name in dict.fromkeys(name for memory in pieces.values() for name in memory.parts):
        table.add_row(name, *(size(memory.parts[name]) if name in memory.parts else "" for memory in pieces.values()))
    table.add_section()
    table.add_row("peak", *(f"{size(memory.peak)} ({memory.peak / limit:.0%})" for memory in pieces.values()))
    return table


def _options(found: Any) -> Table:
    title = "The best split for each bound on the staleness, simulated"
    columns = ("staleness", "samplers", "learners", "rows", "s/step", "tokens/s", "sampling", "full", "learning", "age")
    table = Table(*(Column(name, justify="right", no_wrap=True) for name in columns), title=title, padding=(0, 0))
    for option in found.options:
        outcome = option.outcome
        pieces = (str(option.samplers), str(option.learners)) if option.samplers else ("1 process", "")
        table.add_row(
            str(option.staleness),
            *pieces,
            f"{option.rows:,}",
            f"{outcome.seconds:,.3g}",
            f"{outcome.tokens / outcome.steps / outcome.seconds:,.0f}",
            *(f"{share:.0%}" for share in (outcome.sampler_busy, outcome.sampler_fill, outcome.learner_busy)),
            str(option.largest_age),
            style="bold" if option is found.best else None,
        )
    return table


LEGEND = (
    "staleness 0 is synchronous; rows: completions that a sampler generates at once; sampling: share of time with a row, full: "
    "tokens made over those of all rows taken; learning: share of time; age: the most steps that a group may be behind, which a "
    "window above 1 raises above the staleness"
)
