"""groupwise serve."""

import asyncio
import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from groupwise.cli.common import Overrides, app, console, exit_codes
from groupwise.config import Recipe, Source, find_recipe, load, shipped_recipes
from groupwise.errors import UserError
from groupwise.files import present


@app.command("serve")
def serve_command(
    target: Annotated[
        str, typer.Argument(metavar="MODEL_OR_RECIPE_OR_RUN", help="A model, a recipe whose model it is, or a run's directory.")
    ],
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 is every network of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    overrides: Overrides = None,
) -> None:
    """Sample for other processes: token ids in, token ids and log-probabilities out, as vLLM's server does; and chat completions.

    Whoever can reach the address can sample, and load weights from directories of this machine.
    """
    from groupwise.descriptors import allow_many
    from groupwise.models import load_tokenizer
    from groupwise.rollouts.native import NativeSampler
    from groupwise.rollouts.samplers import native
    from groupwise.rollouts.serving import Served, make_app, run
    from groupwise.training.collect import sampling_of
    from groupwise.training.interrupts import STOPS, exit_code
    from groupwise.training.prompts import build_chat
    from groupwise.training.setup import load_policy

    with exit_codes():
        settings, source = _recipe(target, overrides or [])
        model = load_policy(settings, source)
        tokenizer = load_tokenizer(settings.model.path, trust_remote_code=settings.model.trust_remote_code)
        sampler = native(settings.rollouts, model, tokenizer)
        assert isinstance(sampler, NativeSampler)
        chat, default = build_chat(settings, tokenizer, source), sampling_of(settings.rollouts)
        served = Served(sampler, chat, default, settings.model.path)

        def ready(address: str) -> None:
            console.print(f"{settings.model.path}: serving at {address}", soft_wrap=True)

        allow_many()
        number = asyncio.run(run(make_app(served, host), served, host, port, STOPS, ready))
    raise typer.Exit(exit_code(number))


def _recipe(target: str, overrides: list[str]) -> tuple[Recipe, Source]:
    """The recipe, and the model in it, that the argument means.

    Raises:
        UserError: a run without a model.
    """
    from groupwise.models.loading import SHIPPED

    run, of_model = Path(target), []
    if target not in SHIPPED and (target in shipped_recipes() or target.endswith(".toml")):
        path = find_recipe(target)
    elif (run / "recipe.toml").is_file():
        path, trained = run / "recipe.toml", present(run / "model")
        if not trained.is_dir():
            raise UserError(
                f"{run}: the run has no model yet; write that of a checkpoint with "
                f"groupwise export {shlex.quote(str(run))} --out DIR, and serve it"
            )
        of_model = [f"model.path={json.dumps(str(trained), ensure_ascii=False)}"]
    else:
        path, of_model = find_recipe(None), [f"model.path={json.dumps(target, ensure_ascii=False)}"]
    settings, source = load(path, Recipe, [*of_model, *overrides])
    # Nothing is trained, so no new adapters are put on the model.
    return settings.model_copy(update={"model": settings.model.model_copy(update={"lora": None})}), source
