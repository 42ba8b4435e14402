"""groupwise ablate."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

from groupwise.cli.common import Out, app, console, exit_codes
from groupwise.config import Recipe, load
from groupwise.errors import RunError
from groupwise.text import visible


@app.command()
def ablate(
    ladder: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped ladder.")] = "dapo",
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, max=10_000, help="Runs of each rung; by default as the ladder says.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Runs at once, sharing the cores.")] = 1,
    out: Out = None,
) -> None:
    """Run one technique after another for several seeds, and compare. The same command goes on where it was stopped."""
    from groupwise.experiments import ladder as ladders
    from groupwise.training.interrupts import Interrupted

    with exit_codes():
        path = ladders.find_ladder(ladder)
        settings, recipe = ladders.load_ladder(path)
        _check_rungs(settings, recipe)
        home = out or Path("runs") / f"ladder-{path.stem}"
        plan = ladders.plan(settings, home, seeds or settings.seeds)
        ladders.claim(settings, path, recipe, home)
        left = [job for job in plan if not job.done]
        console.print(f"{settings.title}: {len(plan)} runs, {len(left)} of them to do; writing {home}", soft_wrap=True)
        with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:
            bar = progress.add_task("runs", total=len(left))

            def note(job: ladders.Job, good: bool) -> None:
                progress.advance(bar)
                if not console.is_terminal or not good:
                    progress.console.print(f"{settings.rungs[job.rung].name}, seed {job.seed}: {'done' if good else 'failed'}")

            try:
                failed = ladders.run_all(settings, recipe, plan, home, jobs, note)
            except Interrupted as interrupted:
                progress.console.print(f"{interrupted}, and so are its runs; the same command goes on")
                raise typer.Exit(interrupted.exit_code) from interrupted
        rows = ladders.compare(settings, plan)
        table = Table(*ladders.columns(rows), title=settings.title)
        for row in rows:
            table.add_row(*ladders.cells(row))
        console.print(table)
        (home / "ladder.md").write_text(visible(ladders.as_markdown(settings, rows), lines=True))
        ladders.picture(settings, rows).save(home / "ladder.png", scale_factor=2)
        console.print(
            f"written: {home / 'ladder.md'} and ladder.png; groupwise report {home}/*/seed-* draws every run", soft_wrap=True
        )
        if failed:
            logs = ", ".join(str(job.log) for job in failed)
            raise RunError(f"{len(failed)} of {len(left)} runs failed; what they said is in {logs}")


def _check_rungs(ladder: Any, recipe: Path) -> None:
    """What `train` would refuse in any of them, before the first one runs."""
    from groupwise.experiments.ladder import overrides
    from groupwise.tasks.base import build_task
    from groupwise.training.algorithm import build_algorithm, check_together

    for i in range(len(ladder.rungs)):
        settings, source = load(recipe, Recipe, overrides(ladder.settings(i)))
        check_together(settings, build_algorithm(settings.algorithm, source), source)
        build_task(settings.task, source, environment=settings.environment.kind is not None)
