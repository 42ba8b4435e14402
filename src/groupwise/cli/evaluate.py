"""groupwise eval."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from groupwise.cli.common import Overrides, app, console, exit_codes
from groupwise.config import Recipe, find_recipe, load
from groupwise.errors import UserError


@app.command("eval")
def evaluate_command(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="A model, or a run's directory.")],
    recipe: Annotated[str | None, typer.Argument(help="Whose task to use; by default the run's own, or the default.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Completions per problem.")] = 1,
    overrides: Overrides = None,
) -> None:
    """Measure pass@1, pass@k and avg@k on held-out problems."""
    from groupwise.seeding import derive
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
        problems = ready.task.held_out(settings.training.eval_problems)
        rollouts, seed = ready.rollouts(ready.make_sampler(ready.model)), derive(settings.seed, "evaluation")
        result = evaluate(rollouts, problems, samples=samples, seed=seed)
        metrics = dict(result.metrics)
        if samples > 1 and "eval/pass@1" in metrics:
            metrics[f"eval/avg@{samples}"] = metrics["eval/pass@1"]
        table = Table("held-out", where, title=f"{len(result.groups)} problems, {samples} samples each")
        for key, value in metrics.items():
            table.add_row(key.removeprefix("eval/").replace("_", " "), f"{value:.3f}")
        console.print(table)
