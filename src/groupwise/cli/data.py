"""groupwise data."""

import os
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.bar import Bar
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from groupwise.cli.common import Overrides, app, console, exit_codes
from groupwise.config import Recipe, find_recipe, load
from groupwise.text import shortened

MEASURED = 2000
"""How many prompts' lengths are drawn."""
BINS = 10
IDS = 48
"""How many token ids of a prompt are printed, from its start and its end together."""
LONGEST = 4000
"""How many characters of a prompt are printed."""


@app.command()
def data(
    recipe: Annotated[str | None, typer.Argument(help="A TOML file, or the name of a shipped recipe.")] = None,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("--count", min=0, help="How many prompts to show.")] = 3,
    presets: Annotated[bool, typer.Option("--presets", help="List the datasets that are known by name.")] = False,
) -> None:
    """Show prompts as the model will read them, answers, lengths, and what filters leave out. No model is loaded."""
    from groupwise.tasks.base import datasets_of
    from groupwise.training.prompts import build_prompts, prompt_of
    from groupwise.training.sizes import check_block

    with exit_codes():
        if presets:
            console.print(_presets())
            return
        settings, source = load(find_recipe(recipe), Recipe, overrides or [])
        check_block(settings.task, source)
        task, chat, episodes = build_prompts(settings, source)
        problems = [task.problem(position, settings.seed) for position in range(count)]
        for number, problem in enumerate(problems, start=1):
            _show(number, problem, chat, prompt_of(problem, chat, episodes).tolist())
        held_out = task.held_out(settings.training.eval_problems)
        _count(task, datasets_of(task), held_out)
        _lengths(task, settings, lambda problem: len(prompt_of(problem, chat, episodes)))


def _show(number: int, problem: Any, chat: Any, tokens: list[int]) -> None:
    """One prompt: its text after the chat template, its token ids, its answer and the other columns."""
    how = "through the chat template" if chat.template else "as text, without a chat template"
    ids = " ".join(map(str, tokens if len(tokens) <= IDS else [*tokens[: IDS // 2], "…", *tokens[-IDS // 2 :]]))
    title = f"prompt {number}: {len(tokens)} tokens, {how}"
    console.print(Panel(shortened(chat.tokenizer.decode(tokens), LONGEST), title=title, title_align="left"))
    table = Table.grid(padding=(0, 2))
    table.add_row(Text("ids", style="bold"), ids)
    table.add_row(Text("answer", style="bold"), shortened(problem.answer, 300))
    for name, value in problem.metadata.items():
        table.add_row(Text(str(name), style="bold"), shortened(str(value), 300))
    console.print(table)
    console.print()


def _count(task: Any, datasets: list[Any], held_out: list[Any]) -> None:
    """How many problems there are, and how many rows were left out and why."""
    table = Table("data", "training", "held out", "left out", title="Problems", show_lines=len(datasets) > 1)
    for dataset in datasets:
        pool = dataset.problems
        sizes = [f"{len(part):,}" for part in (pool.train, pool.held)] if hasattr(pool, "train") else ["a stream", "a stream"]
        dropped = "\n".join(f"{number:,} {reason}" for reason, number in pool.dropped.items())
        table.add_row(_short(dataset.path), *sizes, dropped or "none")
    if datasets:
        console.print(table)
    else:
        console.print(f"{task.name}: {len(held_out)} held-out problems", soft_wrap=True)


def _short(path: str) -> str:
    """A file's path from here where that is shorter."""
    return min(path, os.path.relpath(path), key=len) if os.path.isabs(path) else path  # noqa: PTH117


def _lengths(task: Any, settings: Any, length: Callable[[Any], int]) -> None:
    """The lengths of training prompts in tokens, as a histogram."""
    from groupwise.tasks.base import datasets_of

    sizes = [len(pool.train) for pool in (dataset.problems for dataset in datasets_of(task)) if hasattr(pool, "train")]
    measured = min(MEASURED, sum(sizes)) if sizes else 256
    lengths = [length(task.problem(i, settings.seed)) for i in range(measured)]
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // BINS))
    counts = [sum(start <= length < start + width for length in lengths) for start in range(low, high + 1, width)]
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(ratio=1)
    for i, number in enumerate(counts):
        start = low + i * width
        last = min(start + width - 1, high)
        table.add_row(f"{start}-{last}" if last > start else str(start), str(number), Bar(max(counts), 0, number))
    middle = sorted(lengths)[len(lengths) // 2]
    title = f"Prompt lengths in tokens: {measured:,} problems, median {middle}, longest {high}"
    console.print(Panel(table, title=title, title_align="left"))


def _presets() -> Table:
    from groupwise.tasks.presets import PRESETS

    table = Table("preset", "what it is", Column("dataset", overflow="fold"), Column("prompt, answer", overflow="fold"), "reward")
    for name, preset in PRESETS.items():
        table.add_row(name, preset.summary, preset.path, f"{preset.prompt_key}, {preset.answer_key}", preset.reward)
    return table
