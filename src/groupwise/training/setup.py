"""A recipe made ready: everything that can be wrong is found here, before anything is trained."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, ValidationError, create_model

from groupwise.algorithms import Algorithm, Outcomes, named, policy_loss
from groupwise.algorithms.algorithm import PARTS
from groupwise.config import Recipe, Source, explain
from groupwise.errors import UserError
from groupwise.models import check_logits, encode_prompt, load_model, load_model_config, load_tokenizer
from groupwise.plugins import UserFunction, is_reference, load_function
from groupwise.tasks.base import Task, build_task
from groupwise.types import Problem

LOOKED_AT = 256
"""How many training problems are looked at before training."""
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
    if recipe.model.chat and not tokenizer.chat_template:
        raise source.error("model.chat", f"the tokenizer of {recipe.model.path!r} has no chat template")
    problem = task.problem(0, recipe.seed)
    check_lengths(recipe, config, tokenizer, task, source)
    try_scoring(task, problem, algorithm, recipe.rollouts.group_size, source)
    try_parts(algorithm)
    device = device_of(recipe.model.device, source)
    try:
        model = load_model(recipe.model.path, getattr(torch, recipe.model.dtype)).to(device)
        check_logits(model)
        if recipe.model.compile:
            model.base_model.compile(dynamic=True)
    except UserError as error:
        raise source.error("model.path", str(error)) from error
    return Ready(recipe=recipe, algorithm=algorithm, task=task, tokenizer=tokenizer, model=model, problem=problem)


def build_algorithm(settings: dict[str, Any], source: Source) -> Algorithm:
    """The algorithm that a recipe's [algorithm] describes: a named one, with changes; parts may be functions of the user's.

    Raises:
        UserError: an unknown name or key, a value of the wrong type, or a mix without meaning.
    """
    changes = dict(settings)
    name = changes.pop("name", Recipe().algorithm["name"])
    base = Path(source.path).parent
    for key, value in changes.items():
        if is_reference(value) and key in PARTS:
            try:
                changes[key] = load_function(value, base)
            except UserError as error:
                raise source.error(f"algorithm.{key}", str(error)) from error
        elif value == "none" and _may_be_none(key):  # TOML has no null
            changes[key] = None
        elif isinstance(value, list):
            changes[key] = tuple(value)
    try:
        start = _plain(start_of(name))
    except ValueError as error:
        raise source.error("algorithm.name", str(error)) from error
    try:
        checked = AlgorithmSection.model_validate({**start, **changes, "name": name})
        return Algorithm(**{key: getattr(checked, key) for key in AlgorithmSection.model_fields})
    except ValidationError as error:
        raise explain(error, AlgorithmSection, source, "algorithm.") from error
    except ValueError as error:  # raised by Algorithm itself, as "key: what is wrong"
        key, _, message = str(error).partition(": ")
        raise source.error(f"algorithm.{key}", message) from error


def start_of(name: str) -> Algorithm:
    """What a recipe's settings change: the named algorithm, or for "custom" the plain defaults."""
    return Algorithm() if name == "custom" else named(name)


def _may_be_none(key: str) -> bool:
    return any(field.name == key and field.default is None for field in fields(Algorithm))


def _plain(algorithm: Algorithm) -> dict[str, Any]:
    return {field.name: getattr(algorithm, field.name) for field in fields(algorithm)}


def check_together(recipe: Recipe, algorithm: Algorithm, source: Source) -> None:
    """Settings that are fine alone and meaningless together."""
    rollouts, learner = recipe.rollouts, recipe.learner
    if rollouts.group_size == 1 and (algorithm.center == "group" or algorithm.dynamic_sampling) and not algorithm.needs:
        raise source.error(
            "rollouts.group_size", f"{algorithm.name} compares the completions of a prompt, so it needs at least 2"
        )
    if learner.minibatches > rollouts.prompts_per_step:
        raise source.error(
            "learner.minibatches", f"a minibatch holds whole groups, and a step has {rollouts.prompts_per_step} of them"
        )
    limited = rollouts.top_p < 1 or rollouts.top_k > 0 or rollouts.min_p > 0
    if limited and (learner.old_logprobs == "sampler" or algorithm.correction != "none"):
        raise source.error(
            "learner.old_logprobs" if learner.old_logprobs == "sampler" else "algorithm.correction",
            "the sampler's log-probabilities are those of the distribution cut by top_p, top_k or min_p, "
            "which the learner does not compute, so the two cannot be compared",
        )
    if algorithm.correction != "none" and learner.old_logprobs == "sampler":
        raise source.error("learner.old_logprobs", "a correction compares the learner with the sampler, so it needs 'recompute'")


def check_lengths(recipe: Recipe, config: Any, tokenizer: Any, task: Task, source: Source) -> None:
    """Prompts and token ids that the model has no place for, among the first problems and the held-out ones."""
    text_config = config.get_text_config()
    for token in recipe.rollouts.stop_tokens:
        if token >= text_config.vocab_size:
            raise source.error("rollouts.stop_tokens", f"{token} is no token: the vocabulary has {text_config.vocab_size}")
    limit = getattr(text_config, "max_position_embeddings", None)
    if limit is None:
        return
    problems = [task.problem(i, recipe.seed) for i in range(LOOKED_AT)] + task.held_out(recipe.training.eval_problems)
    longest = max(problems, key=lambda problem: len(problem.prompt))
    length = len(encode_prompt(tokenizer, longest.prompt, recipe.model.chat))
    if length + recipe.rollouts.max_tokens > limit:
        raise source.error(
            "rollouts.max_tokens",
            f"a prompt of {length} tokens and {recipe.rollouts.max_tokens} more exceed the model's {limit} positions: "
            f"{longest.prompt[:60]!r}",
        )


def try_scoring(task: Task, problem: Problem, algorithm: Algorithm, group_size: int, source: Source) -> None:
    """Score a group of made-up answers, so that a reward that fails does so before training."""
    scores = task.score(problem, [problem.answer or "an answer", *[""] * (group_size - 1)])
    if "steps" in algorithm.needs and not any(score.steps for score in scores):
        raise source.error("algorithm.advantage", f"process supervision needs rewards of steps; {task.name!r} has none")


def try_parts(algorithm: Algorithm) -> None:
    """Run parts that are the user's own on two rows of two tokens.

    Raises:
        UserError: one raised, or did not return what its kind must.
    """
    mine = {key: getattr(algorithm, key) for key in PARTS if isinstance(getattr(algorithm, key), UserFunction)}
    if not mine:
        return
    names = ", ".join(f"{key} {function.reference}" for key, function in mine.items())
    mask_BT, zeros_BT = torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, 2)
    outcomes = Outcomes(
        rewards_B=torch.tensor([1.0, 0.0], dtype=torch.float64),
        group_ids_B=torch.tensor([0, 0]),
        prompt_ids=["a", "a"],
        mask_BT=mask_BT,
        step_rewards=[[1.0], [0.0]],
        step_ends=[[1], [1]],
        token_rewards_BT=zeros_BT,
        values_BT=zeros_BT,
    )
    try:
        credit = algorithm.part("advantage")(outcomes, algorithm)
        logprobs_BT = zeros_BT.clone().requires_grad_()
        weights_BT = algorithm.part("aggregation")(mask_BT, group_ids_B=outcomes.group_ids_B, max_length=2)
        loss, _ = policy_loss(
            algorithm,
            logprobs_BT,
            zeros_BT,
            credit.advantages,
            mask_BT,
            ref_logprobs_BT=zeros_BT,
            rollout_logprobs_BT=zeros_BT,
            weights_BT=weights_BT,
            entropy_BT=zeros_BT,
        )
        loss.backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # the user's functions may raise or return anything
        raise UserError(f"trying {names}: {type(error).__name__}: {error}") from error


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
    """The recipe for the run directory: every default filled in, files by absolute paths.

    Of the algorithm, the name and what differs from it, so that another name can still be set.
    """
    tree = ready.recipe.model_dump()
    if Path(ready.recipe.model.path).is_dir():
        tree["model"]["path"] = str(Path(ready.recipe.model.path).resolve())
    tree["task"] = ready.task.model_dump()
    start = _plain(start_of(ready.algorithm.name))
    tree["algorithm"] = {"name": ready.algorithm.name} | {
        key: _written(value) for key, value in _plain(ready.algorithm).items() if value != start[key]
    }
    return tree


def _written(value: Any) -> Any:
    """A setting as TOML can hold it and `build_algorithm` reads it."""
    if value is None:
        return "none"
    if isinstance(value, UserFunction):
        return value.reference
    return list(value) if isinstance(value, tuple) else value
