"""A recipe made ready: everything that can be wrong is found here, before anything is trained."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, ValidationError, create_model

from groupwise.algorithms import Algorithm, named
from groupwise.algorithms.algorithm import PARTS
from groupwise.config import Recipe, Source, explain
from groupwise.errors import UserError
from groupwise.models import check_logits, encode_prompt, load_model, load_model_config, load_tokenizer
from groupwise.plugins import is_reference, load_function
from groupwise.tasks.base import Task, build_task
from groupwise.types import Problem

AlgorithmSection = create_model(
    "AlgorithmSection",
    __config__=ConfigDict(extra="forbid", strict=True),
    **{field.name: (field.type, field.default) for field in fields(Algorithm)},  # type: ignore[call-overload]
)
"""The fields of `Algorithm`, with the types of what a recipe gives them checked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """What a run is made of."""

    recipe: Recipe
    algorithm: Algorithm
    task: Task
    tokenizer: Any
    model: Any
    problem: Problem
    """The first of them, for a trial."""


def prepare(recipe: Recipe, source: Source) -> Ready:
    """Check a recipe and load what it names.

    Raises:
        UserError: naming the file, line and key at fault.
    """
    algorithm = build_algorithm(recipe.algorithm, source)
    check_together(recipe, algorithm, source)
    task = build_task(recipe.task, source)
    try:
        tokenizer = load_tokenizer(recipe.model.path)
        config = load_model_config(recipe.model.path)
    except UserError as error:
        raise source.error("model.path", str(error)) from error
    problem = task.problem(0, recipe.seed)
    check_length(recipe, config, tokenizer, problem, source)
    try_scoring(task, problem, algorithm, recipe.rollouts.group_size, source)
    model = load_model(recipe.model.path, getattr(torch, recipe.model.dtype)).to(device_of(recipe.model.device, source))
    check_logits(model)
    return Ready(recipe=recipe, algorithm=algorithm, task=task, tokenizer=tokenizer, model=model, problem=problem)


def build_algorithm(settings: dict[str, Any], source: Source) -> Algorithm:
    """The algorithm that a recipe's [algorithm] describes: a named one, with changes; parts may be functions of the user's.

    Raises:
        UserError: an unknown name or key, a value of the wrong type, or a mix without meaning.
    """
    changes = dict(settings)
    name = changes.pop("name", "")
    base = Path(source.path).parent
    functions = {key: load_function(changes[key], base) for key in PARTS if is_reference(changes.get(key))}
    if "outcome_rewards" in changes and isinstance(changes["outcome_rewards"], list):
        changes["outcome_rewards"] = tuple(changes["outcome_rewards"])
    try:
        start = {} if name == "custom" else _plain(named(name))
    except ValueError as error:
        raise source.error("algorithm.name", str(error)) from error
    try:
        checked = AlgorithmSection.model_validate({**start, **changes, "name": name, **functions})
        return Algorithm(**{key: getattr(checked, key) for key in AlgorithmSection.model_fields})
    except ValidationError as error:
        raise explain(error, AlgorithmSection, source, "algorithm.") from error
    except ValueError as error:  # raised by Algorithm itself, as "key: what is wrong"
        key, _, message = str(error).partition(": ")
        raise source.error(f"algorithm.{key}", message) from error


def _plain(algorithm: Algorithm) -> dict[str, Any]:
    return {field.name: getattr(algorithm, field.name) for field in fields(algorithm)}


def check_together(recipe: Recipe, algorithm: Algorithm, source: Source) -> None:
    """Settings that are fine alone and meaningless together."""
    rollouts, learner = recipe.rollouts, recipe.learner
    if rollouts.group_size == 1 and (algorithm.center == "group" or algorithm.dynamic_sampling) and not algorithm.needs:
        raise source.error(
            "rollouts.group_size", f"{algorithm.name} compares the completions of a prompt, so it needs at least 2"
        )
    limited = rollouts.top_p < 1 or rollouts.top_k > 0 or rollouts.min_p > 0
    if limited and learner.old_logprobs == "sampler":
        raise source.error(
            "learner.old_logprobs",
            "the sampler's log-probabilities are those of the distribution cut by top_p, top_k or min_p, "
            "which the learner does not compute; use 'recompute'",
        )


def check_length(recipe: Recipe, config: Any, tokenizer: Any, problem: Problem, source: Source) -> None:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = len(encode_prompt(tokenizer, problem.prompt, recipe.model.chat))
    if limit is not None and length + recipe.rollouts.max_tokens > limit:
        raise source.error(
            "rollouts.max_tokens",
            f"a prompt of {length} tokens and {recipe.rollouts.max_tokens} more exceed the model's {limit} positions",
        )


def try_scoring(task: Task, problem: Problem, algorithm: Algorithm, group_size: int, source: Source) -> None:
    """Score a group of made-up answers, so that a reward that fails does so before training."""
    scores = task.score(problem, [problem.answer or "an answer", *[""] * (group_size - 1)])
    if "steps" in algorithm.needs and not any(score.steps for score in scores):
        raise source.error("algorithm.advantage", f"process supervision needs rewards of steps; {task.name!r} has none")


def device_of(name: str, source: Source) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise source.error("model.device", f"{name!r} is not here: {str(error).splitlines()[0]}") from error
    return device


def resolved(ready: Ready) -> dict[str, Any]:
    """The recipe with every default filled in, for the run directory."""
    tree = ready.recipe.model_dump()
    tree["task"] = ready.task.model_dump() if hasattr(ready.task, "model_dump") else ready.recipe.task
    tree["algorithm"] = {key: getattr(value, "groupwise_name", value) for key, value in _plain(ready.algorithm).items()}
    if isinstance(tree["algorithm"]["outcome_rewards"], tuple):
        tree["algorithm"]["outcome_rewards"] = list(tree["algorithm"]["outcome_rewards"])
    return tree
