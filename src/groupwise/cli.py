"""The command line. Exit codes: 0 done, 1 a run failed, 2 the input is wrong, 130 interrupted."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from groupwise.algorithms import NAMED, PARTS, Algorithm, named
from groupwise.algorithms.algorithm import FORMULAS
from groupwise.config import Recipe, SftRecipe, find_recipe, is_sft, load
from groupwise.errors import RunError, UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train language models on rewards that can be checked: GRPO, DAPO, GSPO, DCPO and their family.",
)
console = Console(highlight=False)
complaints = Console(stderr=True, highlight=False)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in learner.learning_rate=1e-4.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Where to write; by default a new directory under runs/.")]


@contextmanager
def exit_codes() -> Iterator[None]:
    """Errors that have a message become that message and an exit code."""
    try:
        yield
    except UserError as error:
        complaints.print(Text(f"error: {error}"), style="red", soft_wrap=True)
        raise typer.Exit(2) from error
    except RunError as error:
        complaints.print(Text(f"the run failed: {error}"), style="red", soft_wrap=True)
        raise typer.Exit(1) from error
    except OSError as error:  # a full disk, a file that cannot be written
        complaints.print(Text(f"the run failed: {error}"), style="red", soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        complaints.print("interrupted", style="yellow")
        raise typer.Exit(130) from error


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help="A TOML file, or the name of a shipped recipe.")] = None,
    overrides: Overrides = None,
    out: Out = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Go on with the run in this directory.")] = None,
) -> None:
    """Train a model. Without a recipe: the embedded default."""
    from groupwise.training import session
    from groupwise.training.interrupts import Interrupted

    with exit_codes():
        plan = session.plan(recipe, overrides=overrides or [], out=out, resume=resume)
        try:
            result = session.run(plan, console)
        except (Interrupted, KeyboardInterrupt) as error:
            raise typer.Exit(130) from error
        _print_result(result, plan.path)


def _print_result(result: Any, path: Path) -> None:
    table = Table("held-out problems", "before", "after", title="What it learned")
    names = {"eval/pass@1": "pass@1", "eval/length": "mean length, tokens", "eval/truncated": "truncated"}
    for key, value in result.before.metrics.items():
        name = names.get(key, key.removeprefix("eval/").replace("_", " "))
        form = "{:.1f}" if key == "eval/length" else "{:.3f}"
        table.add_row(name, form.format(value), form.format(result.after.metrics[key]))
    console.print(table)
    console.print(_examples(result))
    console.print(f"{result.seconds:.0f} s; the trained model is in {path / 'model'}", soft_wrap=True)


def _examples(result: Any, count: int = 3) -> Table:
    """Held-out problems that it answers now and did not before."""
    table = Table("problem", "answer", "it said before", "it says now", title="Examples", show_lines=True)
    turned = [
        i
        for i, (old, new) in enumerate(zip(result.before.scores, result.after.scores, strict=True))
        if new[0].correct and not old[0].correct
    ]
    turned.sort(key=lambda i: -len(result.after.completions[i][0].text))
    for i in turned[:: max(1, len(turned) // count)][:count]:
        problem = result.after.problems[i]
        said = (side.completions[i][0].text for side in (result.before, result.after))
        table.add_row(Text(problem.prompt), Text(problem.answer), *(Text(text) for text in said))
    return table


@app.command("eval")
def evaluate_command(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="A model, or a run's directory.")],
    recipe: Annotated[str | None, typer.Argument(help="Whose task to use; by default the run's own, or the default.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Completions per problem.")] = 1,
    overrides: Overrides = None,
) -> None:
    """Measure pass@1, pass@k and avg@k on held-out problems."""
    from groupwise.seeding import derive
    from groupwise.training.collect import sampling_of
    from groupwise.training.evaluate import evaluate
    from groupwise.training.setup import prepare

    with exit_codes():
        run = Path(model)
        is_run = (run / "recipe.toml").is_file()
        if is_run and not (run / "model").is_dir():
            raise UserError(f"{run}: the run has no model yet; finish it with groupwise train --resume {run}")
        path = run / "recipe.toml" if is_run and recipe is None else find_recipe(recipe)
        where = str(run / "model") if is_run else model
        settings, source = load(path, Recipe, [*(overrides or []), f"model.path={json.dumps(where, ensure_ascii=False)}"])
        ready = prepare(settings, source)
        result = evaluate(
            ready.make_sampler(ready.model),
            ready.task,
            ready.tokenizer,
            ready.task.held_out(settings.training.eval_problems),
            sampling_of(settings),
            samples=samples,
            seed=derive(settings.seed, "evaluation"),
            chat=settings.model.chat,
        )
        metrics = result.metrics | ({f"eval/avg@{samples}": result.metrics["eval/pass@1"]} if samples > 1 else {})
        table = Table("held-out", where, title=f"{len(result.problems)} problems, {samples} samples each")
        for key, value in metrics.items():
            table.add_row(key.removeprefix("eval/").replace("_", " "), f"{value:.3f}")
        console.print(table)


@app.command("sft")
def sft_command(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped recipe.")],
    overrides: Overrides = None,
    out: Out = None,
) -> None:
    """Warm a model up on demonstrations."""
    from groupwise.training.sft import sft

    with exit_codes():
        path = find_recipe(recipe)
        settings, source = load(path, SftRecipe, overrides or [])
        out = out or Path("models") / path.stem
        with Progress(*Progress.get_default_columns(), "{task.fields[loss]}", console=console) as progress:
            bar = progress.add_task("sft", total=settings.sft.steps, loss="")

            def report(step: int, loss: float) -> None:
                progress.update(bar, completed=step, loss=f"loss {loss:.4f}")
                if not console.is_terminal and (step % 50 == 0 or step == settings.sft.steps):
                    progress.print(f"step {step}/{settings.sft.steps}  loss {loss:.4f}")

            record = sft(settings, source, out, report)
        for key, value in record.items():
            console.print(f"{key:<16} {value:.4g}")
        console.print(f"the model is in {out}", soft_wrap=True)


@app.command()
def check(recipe: Annotated[str, typer.Argument(help="A TOML file, or a shipped name.")], overrides: Overrides = None) -> None:
    """Find everything that can be wrong with a recipe, without training."""
    from groupwise.models import encode_prompt
    from groupwise.training.setup import prepare

    with exit_codes():
        path = find_recipe(recipe)
        if is_sft(path):
            _check_sft(path, overrides or [])
            return
        settings, source = load(path, Recipe, overrides or [])
        ready = prepare(settings, source)
        prompt = encode_prompt(ready.tokenizer, ready.problem.prompt, settings.model.chat)
        rows = settings.rollouts.prompts_per_step * settings.rollouts.group_size
        facts = {
            "model": f"{settings.model.path}: {ready.model.name}, {ready.model.num_parameters():,} parameters",
            "task": f"{ready.task.name}: {len(ready.task.held_out(settings.training.eval_problems))} held-out problems",
            "first prompt": repr(ready.tokenizer.decode(prompt)),
            "algorithm": ready.algorithm.name,
            **ready.model.backends(),
            **({"bfloat16": text} if (text := ready.bfloat16()) else {}),
            "a step": f"{settings.rollouts.prompts_per_step} prompts x {settings.rollouts.group_size} = {rows} completions, "
            f"at most {rows * settings.rollouts.max_tokens:,} tokens, {settings.learner.minibatches} updates",
        }
        table = Table.grid(padding=(0, 2))
        for name, value in facts.items():
            table.add_row(f"[bold]{name}[/bold]", Text(value))
        console.print(table)
        console.print("[green]nothing wrong found[/green]")


def _check_sft(path: Path, overrides: list[str]) -> None:
    from groupwise.tasks.base import build_task
    from groupwise.training.sft import start

    settings, source = load(path, SftRecipe, overrides)
    _, model = start(settings, build_task(settings.task, source), source)
    console.print(f"{model.name}, {model.num_parameters():,} parameters; {settings.sft.steps} steps")
    console.print("[green]nothing wrong found[/green]")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Directories of runs; several are compared.")],
    out: Annotated[Path | None, typer.Option("--out", help="The page, or with --format png the directory.")] = None,
    form: Annotated[Literal["html", "png"], typer.Option("--format", help="One page, or each figure as a picture.")] = "html",
) -> None:
    """Draw what runs recorded, and say what is the matter with them."""
    from groupwise.evidence.report import as_text, write_page, write_pictures
    from groupwise.evidence.runs import open_run

    with exit_codes():
        opened = [open_run(run) for run in runs]
        home = runs[0] if len(runs) == 1 else Path()
        if form == "png":
            written = write_pictures(opened, out or home / "figures")
            console.print(f"{len(written)} figures in {out or home / 'figures'}", soft_wrap=True)
            return
        page = out or home / "report.html"
        for line in as_text(write_page(opened, page)):
            console.print(line, soft_wrap=True)
        console.print(f"written: {page}", soft_wrap=True)


@app.command()
def explore(
    run: Annotated[Path | None, typer.Argument(help="A run whose tokens are laid over the figures.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Where to write the page.")] = Path("explorer.html"),
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open it in the browser.")] = True,
) -> None:
    """The mechanisms as interactive figures, in a browser."""
    from groupwise.evidence.explorer import write_explorer
    from groupwise.evidence.runs import open_run

    with exit_codes():
        write_explorer(open_run(run) if run else None, out)
        console.print(f"written: {out}", soft_wrap=True)
        if show:
            typer.launch(str(out))


@app.command()
def ablate(
    ladder: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped ladder.")] = "dapo",
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="Runs of each rung; by default as the ladder says.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Runs at once, sharing the cores.")] = 1,
    out: Out = None,
) -> None:
    """Run one technique after another for several seeds, and compare. The same command goes on where it was stopped."""
    from groupwise.experiments import ladder as ladders

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

            failed = ladders.run_all(settings, recipe, plan, home, jobs, note)
        rows = ladders.compare(settings, plan)
        table = Table(*ladders.COLUMNS, title=settings.title)
        for row in rows:
            table.add_row(*map(Text, ladders.cells(row)))
        console.print(table)
        (home / "ladder.md").write_text(ladders.as_markdown(settings, rows))
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
    from groupwise.training.setup import build_algorithm, check_together

    for i in range(len(ladder.rungs)):
        settings, source = load(recipe, Recipe, overrides(ladder.settings(i)))
        check_together(settings, build_algorithm(settings.algorithm, source), source)
        build_task(settings.task, source)


@app.command()
def algorithms(
    name: Annotated[str | None, typer.Argument(help="One of them.")] = None,
    diff: Annotated[str | None, typer.Option("--diff", help="Show what differs from this one.")] = None,
) -> None:
    """List the algorithms, or show one: its parts, their formulas, its settings."""
    with exit_codes():
        try:
            if name is None:
                if diff is not None:
                    raise UserError("--diff compares with the algorithm named before it: groupwise algorithms dapo --diff grpo")
                console.print(_all_algorithms())
            else:
                console.print(_one_algorithm(named(name), named(diff) if diff else None))
        except ValueError as error:
            raise UserError(str(error)) from error


def _all_algorithms() -> Table:
    table = Table("name", "what it is", "paper")
    for name, entry in NAMED.items():
        table.add_row(name, entry.summary, entry.paper)
    return table


def _one_algorithm(algorithm: Algorithm, other: Algorithm | None) -> Table:
    """Its settings with their formulas; only what differs, side by side, where there is another."""
    columns = [algorithm] if other is None else [other, algorithm]
    settings = [column.settings() for column in columns]
    table = Table("setting", *(column.name for column in columns), title=NAMED[algorithm.name].summary, show_lines=True)
    for key in dict.fromkeys(key for column in settings for key in column):
        if other is None or settings[0].get(key, _UNUSED) != settings[1].get(key, _UNUSED):
            table.add_row(key, *(Text(_explained(key, column.get(key, _UNUSED))) for column in settings))
    return table


_UNUSED: str = "not used"


def _explained(key: str, value: Any) -> str:
    if isinstance(value, str) and value == _UNUSED:
        return value
    if key in PARTS:
        return f"{value}\n{PARTS[key][value].formula}"
    text = {None: "none", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else str(value)
    return f"{text}\n{FORMULAS[key]}" if key in FORMULAS and value else str(text)


def main() -> None:
    """The command `groupwise`."""
    app()


if __name__ == "__main__":
    main()
