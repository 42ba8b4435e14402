"""groupwise train, sft and check."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from groupwise.cli.common import Out, Overrides, app, console, exit_codes
from groupwise.cli.watch import watched
from groupwise.config import Recipe, SftRecipe, find_recipe, is_sft, load
from groupwise.text import shortened

LONGEST = 1000
"""Characters of a text in a table."""


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help="A TOML file, or the name of a shipped recipe.")] = None,
    overrides: Overrides = None,
    out: Out = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Go on with the run in this directory.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Serve a page of this machine that follows the run.")] = False,
) -> None:
    """Train a model. Without a recipe: the embedded default."""
    from groupwise.training.interrupts import Interrupted, survive_save

    survive_save()
    from groupwise.cluster import launch_of
    from groupwise.training import session, torchrun

    with torchrun.led() as launch, exit_codes():
        if launch is not None:
            console.print(torchrun.ANNOUNCED, soft_wrap=True)
        plan = session.plan(recipe, overrides=overrides or [], out=out, resume=resume)
        try:
            with watched(plan.path) if watch else nullcontext():
                result = session.run(plan, console, ends=True, launch=launch or launch_of(plan.recipe))
        except Interrupted as interrupted:
            raise typer.Exit(interrupted.exit_code) from interrupted
        _print_result(result, plan.path)


def _print_result(result: Any, path: Path) -> None:
    table = Table("held-out problems", "before", "after", title="What it learned")
    names = {
        "eval/pass@1": "pass@1",
        "eval/reward": "mean reward",
        "eval/length": "mean length, tokens",
        "eval/truncated": "truncated",
        "eval/turns/mean": "turns",
        "eval/turns/truncated": "truncated turns",
        "eval/tools/calls": "tool calls per problem",
        "eval/tools/errors": "failed tool calls",
        "eval/tools/unread": "unreadable calls per problem",
    }
    before, after = result.before.metrics, result.after.metrics
    left_out = {"eval/reward_std", *(["eval/reward"] if "eval/pass@1" in after else [])}
    for key in [*before, *(key for key in after if key not in before)]:
        if key in left_out:
            continue
        name = names.get(key, key.removeprefix("eval/").replace("_", " "))
        form = "{:.1f}" if key == "eval/length" else "{:.3f}"
        table.add_row(name, *(form.format(of[key]) if key in of else "?" for of in (before, after)))
    console.print(table)
    if result.before.groups:  # a resumed run has no answers of the base model
        console.print(_examples(result))
    if (gap := result.exported.get("export/merge_gap")) is not None:
        console.print(f"merging the adapters for the export moved logits by at most {gap:.2g}", soft_wrap=True)
    last = result.after.metrics
    if (best := result.best) is not None and best.metric in last and best.value > last[best.metric]:
        what = names.get(best.metric, best.metric).removeprefix("mean ")
        console.print(
            f"the best held-out {what}, {best.value:.3f}, was that of step {best.step}: "
            f"groupwise export {path} --checkpoint best --out DIR writes that model",
            soft_wrap=True,
        )
    console.print(f"{result.seconds:.0f} s; the trained model is in {path / 'model'}", soft_wrap=True)
    console.print(f"groupwise report {path} draws what happened, groupwise eval {path} measures it again", soft_wrap=True)


def _examples(result: Any, count: int = 3) -> Table:
    """Held-out problems that it answers better now than before."""
    table = Table("problem", "answer", "it said before", "it says now", title="Examples", show_lines=True)
    pairs = zip(result.before.groups, result.after.groups, strict=True)
    turned = [(old, new) for old, new in pairs if new.scores[0].reward > old.scores[0].reward]
    turned.sort(key=lambda pair: -len(pair[1].completions[0].text))
    for old, new in turned[:: max(1, len(turned) // count)][:count]:
        said = (group.completions[0].text for group in (old, new))
        table.add_row(*(shortened(text, LONGEST) for text in (new.problem.text, new.problem.answer, *said)))
    return table


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
    from groupwise.tasks.base import datasets_of, sandboxes_of
    from groupwise.training.setup import prepare

    with exit_codes():
        path = find_recipe(recipe)
        if is_sft(path):
            _check_sft(path, overrides or [])
            return
        settings, source = load(path, Recipe, overrides or [])
        ready = prepare(settings, source, everything=True)
        ready.check_memory()
        prompt = ready.prompt(ready.problem)
        rows = settings.rollouts.prompts_per_step * settings.rollouts.group_size
        left_out = {f"left out of {item.path}": item.left_out() for item in datasets_of(ready.task) if item.left_out()}
        facts = {
            "model": f"{settings.model.path}: {ready.policy.name}, {ready.policy.num_parameters():,} parameters",
            "task": f"{ready.task.name}: {len(ready.task.held_out(settings.training.eval_problems))} held-out problems",
            **left_out,
            **({"sandbox": "; ".join(found)} if (found := sandboxes_of(ready.task)) else {}),
            "first prompt": repr(ready.tokenizer.decode(prompt)),
            **(_conversations(ready.episodes, ready.problem) if ready.episodes else {}),
            "algorithm": ready.algorithm.name,
            **({"adapters": text} if (text := ready.policy.describe_adapters()) else {}),
            **ready.policy.backends(),
            **({"bfloat16": text} if (text := ready.bfloat16()) else {}),
            "a step": f"{settings.rollouts.prompts_per_step} prompts x {settings.rollouts.group_size} = {rows} completions, "
            f"at most {rows * settings.rollouts.max_tokens:,} tokens, "
            f"{settings.rollouts.epochs * settings.learner.minibatches} updates",
        }
        table = Table.grid(padding=(0, 2))
        for name, value in facts.items():
            table.add_row(Text(name, style="bold"), shortened(value, LONGEST))
        console.print(table)
        for hint in ready.hints():
            console.print(f"hint: {hint}", soft_wrap=True)
        console.print("nothing wrong found", style="green")
        console.print(f"groupwise train {recipe} trains it", soft_wrap=True)


def _conversations(episodes: Any, problem: Any) -> dict[str, str]:
    """What can be called in conversations about a problem, and what is remarkable about the chat template."""
    remarks = "; ".join(episodes.check())
    tools = ", ".join(_signature(tool["function"]) for tool in episodes.kind(problem).schemas)
    return {"tools": tools or "none", **({"chat template": remarks} if remarks else {})}


def _signature(tool: Any) -> str:
    parameters = tool.get("parameters", {}).get("properties", {})
    typed = ", ".join(f"{name}: {schema.get('type', 'any')}" for name, schema in parameters.items())
    return f"{tool['name']}({typed})"


def _check_sft(path: Path, overrides: list[str]) -> None:
    from groupwise.training.sft import Sources, start

    settings, source = load(path, SftRecipe, overrides)
    _, model = start(settings, Sources.of(settings, source), source)
    console.print(f"{model.name}, {model.num_parameters():,} parameters; {settings.sft.steps} steps")
    console.print("nothing wrong found", style="green")
