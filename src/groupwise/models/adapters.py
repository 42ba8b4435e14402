"""LoRA adapters (arXiv 2106.09685) through peft: y = W x + s B A x, where W, the base's weight, stays as it is."""

import copy
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from groupwise.errors import UserError, nearest
from groupwise.memory import need
from groupwise.models.patches import is_observed

if TYPE_CHECKING:
    from groupwise.config import LoraSection

FULL_TRAINING_RATE = 2e-5
"""Learning rates up to here are typical of full training; LoRA learns with about ten times as much."""
MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
BYPASSED = (".out_proj",)
"""Layers of these model types that fused kernels of transformers use without calling them; peft refuses to adapt them."""


# --- layers with adapters


def is_linear(module: Any) -> bool:
    """Whether `linear_weight` gives all that the layer computes but its bias: a Linear layer, plain or with LoRA adapters."""
    if type(module) is torch.nn.Linear:
        return True
    return is_lora(module) and type(module.base_layer) is torch.nn.Linear and not _needs_calls(module)


def is_lora(module: Any) -> bool:
    """Whether it is peft's layer of a linear one with LoRA adapters."""
    return type(module).__name__ == "Linear" and type(module).__module__ == "peft.tuners.lora.layer"


def _needs_calls(layer: Any) -> bool:
    """Whether a layer with adapters computes something else than one matmul: dropout, a variant as DoRA, or what hooks do."""
    active = _active(layer)
    dropout = layer.training and any(type(layer.lora_dropout[name]) is not torch.nn.Identity for name in active)
    plain = all(type(inner[name]) is torch.nn.Linear for inner in (layer.lora_A, layer.lora_B) for name in active)
    special = any(name in getattr(layer, "lora_variant", {}) or layer.lora_bias[name] for name in active)
    return dropout or special or not plain or layer.merged or any(is_observed(inner) for inner in layer.modules())


def _active(layer: Any) -> list[str]:
    return [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]


def linear_weight(layer: Any) -> Tensor:
    """The matrix [N, K] of a layer that `is_linear`: with adapters W + s B A, a new tensor, so that W stays as it is."""
    return merged_weight(layer) if is_lora(layer) else layer.weight


@torch.no_grad()
def merged_weight(layer: Any) -> Tensor:
    """W + s B A over the active adapters, summed in the adapters' dtype or the base's if that is wider; W if there are none."""
    weight: Tensor = layer.base_layer.weight.detach()
    dtype = weight.dtype
    for name in _active(layer):
        delta = layer.get_delta_weight(name)
        weight = weight.to(torch.promote_types(delta.dtype, dtype)) + delta
    return weight.to(dtype)


def linear_layers(modules: Iterable[Any]) -> list[Any]:
    """Those of the modules that are linear layers; what is inside a layer with adapters belongs to it."""
    found = [module for module in modules if is_linear(module)]
    inside = {inner for layer in found if is_lora(layer) for inner in layer.modules() if inner is not layer}
    return [layer for layer in found if layer not in inside]


def active_layer(layer: Any) -> Any:
    """The base's layer where the adapters of a layer are switched off, else the layer."""
    return layer.base_layer if is_lora(layer) and layer.disable_adapters and not layer.merged else layer


# --- models with adapters


def adapter_layers(module: Any) -> list[Any]:
    """Those of a model's modules that peft has put adapters on, of whatever kind."""
    # transformers' models have a method of the name that is a property of peft's layers.
    return [layer for layer in module.modules() if isinstance(getattr(layer, "disable_adapters", None), bool)]


@contextmanager
def adapters_off(module: Any) -> Iterator[None]:
    """Within: the base model without its adapters; a model without any stays as it is."""
    layers = [layer for layer in adapter_layers(module) if not layer.disable_adapters]
    trained = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        _enable(layers, False, trained)
        yield
    finally:
        _enable(layers, True, trained)


def _enable(layers: list[Any], on: bool, trained: list[tuple[Tensor, bool]]) -> None:
    """Switch adapters; `trained`: which parameters require gradients, which peft would change."""
    for layer in layers:
        layer.enable_adapters(on)
    for parameter, required in trained:
        parameter.requires_grad_(required)


def need_peft() -> Any:
    """The peft package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError("adapters need peft: pip install 'groupwise[lora]'") from error
    return peft


def add_adapters(module: Any, settings: "LoraSection", *, seed: int) -> Any:
    """A peft model around the module, with new adapters: A random, B zero, in float32, on layers that are frozen.

    Raises:
        UserError: peft is not installed, or a target is no linear layer of the model.
    """
    peft = need_peft()
    targets = _targets(module, settings.targets)
    _check_size(module, settings.rank, targets)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, lora_dropout=0.0
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied output layers, which our export unties, and of GPT-2's transposed layers
        torch.manual_seed(seed)
        try:
            return peft.get_peft_model(module, config).eval()
        except ValueError as error:  # peft refuses some layers of some models
            raise UserError(f"model.lora.targets: {str(error).splitlines()[0]}") from error


def _check_size(module: Any, rank: int, targets: list[str]) -> None:
    """
    Raises:
        UserError: adapters of this rank, with their gradients and AdamW's moments, could not be held.
    """
    named = [(f".{name}", layer) for name, layer in module.named_modules() if hasattr(layer, "weight")]
    weights = [layer.weight for name, layer in named if name.endswith(tuple(f".{target}" for target in targets))]
    count = sum(rank * sum(weight.shape) * weight.element_size() for weight in weights)
    try:
        need(4 * count, f"adapters of rank {rank:,} on {len(weights)} layers")
    except UserError as error:
        raise UserError(f"model.lora.rank: {error}") from error


def load_adapters(module: Any, path: str) -> Any:
    """The module with the adapters of a directory that peft wrote merged into its weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied output layers, which are parted here
        adapted = need_peft().PeftModel.from_pretrained(module, path)
        if adapts_tied_head(module):
            head = module.get_output_embeddings()
            head.base_layer.weight = torch.nn.Parameter(head.base_layer.weight.detach().clone())
            module.config.tie_word_embeddings = False
        return adapted.merge_and_unload()


def adapts_tied_head(module: Any) -> bool:
    """Whether an adapter is on an output layer whose matrix is the embedding's too, so that merging it parts the two."""
    head = module.get_output_embeddings()
    return is_lora(head) and head.base_layer.weight is module.get_input_embeddings().weight


def _targets(module: Any, wanted: list[str]) -> list[str]:
    """Names for peft: those of the recipe, or of all linear layers but the output layer."""
    head = module.get_output_embeddings()
    layers = {name: inner for name, inner in module.named_modules() if isinstance(inner, torch.nn.Linear | Conv1D)}
    suffixes = {name.rsplit(".", 1)[-1] for name in layers}
    if wanted:
        for target in wanted:
            if not any(name == target or name.endswith("." + target) for name in layers):
                hint = nearest(target, suffixes) or f"; there are {', '.join(sorted(suffixes))}"
                raise UserError(f"model.lora.targets: {target!r} names no linear layer of the model{hint}")
        return wanted
    bypassed = BYPASSED if module.config.model_type in MAMBA else ()
    chosen = {name for name, inner in layers.items() if inner is not head and not name.endswith(bypassed)}
    others = {name for name, _ in module.named_modules()} - chosen
    # The last part of a name stands for all layers that are called so, unless others are called so too.
    ambiguous = {name.rsplit(".", 1)[-1] for name in others}
    return sorted({name if (last := name.rsplit(".", 1)[-1]) in ambiguous else last for name in chosen})


def with_shared_base(outer: Any) -> Any:
    """A copy of a model with adapters that has adapters of its own, and all other parameters in common with it."""
    shared = {id(parameter): parameter for parameter in outer.parameters() if not parameter.requires_grad}
    return copy.deepcopy(outer, shared)


def describe(module: Any) -> str | None:
    """What adapters a model has, in words; None if it has none."""
    layers = [layer for layer in adapter_layers(module) if is_lora(layer)]
    if not layers:
        return None
    forms = {(layer.r[name], layer.lora_alpha[name]) for layer in layers for name in layer.lora_A}
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in module.parameters())
    ranks = ", ".join(f"rank {rank}, alpha {alpha:g}" for rank, alpha in sorted(forms))
    return f"LoRA of {ranks} on {len(layers)} layers: {trained:,} of {total:,} parameters are trained"
