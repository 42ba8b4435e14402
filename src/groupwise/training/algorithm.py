"""The algorithm that a recipe describes, checked before anything is trained."""

from collections.abc import Set
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import ConfigDict, ValidationError, create_model

from groupwise.algorithms import NAMED, PARTS, Algorithm, Candidates, Outcomes, OwnPart, Results, named, policy_loss
from groupwise.algorithms.allocation import allocation_problem
from groupwise.algorithms.named import general_settings, merged, part_settings, target_of
from groupwise.config import Recipe, Source, explain
from groupwise.errors import RunError, UserError, nearest
from groupwise.guard import guarded, user_code_at_start
from groupwise.models.export import ON_ADAPTERS
from groupwise.models.loading import is_adapter
from groupwise.plugins import is_reference, load_function


def build_algorithm(settings: dict[str, Any], source: Source) -> Algorithm:
    """The algorithm that a recipe's [algorithm] describes: a named one, with changes; parts may be the user's own.

    Raises:
        UserError: an unknown name or key, a value of the wrong type, a setting that nothing reads, or a mix without meaning.
    """
    changes = dict(settings)
    name = changes.pop("name", Recipe().algorithm["name"])
    for key, value in changes.items():
        if is_reference(value) and key in PARTS:
            try:
                found = load_function(value, Path(source.path).parent)
            except UserError as error:
                raise source.error(f"algorithm.{key}", str(error)) from error
            changes[key] = OwnPart(target=found.function, reference=found.reference)
        elif isinstance(value, list):
            changes[key] = tuple(value)
    try:
        types = setting_types(name, changes)
        given = source.changed("algorithm")
        if given & PARTS.keys():  # a part that is replaced leaves settings in the file that only it read
            changes = {key: value for key, value in changes.items() if key in types or key in given}
        changes = {key: None if value == "none" and _may_be_none(types.get(key)) else value for key, value in changes.items()}
        _check_types(changes, types, source)
        return _named(name, changes)
    except ValueError as error:  # raised by the algorithm itself, as "key: what is wrong"
        key, colon, message = str(error).partition(": ")
        raise source.error(f"algorithm.{key}" if colon else "algorithm.name", message or str(error)) from error


def with_correction(recipe: Recipe, algorithm: Algorithm) -> dict[str, Any]:
    """The recipe's [algorithm], with truncated importance sampling of tokens where older weights may have sampled them and the
    recipe chooses no correction: each weighs min(pi_old / pi_rollout, 2), and the ratio that is clipped stays that of the step's
    own updates (the decoupled objective, arXiv 2505.24298).

    Where `learner.old_logprobs` = "sampler", the ratio itself is taken against what sampled each token: there is nothing left to
    correct.
    """
    chosen = "correction" in recipe.algorithm or algorithm.corrects_mismatch
    if not recipe.cluster.staleness or chosen or recipe.learner.old_logprobs == "sampler":
        return recipe.algorithm
    return {**recipe.algorithm, "correction": "tis"}


def about_staleness(recipe: Recipe, algorithm: Algorithm) -> str | None:
    """What a person should know of how the loss treats tokens that older weights sampled; None: there are none."""
    stale = f"cluster.staleness = {recipe.cluster.staleness}: groups may be sampled with weights of earlier steps"
    if not recipe.cluster.staleness or recipe.learner.old_logprobs == "sampler":
        return None
    if "correction" not in recipe.algorithm and algorithm.corrects_mismatch:
        return f'{stale}, so algorithm.correction = {algorithm.choice("correction")!r} weighs tokens; "none" leaves it out'
    if not algorithm.corrects_mismatch:
        return f"{stale}, and algorithm.correction = 'none' leaves the loss as if the newest had sampled them"
    return None


def _named(name: str, changes: dict[str, Any]) -> Algorithm:
    """The algorithm; parts of the user's own are called under guard.

    Raises:
        UserError: one of these cannot be made.
        ValueError: "key: what is wrong with it".
    """
    own = {kind: part.reference for kind, part in changes.items() if isinstance(part, OwnPart)}
    if not own:
        return named(name, **changes)
    with user_code_at_start(", ".join(f"algorithm.{kind} = {reference!r}" for kind, reference in own.items()), let=ValueError):
        algorithm = named(name, **changes)
    parts = {kind: guarded(getattr(algorithm, kind), f"algorithm.{kind} = {reference!r}") for kind, reference in own.items()}
    return replace(algorithm, **parts)


def setting_types(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The settings that a named algorithm with such changes reads, and their types.

    Raises:
        ValueError: there is no such algorithm or part.
    """
    if not isinstance(name, str) or (name not in NAMED and name != "custom"):
        raise ValueError(f"name: there is no algorithm {name!r}{nearest(str(name), NAMED)}")
    types = general_settings()
    for kind in PARTS:
        if isinstance(changes.get(kind, ""), str):
            types[kind] = str
    wrong_parts = {kind for kind in PARTS if not (isinstance(changes.get(kind, ""), str | OwnPart) or callable(changes[kind]))}
    if not wrong_parts:
        settings = merged(name, changes)
        for kind in PARTS:
            types |= part_settings(target_of(kind, settings[kind]))
    return types | dict.fromkeys(wrong_parts, str)


def _check_types(changes: dict[str, Any], types: dict[str, Any], source: Source) -> None:
    fields = {key: (types[key], ...) for key in changes if key in types}
    section = create_model("AlgorithmSection", __config__=ConfigDict(strict=True), **fields)  # type: ignore[call-overload]
    try:
        section.model_validate({key: changes[key] for key in fields})
    except ValidationError as error:
        raise explain(error, section, source, "algorithm.") from error


def _may_be_none(kind: Any) -> bool:
    """Whether a setting of this type may be absent, which a recipe writes as "none": TOML has no null."""
    return type(None) in get_args(kind)


def check_together(recipe: Recipe, algorithm: Algorithm, source: Source) -> None:
    """Settings that are fine alone and meaningless together."""
    rollouts, learner = recipe.rollouts, recipe.learner
    # Estimators that read more than rewards can learn from a group of one, though its rewards cannot be mixed.
    never_mixed = algorithm.dynamic_sampling and not algorithm.needs - {"components"}
    if rollouts.group_size == 1 and (getattr(algorithm.advantage, "compares_group", False) or never_mixed):
        raise source.error(
            "rollouts.group_size", f"{algorithm.name} compares the completions of a prompt, so it needs at least 2"
        )
    lora = recipe.model.lora
    if lora is not None and lora.export == "adapter" and is_adapter(recipe.model.path):
        raise source.error("model.lora.export", ON_ADAPTERS.format(recipe.model.path))
    if learner.minibatches > rollouts.prompts_per_step:
        raise source.error(
            "learner.minibatches", f"a minibatch holds whole groups, and a step has {rollouts.prompts_per_step} of them"
        )
    smallest = getattr(algorithm.allocation, "smallest_group", 1)
    if smallest > rollouts.group_size:
        raise source.error(
            "algorithm.smallest_group", f"is above rollouts.group_size ({rollouts.group_size}), the mean of all groups"
        )
    if rollouts.max_age > 0 and recipe.cluster.staleness > 0:
        raise source.error(
            "rollouts.max_age", "with cluster.staleness above 0 no selected group is ever beyond the batch: leave it out"
        )
    if algorithm.corrects_mismatch and learner.old_logprobs == "sampler":
        raise source.error(
            "learner.old_logprobs",
            "algorithm.correction compares recomputed log-probabilities with the sampler's, so it needs 'recompute'",
        )


LOSS_PARTS = PARTS.keys() - {"advantage", "aggregation", "selection", "allocation"}
"""What `policy_loss` calls."""


def try_parts(algorithm: Algorithm, group_size: int) -> None:
    """Run parts that are the user's own, and no others, on two rows of two tokens.

    Raises:
        UserError: one raised, or did not return what its kind must.
    """
    own = {kind: algorithm.choice(kind) for kind in PARTS if algorithm.choice(kind) not in PARTS[kind]}
    names = ", ".join(f"{kind} {name}" for kind, name in own.items())
    try:
        if "selection" in own:
            rewards_G = torch.tensor([1.0, 0.0], dtype=torch.float64)
            algorithm.selection(Results(rewards_G=rewards_G, correct_G=torch.tensor([True, False])))
        if "allocation" in own:
            candidates = Candidates(prompt_ids=["a", "b"], count=2, completions=2 * group_size, history={}, seed=0)
            if (problem := allocation_problem(algorithm.allocation(candidates), candidates)) is not None:
                raise ValueError(f"the allocation {problem}")
        if own.keys() & {"advantage", "aggregation", *LOSS_PARTS}:
            _try_loss(algorithm, own.keys())
    except RunError as error:  # what the part raised, or changed
        raise UserError(str(error)) from error
    except Exception as error:  # the user's functions may return anything
        raise UserError(f"trying {names}: {type(error).__name__}: {error}") from error


def _try_loss(algorithm: Algorithm, own: Set[str]) -> None:
    """Advantages, token weights and a loss with its gradient; the estimator only if it is the user's own."""
    mask_BT, zeros_BT = torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, 2)
    outcomes = Outcomes(
        rewards_B=torch.tensor([1.0, 0.0], dtype=torch.float64),
        group_ids_B=torch.tensor([0, 0]),
        prompt_ids=["a", "a"],
        mask_BT=mask_BT,
        turn_rewards=[[1.0], [0.0]],
        turn_ends=[[1], [1]],
        components_BK=torch.tensor([[1.0], [0.0]], dtype=torch.float64),
        component_names=["task"],
        component_weights_K=torch.ones(1, dtype=torch.float64),
        step_rewards=[[1.0], [0.0]],
        step_ends=[[1], [1]],
        token_rewards_BT=zeros_BT,
        values_BT=zeros_BT,
    )
    advantages = torch.tensor([1.0, -1.0])
    if "advantage" in own:
        advantages = algorithm.advantage(outcomes).advantages
        if advantages.dim() == 2 and not getattr(algorithm.advantage, "per_token", False):
            raise ValueError("an advantage that differs between tokens says so: per_token = True")
    logprobs_BT = zeros_BT.clone().requires_grad_()
    weights_BT = algorithm.aggregation(mask_BT, group_ids_B=outcomes.group_ids_B, max_length=2)
    others: dict[str, Any] = {"ref_logprobs_BT": zeros_BT, "rollout_logprobs_BT": zeros_BT, "entropy_BT": zeros_BT}
    loss, _ = policy_loss(algorithm, logprobs_BT, zeros_BT, advantages, mask_BT, weights_BT=weights_BT, **others)
    loss.backward()  # type: ignore[no-untyped-call]
