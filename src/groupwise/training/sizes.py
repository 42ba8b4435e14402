"""Settings that mean more memory than there is, refused with what they would take before anything is allocated.

Counted are lower bounds: of a step only its completions of one token each, of a completion's cache only one completion, of
training only weights, gradients and AdamW's two moments.
"""

from typing import Any

import torch

from groupwise.algorithms import Algorithm
from groupwise.config import Recipe, SftRecipe, Source
from groupwise.errors import UserError
from groupwise.memory import need
from groupwise.models import LanguageModel

COMPLETION_BYTES = 2000
"""Of a completion of one token with its score: its tensors and their Python objects, measured at 2,480 bytes."""
PROBLEM_BYTES = 400
"""Of a problem that was drawn."""
TOKEN_BYTES = 13
"""Of a token in the sampler's table: its id, its log-probability, a mask."""
DEMONSTRATION_BYTES = 4000
"""Of a demonstration in a batch, measured at 5,300 bytes."""
ADAM = 3
"""A gradient and two moments, each of the weights' size."""


def check_step(recipe: Recipe, algorithm: Algorithm, source: Source) -> None:
    """
    Raises:
        UserError: a step's completions, or the problems that are drawn for it, could not be held.
    """
    group, prompts = recipe.rollouts.group_size, recipe.rollouts.prompts_per_step
    key = "rollouts.group_size" if group >= prompts else "rollouts.prompts_per_step"
    text = f"{prompts * group:,} completions a step ({prompts:,} prompts, {group:,} of each)"
    _need(prompts * group * COMPLETION_BYTES, text, source, key)
    candidates = getattr(algorithm.allocation, "candidates", 1)
    _need(prompts * candidates * PROBLEM_BYTES, f"{prompts * candidates:,.0f} problems a step", source, "algorithm.candidates")


def check_cache(recipe: Recipe, config: Any, length: int, device: torch.device | None, source: Source) -> None:
    """
    Args:
        config: the model's.
        length: tokens of the longest prompt and of a completion.
        device: the model's; None: it is on other machines or devices.

    Raises:
        UserError: not even one completion of `rollouts.max_tokens` could be held.
    """
    shape = config.get_text_config()
    layers, heads = getattr(shape, "num_hidden_layers", 0), getattr(shape, "num_key_value_heads", 0) or 0
    width = getattr(shape, "head_dim", 0) or 0
    full = getattr(shape, "layer_types", None)
    if full is not None:  # others keep a window or a state, whatever the length
        layers = sum(kind == "full_attention" for kind in full)
    native = recipe.rollouts.sampler == "native" and device is not None  # others may hold it elsewhere
    cached = 2 * 2 * layers * heads * width if native else 0  # keys and values, in two bytes each
    text = f"a completion of {length:,} tokens with its prompt"
    _need(length * (cached + TOKEN_BYTES), text, source, "rollouts.max_tokens", device if native else None)


def check_block(task: dict[str, Any], source: Source) -> None:
    """
    Raises:
        UserError: the problems that a stream reads ahead could not be held.
    """
    block = task.get("shuffle_block", 1)
    if isinstance(block, int) and task.get("streaming") is True:
        _need(block * PROBLEM_BYTES, f"{block:,} problems read ahead", source, "task.shuffle_block")


def check_training(recipe: Recipe, algorithm: Algorithm, model: LanguageModel, source: Source, processes: int = 1) -> None:
    """
    Args:
        processes: how many share the weights, each of which loads them whole first.

    Raises:
        UserError: the model fits, and its training could not.
    """
    parameters = list(model.parameters())
    weights = sum(weight.numel() * weight.element_size() for weight in parameters)
    trained = sum(weight.numel() * weight.element_size() for weight in parameters if weight.requires_grad)
    copies = int("critic" in algorithm.needs)
    count = weights + ADAM * trained + (0 if model.adapted else copies * (1 + ADAM) * weights)
    text = "the model's weights, gradients and optimiser state" + (", and the critic's," if copies else "")
    needed = float(count)
    if processes > 1:
        needed, text = max(weights, count / processes), f"in each of {processes} processes, its share of {text}"
    try:
        need(needed, text, model.device)
    except UserError as error:
        raise source.error("model", f"{error}; LoRA adapters (model.lora) take less") from error


def check_demonstrations(recipe: SftRecipe, source: Source) -> None:
    """
    Raises:
        UserError: a batch of demonstrations could not be held.
    """
    count = recipe.sft.batch_size
    _need(count * DEMONSTRATION_BYTES, f"{count:,} demonstrations in an update", source, "sft.batch_size")


def _need(count: float, what: str, source: Source, key: str, device: torch.device | None = None) -> None:
    try:
        need(count, what, device)
    except UserError as error:
        raise source.error(key, str(error)) from error
