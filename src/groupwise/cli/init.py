"""groupwise init."""

import json
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from groupwise.algorithms import NAMED
from groupwise.cli.common import app, console, exit_codes
from groupwise.config import Recipe, Source
from groupwise.errors import UserError, nearest
from groupwise.plugins import is_reference, load_function

PROMPT_KEYS = ("prompt", "question", "problem", "instruction", "query", "input", "messages")
ANSWER_KEYS = ("answer", "solution", "ground_truth", "label", "target", "output", "response")
"""Names that columns often have, the likeliest first."""
NEXT = ("check", "train")
"""Commands to go on with."""


@app.command()
def init(
    out: Annotated[Path, typer.Argument(help="The recipe file to write.")] = Path("recipe.toml"),
    model: Annotated[str | None, typer.Option(help="A Hugging Face id, a directory, or arithmetic-base.")] = None,
    data: Annotated[str | None, typer.Option(help="A file of problems, or the name of a task without one.")] = None,
    reward: Annotated[str | None, typer.Option(help="A checker, or your own file.py:function.")] = None,
    prompt_key: Annotated[str | None, typer.Option(help="The data's key of the prompt.")] = None,
    answer_key: Annotated[str | None, typer.Option(help="The data's key of the answer.")] = None,
    algorithm: Annotated[str, typer.Option(help="One of those that `groupwise algorithms` lists.")] = "dapo",
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Write a recipe. What is not given is asked for, and every answer is checked at once."""
    with exit_codes():
        if out.exists() and not force:
            raise UserError(f"{out}: already there; name another file, or overwrite it with --force")
        flags = {"model": model, "data": data, "reward": reward, "prompt-key": prompt_key, "answer-key": answer_key}
        text = recipe_text(Answers(flags), algorithm, out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
        console.print(f"written: {out}; go on with", soft_wrap=True)
        for command in NEXT:
            console.print(Text(f"  groupwise {command} {out}"), soft_wrap=True)


class Answers:
    """What the user says: by flags, or when asked in a terminal."""

    def __init__(self, flags: Mapping[str, str | None]) -> None:
        self.flags = flags
        self.asks = sys.stdin.isatty()

    def need(self, *names: str) -> None:
        """Raises:
        UserError: these cannot be asked for, and are not all given.
        """
        missing = [f"--{name}" for name in names if self.flags[name] is None]
        if missing and not self.asks:
            raise UserError(f"missing: {', '.join(missing)}; in a terminal, groupwise init asks for what is not given")

    def get(self, name: str, question: str, check: Callable[[str], Any], proposed: str | None = None) -> str:
        """A flag's value, or the first answer to the question that `check` does not refuse.

        Raises:
            UserError: `check` refuses the flag's value, or there is none and nobody to ask.
        """
        given = self.flags[name]
        if given is None and not self.asks:
            given = proposed
        if given is not None:
            try:
                check(given)
            except UserError as error:
                raise UserError(f"--{name} {given}: {error}") from error
            return given
        self.need(name)
        while True:
            answer = str(typer.prompt(question, default=proposed)).strip()
            try:
                check(answer)
                return answer
            except UserError as error:
                console.print(Text(str(error)), style="red", soft_wrap=True)


def recipe_text(answers: Answers, algorithm: str, out: Path) -> str:
    """The recipe, checked as far as that goes without loading the model.

    Raises:
        UserError: something is missing, or wrong.
    """
    from groupwise.models.loading import SHIPPED
    from groupwise.rewards.checkers import CHECKERS, SLOW_CHECKERS
    from groupwise.tasks.base import TASKS, build_task
    from groupwise.training.algorithm import build_algorithm

    if algorithm not in NAMED:
        raise UserError(f"--algorithm {algorithm}: there is no such algorithm{nearest(algorithm, NAMED)}")
    alone = [name for name in TASKS if name != "dataset"]
    with_data = answers.flags["data"] not in alone
    answers.need("model", "data", *(["reward"] if with_data else []))
    model = answers.get("model", "Model: a Hugging Face id, a directory, or arithmetic-base", _check_model, "arithmetic-base")
    data = answers.get("data", f"Data: a .jsonl file, or {' or '.join(alone)}", lambda name: _check_data(name, alone))
    if data in alone:
        task = [f"name = {_toml(data)}"]
    else:
        row = first_row(data)
        console.print(Text(f"first row of {data}: {json.dumps(row, ensure_ascii=False)[:300]}"), soft_wrap=True)
        checkers = (*CHECKERS, *SLOW_CHECKERS)
        question = f"Reward: {', '.join(checkers)}, or your own file.py:function"
        reward = answers.get("reward", question, lambda name: _check_reward(name, checkers), "math")
        prompt = answers.get("prompt-key", "Key of the prompt", lambda key: _check_key(key, row), _likely(PROMPT_KEYS, row))
        task = ['name = "dataset"', f"path = {_toml(_from(out, data))}", f"prompt_key = {_toml(prompt)}"]
        if reward in checkers:
            rest = {key: value for key, value in row.items() if key != prompt}
            likely = _likely(ANSWER_KEYS, rest)
            answer = answers.get("answer-key", "Key of the answer", lambda key: _check_key(key, row), likely)
            task.append(f"answer_key = {_toml(answer)}")
        task.append(f"reward = {_toml(_from(out, reward) if is_reference(reward) else reward)}")
    text = _TEMPLATE.format(
        model=_toml(model if not Path(model).is_dir() else _from(out, model)),
        task="\n".join(task),
        algorithm=_toml(algorithm),
        **(_SMALL if model in SHIPPED else _USUAL),
    )
    source = Source(out, text)
    settings = Recipe.model_validate(tomllib.loads(text))
    build_algorithm(settings.algorithm, source)
    build_task(settings.task, source)
    return text


_TEMPLATE = """\
# docs/recipe.md describes every key; what is left out has its default.
[model]
path = {model}

[task]
{task}

[algorithm]
name = {algorithm}

[rollouts]
group_size = 16
prompts_per_step = 32
max_tokens = {max_tokens}

[learner]
learning_rate = {learning_rate}
minibatches = 4

[training]
steps = {steps}
"""
_SMALL = {"max_tokens": 64, "learning_rate": "2e-4", "steps": 50}
"""Of the shipped model, which has 0.2 million parameters."""
_USUAL = {"max_tokens": 512, "learning_rate": "1e-6", "steps": 100}


def first_row(name: str) -> dict[str, Any]:
    """The first row of a file of problems.

    Raises:
        UserError: there is no such file, or no row in it.
    """
    path = Path(name)
    if not path.is_file():
        beside = [str(item) for item in path.parent.glob(f"*{path.suffix}")] if path.parent.is_dir() else []
        raise UserError(f"there is no file {name!r}{nearest(name, beside)}")
    try:
        with path.open(encoding="utf-8") as file:
            row = json.loads(next(line for line in file if line.strip()))
    except StopIteration as error:
        raise UserError(f"{name}: no problems in it") from error
    except ValueError as error:
        raise UserError(f"{name}: its first row is not JSON; expected one object a line") from error
    if not isinstance(row, dict):
        raise UserError(f"{name}: its first row is {type(row).__name__}; expected an object with a prompt")
    return row


def _check_model(name: str) -> None:
    from groupwise.models import load_config

    load_config(name)


def _check_data(name: str, alone: Iterable[str]) -> None:
    if name not in alone:
        try:
            first_row(name)
        except UserError as error:
            raise UserError(f"{error}; a task without data is {', '.join(alone)}") from error


def _check_reward(name: str, checkers: Iterable[str]) -> None:
    from groupwise.rewards.settings import HTTP, MODEL

    if is_reference(name):
        load_function(name, Path())
    elif name not in checkers and not name.startswith((MODEL, *HTTP)):
        raise UserError(f'there is no reward {name!r}{nearest(name, checkers)}; your own is "file.py:function"')


def _check_key(key: str, row: Mapping[str, object]) -> None:
    if key not in row:
        raise UserError(f"there is no {key!r} in the first row{nearest(key, row)}")


def _likely(names: Iterable[str], row: Mapping[str, object]) -> str | None:
    return next((name for name in names if name in row), None)


def _from(out: Path, name: str) -> str:
    """A path as the recipe says it: as it was given where the recipe lies here, else an absolute one."""
    return name if out.resolve().parent == Path().resolve() else str(Path(name).resolve())


def _toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # TOML's basic strings are JSON's
