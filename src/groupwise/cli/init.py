"""groupwise init."""

import json
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from groupwise.algorithms import NAMED
from groupwise.cli.common import app, console, exit_codes
from groupwise.config import Recipe, Source
from groupwise.errors import UserError, nearest
from groupwise.plugins import find_file, is_reference
from groupwise.text import visible

PROMPT_KEYS = ("prompt", "question", "problem", "instruction", "query", "input", "messages")
ANSWER_KEYS = ("answer", "solution", "ground_truth", "label", "target", "output", "response")
"""Names that columns often have, the likeliest first."""
TOLD_BY_ROWS = ("gsm8k", "math", "verl", "countdown", "code")
"""Presets that no rows but their own fit."""
ALONE = "arithmetic"
"""The task that needs no data."""
NONE = "none"
NEXT = ("data", "check", "train")
"""Commands to go on with."""


@app.command()
def init(
    out: Annotated[Path, typer.Argument(help="The recipe file to write.")] = Path("recipe.toml"),
    model: Annotated[str | None, typer.Option(help="A Hugging Face id, a directory, or arithmetic-base.")] = None,
    data: Annotated[str | None, typer.Option(help="Problems: a file, directory or hub id; a preset; or arithmetic.")] = None,
    config: Annotated[str | None, typer.Option(help="Which configuration of a hub dataset that has several.")] = None,
    held_out: Annotated[str | None, typer.Option(help="Held-out problems; left out: a tenth of the data.")] = None,
    preset: Annotated[str | None, typer.Option(help="How rows are read and judged: groupwise data --presets; or none.")] = None,
    reward: Annotated[str | None, typer.Option(help="A checker, or your own file.py:function.")] = None,
    prompt_key: Annotated[str | None, typer.Option(help="The data's column of the prompt.")] = None,
    answer_key: Annotated[str | None, typer.Option(help="The data's column of the answer.")] = None,
    algorithm: Annotated[str, typer.Option(help="One of those that `groupwise algorithms` lists.")] = "dapo",
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Write a recipe. What is not given is asked for, and every answer is checked at once."""
    with exit_codes():
        if out.exists() and not force:
            raise UserError(f"{out}: already there; name another file, or overwrite it with --force")
        flags = {"model": model, "data": data, "config": config, "held-out": held_out, "preset": preset, "reward": reward}
        text = recipe_text(Answers({**flags, "prompt-key": prompt_key, "answer-key": answer_key}), algorithm, out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
        console.print(f"written: {out}; go on with", soft_wrap=True)
        for command in NEXT:
            console.print(f"  groupwise {command} {out}", soft_wrap=True)


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
            offered = "" if proposed is None else f" [{visible(str(proposed))}]"
            answer = str(typer.prompt(visible(question) + offered, default=proposed, show_default=False)).strip()
            try:
                check(answer)
                return answer
            except UserError as error:
                console.print(str(error), style="red", soft_wrap=True)


def recipe_text(answers: Answers, algorithm: str, out: Path) -> str:
    """The recipe, checked as far as that goes without loading the model or all of a dataset on the hub.

    Raises:
        UserError: something is missing, or wrong.
    """
    import torch

    from groupwise.models.loading import SHIPPED
    from groupwise.tasks.base import build_task
    from groupwise.training.algorithm import build_algorithm

    if algorithm not in NAMED:
        raise UserError(f"--algorithm {algorithm}: there is no such algorithm{nearest(algorithm, NAMED)}")
    answers.need("model", "data")
    model = answers.get("model", "Model: a Hugging Face id, a directory, or arithmetic-base", _check_model, "arithmetic-base")
    task = task_keys(answers, out)
    text = _TEMPLATE.format(
        model=_toml(model if not Path(model).is_dir() else _from(out, model)),
        task="\n".join(f"{key} = {_toml(value)}" for key, value in task.items()),
        algorithm=_toml(algorithm),
        **(_SMALL if model in SHIPPED else _ON_GPU if torch.cuda.is_available() else _ON_CPU),
    )
    source = Source(out, text)
    settings = Recipe.model_validate(tomllib.loads(text))
    build_algorithm(settings.algorithm, source)
    if all(Path(task.get(key, ".")).exists() for key in ("path", "held_out_path")) and "path" in task:
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
group_size = {group_size}
prompts_per_step = {prompts_per_step}
max_tokens = {max_tokens}

[learner]
learning_rate = {learning_rate}
minibatches = 4

[training]
steps = {steps}
eval_problems = {eval_problems}
"""
_BATCH = {"group_size": 16, "prompts_per_step": 32, "eval_problems": 500}
_SMALL = {**_BATCH, "max_tokens": 64, "learning_rate": "2e-4", "steps": 50}
"""Of a shipped model, which has less than a million parameters."""
_ON_GPU = {**_BATCH, "max_tokens": 512, "learning_rate": "1e-6", "steps": 100}
_ON_CPU = {**_ON_GPU, "group_size": 8, "prompts_per_step": 8, "max_tokens": 256, "eval_problems": 32}
"""A step of 0.6 billion parameters then takes about 1e14 operations, of which a few CPU cores do some 1e11 a second."""


def task_keys(answers: Answers, out: Path) -> dict[str, str]:
    """The keys of [task]."""
    from groupwise.tasks.presets import PRESETS

    flags = answers.flags
    config = flags["config"] or ""
    known = ", ".join(name for name, preset in PRESETS.items() if preset.path)
    question = f"Data: a file, a directory or a hub id; one of {known}; or {ALONE}"
    data = answers.get("data", question, lambda name: _check_data(name, config))
    if data == ALONE:
        unread = [f"--{name}" for name in flags if name not in ("model", "data") and flags[name] is not None]
        if unread:
            raise UserError(f"{', '.join(unread)}: {ALONE} makes its own problems, and judges them")
        return {"name": ALONE}
    task = {"name": "dataset"}
    if _is_preset(data):
        if config or flags["preset"] is not None:
            raise UserError(f"--{'config' if config else 'preset'}: --data {data} is a preset, which brings its own")
        task |= {"preset": data, **_changes(answers, out)}
    else:
        row = first_row(data, config)
        console.print(f"first row of {data}: {json.dumps(row, ensure_ascii=False)[:300]}", soft_wrap=True)
        task |= {"path": _from(out, data), **({"config": config} if config else {}), **_reading(answers, row, out)}
    if flags["held-out"] is not None:
        held_out = answers.get("held-out", "", lambda name: first_row(name, ""))
        task["held_out_path"] = _from(out, held_out)
    return task


def _reading(answers: Answers, row: Mapping[str, Any], out: Path) -> dict[str, str]:
    """The keys that say how a row is read and judged: a preset, or columns and a reward."""
    from groupwise.rewards.checkers import CHECKERS, SLOW_CHECKERS
    from groupwise.tasks.presets import PRESETS

    fitting = _fitting(row)
    changed = any(answers.flags[name] is not None for name in ("reward", "prompt-key", "answer-key"))
    if answers.flags["preset"] is not None or (fitting is not None and not changed):
        about = f"these rows fit {fitting}: {PRESETS[fitting].summary}" if fitting is not None else ""
        question = f"Preset, or {NONE}; {about}".rstrip("; ")
        preset = answers.get("preset", question, _check_preset, fitting)
        if preset != NONE:
            if not answers.asks and answers.flags["preset"] is None:
                console.print(f"{about}; --preset {NONE} takes columns and a reward of yours", soft_wrap=True)
            return {"preset": preset, **_changes(answers, out)}
    answers.need("reward")
    checkers = (*CHECKERS, *SLOW_CHECKERS)
    question = f"Reward: {', '.join(checkers)}, or your own file.py:function"
    reward = answers.get("reward", question, _check_reward, "math")
    prompt = answers.get("prompt-key", "Column of the prompt", lambda key: _check_key(key, row), _likely(PROMPT_KEYS, row))
    keys = {"prompt_key": prompt, "reward": _reward_from(out, reward)}
    if reward in checkers:
        likely = _likely(ANSWER_KEYS, {key: value for key, value in row.items() if key != prompt})
        keys["answer_key"] = answers.get("answer-key", "Column of the answer", lambda key: _check_key(key, row), likely)
    elif answers.flags["answer-key"] is not None:
        keys["answer_key"] = answers.get("answer-key", "", lambda key: _check_key(key, row))
    return keys


def _changes(answers: Answers, out: Path) -> dict[str, str]:
    """What flags change of a preset."""
    keys = {}
    if answers.flags["reward"] is not None:
        keys["reward"] = _reward_from(out, answers.get("reward", "", _check_reward))
    for flag, key in (("prompt-key", "prompt_key"), ("answer-key", "answer_key")):
        value = answers.flags[flag]
        if value is not None:
            keys[key] = value
    return keys


def _fitting(row: Mapping[str, Any]) -> str | None:
    """The preset that this row fits."""
    from groupwise.tasks.presets import PRESETS
    from groupwise.tasks.reading import RowReader

    for name in TOLD_BY_ROWS:
        preset = PRESETS[name]
        try:
            RowReader(prompt_key=preset.prompt_key, answer_key=preset.answer_key, preset=preset).read(dict(row), name)
            return name
        except UserError:
            continue
    return None


def first_row(name: str, config: str) -> dict[str, Any]:
    """The first row of a file, a directory or a dataset on the hub.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    from groupwise.tasks.rows import Origin

    origin = Origin.find(name, Path(), config, "")
    if Path(origin.path).exists():
        rows = origin.rows()
        if not len(rows):
            raise UserError(f"{name}: no problems in it")
        return rows[0]
    _, row = next(origin.stream()(), ("", None))
    if row is None:
        raise UserError(f"{name}: no problems in it")
    return row


def _check_model(name: str) -> None:
    from groupwise.models import load_config

    load_config(name)


def _is_preset(name: str) -> bool:
    """Whether it names a preset that knows where its dataset is, and no file or directory here."""
    from groupwise.tasks.presets import PRESETS

    return name in PRESETS and bool(PRESETS[name].path) and not Path(name).exists()


def _check_data(name: str, config: str) -> None:
    from groupwise.tasks.presets import PRESETS

    if name != ALONE and not _is_preset(name):
        try:
            first_row(name, config)
        except UserError as error:
            close = "" if Path(name).suffix else nearest(name, (ALONE, *PRESETS))
            raise UserError(f"{error}{close}; a task without data is {ALONE}") from error


def _check_preset(name: str) -> None:
    from groupwise.tasks.presets import PRESETS

    if name not in (*PRESETS, NONE):
        raise UserError(f"there is no such preset{nearest(name, (*PRESETS, NONE))}")


def _check_reward(name: str) -> None:
    from groupwise.rewards.checkers import CHECKERS, SLOW_CHECKERS
    from groupwise.rewards.settings import HTTP, MODEL, described
    from groupwise.workers import Pool, Target

    if is_reference(name):
        path, function = find_file(name, Path())
        with closing(Pool(1)) as pool:  # as in training, where the file's code may do what it wants too
            described(pool, Target.in_file(path, function), str(path))
    elif name not in (*CHECKERS, *SLOW_CHECKERS) and not name.startswith((MODEL, *HTTP)):
        raise UserError(
            f'there is no reward {name!r}{nearest(name, (*CHECKERS, *SLOW_CHECKERS))}; your own is "file.py:function"'
        )


def _check_key(key: str, row: Mapping[str, object]) -> None:
    from groupwise.tasks.presets import needed

    try:
        needed(dict(row), key)
    except ValueError as error:
        raise UserError(f"there is no {key!r} in the first row{nearest(key, row)}") from error


def _likely(names: Iterable[str], row: Mapping[str, object]) -> str | None:
    return next((name for name in names if name in row), None)


def _from(out: Path, name: str) -> str:
    """A path as the recipe says it: as it was given where the recipe lies here, else an absolute one; a hub id as it is."""
    here = out.resolve().parent == Path().resolve() or not Path(name.partition(":")[0]).exists()
    return name if here else str(Path(name).resolve())


def _reward_from(out: Path, reward: str) -> str:
    return _from(out, reward) if is_reference(reward) else reward


def _toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # TOML's basic strings are JSON's
