"""groupwise eval."""

import json
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from groupwise.cli.common import Overrides, app, console, exit_codes
from groupwise.config import Recipe, find_recipe, load
from groupwise.errors import UserError
from groupwise.evidence.statistics import clustered_share, interval
from groupwise.files import present

if TYPE_CHECKING:
    from groupwise.training.evaluate import Evaluation


@app.command("eval")
def evaluate_command(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="A model, or a run's directory.")],
    recipe: Annotated[str | None, typer.Argument(help="Whose task to use; by default the run's own, or the default.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Completions per problem.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    overrides: Overrides = None,
) -> None:
    """Measure pass@1, pass@k and avg@k, or the mean of graded rewards, on held-out problems, with 95 % intervals."""
    from groupwise.seeding import derive
    from groupwise.training.evaluate import evaluate
    from groupwise.training.processes import in_one_process
    from groupwise.training.setup import prepare

    with exit_codes(as_json=as_json):
        run = Path(model)
        is_run = (run / "recipe.toml").is_file()
        trained = present(run / "model")
        if is_run and not trained.is_dir():
            raise UserError(
                f"{run}: the run has no model yet; finish it with groupwise train --resume {shlex.quote(str(run))}, or write "
                f"the model of a checkpoint with groupwise export {run} --out DIR, and evaluate that"
            )
        path = run / "recipe.toml" if is_run and recipe is None else find_recipe(recipe)
        where = str(trained) if is_run else model
        settings, source = load(path, Recipe, [*(overrides or []), f"model.path={json.dumps(where, ensure_ascii=False)}"])
        # Nothing is trained, so no new adapters are put on the model.
        settings = settings.model_copy(update={"model": settings.model.model_copy(update={"lora": None})})
        ready = prepare(in_one_process(settings), source)
        problems = ready.task.held_out(settings.training.eval_problems)
        rollouts, seed = ready.rollouts(ready.make_sampler(ready.policy)), derive(settings.seed, "evaluation")
        result = evaluate(rollouts, problems, samples=samples, seed=seed)
        rows = measures(result, samples)
        if as_json:
            facts = {
                "model": where,
                "task": ready.task.name,
                "problems": len(result.groups),
                "samples": samples,
                "seed": settings.seed,
            }
            typer.echo(json.dumps({**facts, "confidence": 0.95, "metrics": rows}))
            return
        table = Table("held-out", where, "95 % interval", title=f"{len(result.groups)} problems, {samples} samples each")
        for name, row in rows.items():
            low, high = row["low"], row["high"]
            ends = "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
            table.add_row(name.replace("_", " "), f"{row['value']:.3f}", ends)
        console.print(table)


def measures(result: "Evaluation", samples: int) -> dict[str, dict[str, float | None]]:
    """Each metric's value and the ends of its 95 % interval, which is over problems: those of the set stand for others like them.

    Shares have the interval of `clustered_share`; rewards and lengths Student's, of the means of the problems.
    """
    rows: dict[str, dict[str, float | None]] = {}
    for key, value in result.metrics.items():
        name, of_problems = key.removeprefix("eval/"), result.values.get(key, [])
        low = high = math.nan
        if name.startswith("pass@"):
            low, high = clustered_share(of_problems, samples / int(name.removeprefix("pass@")))
        elif name == "truncated" or (name.startswith("grade_") and "eval/pass@1" in result.metrics):
            low, high = clustered_share(of_problems, samples)
        elif of_problems:
            mean = interval(of_problems)
            low, high = mean.low, mean.high
        rows[name] = {
            end: number if math.isfinite(number) else None for end, number in (("value", value), ("low", low), ("high", high))
        }
    if samples > 1 and "pass@1" in rows:
        rows[f"avg@{samples}"] = rows["pass@1"]
    return rows
