"""A model as a Hugging Face directory, in the dtype that it was stored in, with its generation settings."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from groupwise.errors import UserError
from groupwise.models.adapters import adapter_layers, adapts_tied_head, is_lora, merged_weight
from groupwise.models.loading import is_adapter
from groupwise.models.patches import patched

if TYPE_CHECKING:
    from groupwise.models.language_model import LanguageModel

ON_ADAPTERS = "{} holds adapters itself, which are merged into its base; new ones alone would be read without. Export 'merged'"


def write(model: "LanguageModel", directory: Path, tokenizer: Any, *, merge: bool) -> None:
    """Write a model with its tokenizer; see `LanguageModel.export`."""
    tokenizer.save_pretrained(directory)
    if not merge and model.adapted:
        save_adapters(model.outer, directory)
    else:
        save_model(model.module, directory, model.stored_dtype)


def gap(model: "LanguageModel") -> dict[str, float]:
    """What merging adapters changes, as `LanguageModel.export` returns it."""
    return {"export/merge_gap": merge_gap(model.module, model.stored_dtype)} if model.adapted else {}


def save_adapters(outer: Any, directory: Path) -> None:
    """Write the adapters alone, as peft does; their configuration names the base.

    Raises:
        UserError: the base is another base with adapters merged into it, and so no model that the configuration could name.
    """
    for config in outer.peft_config.values():
        if is_adapter(path := str(config.base_model_name_or_path)):
            raise UserError(ON_ADAPTERS.format(path))
        if Path(base := str(config.base_model_name_or_path)).is_dir():
            config.base_model_name_or_path = str(Path(base).resolve())
    outer.save_pretrained(directory, save_embedding_layers=False)


def save_model(module: Any, directory: Path, dtype: torch.dtype, *, with_tied: bool = False) -> None:
    """Write a model, adapters merged into the tensors that are written, and not into those that it holds.

    Args:
        with_tied: write tied weights under each of their names, and not under one only.

    Raises:
        UserError: its adapters are of a kind that cannot be merged.
    """
    check_mergeable(module)
    untied = adapts_tied_head(module)
    settings = getattr(module, "generation_config", None)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        if settings is not None:
            module.generation_config = GenerationConfig()  # save_pretrained refuses what many models on the hub have
        state = _merged_state(module, dtype)
        module.save_pretrained(directory, state_dict=_separate(state) if with_tied else state)
    finally:
        if settings is not None:
            module.generation_config = settings
    if settings is not None:
        settings.to_json_file(str(directory / "generation_config.json"))
    _correct_config(directory / "config.json", dtype, untied=untied)


def check_mergeable(module: Any) -> None:
    """Refuse adapters that are more than a sum with a weight.

    Raises:
        UserError: naming the first.
    """
    for layer in adapter_layers(module):
        special = not is_lora(layer) or any(
            name in layer.lora_variant or layer.lora_bias[name] or layer.merged for name in layer.active_adapters
        )
        if special:
            raise UserError(f"adapters of the kind {type(layer).__name__} cannot be merged here; export the adapter instead")


def _merged_state(module: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """What `state_dict` would give of the model without peft's layers; tensors that share memory still do."""
    layers = {name: layer for name, layer in module.named_modules() if is_lora(layer)}
    cast: dict[tuple[int, torch.Size], Tensor] = {}
    wide = module._keep_in_fp32_modules_strict or ()  # as transformers keeps them when it loads the model in 16 bits
    parameters = {
        name for name, _ in module.named_parameters(remove_duplicate=False) if not any(part in name.split(".") for part in wide)
    }
    state: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        owner, _, rest = name.rpartition(".base_layer.")
        if owner in layers:
            merged = merged_weight(layers[owner]).to(dtype) if rest == "weight" else tensor.to(dtype)
            state[f"{owner}.{rest}"] = merged
        elif any(name.startswith(f"{layer}.lora_") for layer in _owners(name, layers)):
            continue
        elif name in parameters and tensor.is_floating_point():
            state[name] = cast.setdefault((tensor.data_ptr() or id(tensor), tensor.shape), tensor.to(dtype))
        else:
            state[name] = tensor
    return state


def _separate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, where those that are tied are copies of each other."""
    seen: set[tuple[int, torch.Size]] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in state.items():
        place = tensor.data_ptr(), tensor.shape
        separate[name] = tensor.clone() if tensor.numel() and place in seen else tensor
        seen.add(place)
    return separate


def _owners(name: str, layers: dict[str, Any]) -> list[str]:
    parts = name.split(".")
    return [owner for i in range(1, len(parts)) if (owner := ".".join(parts[:i])) in layers]


def _correct_config(path: Path, dtype: torch.dtype, *, untied: bool) -> None:
    config = json.loads(path.read_text())
    for settings in (config, *(value for value in config.values() if isinstance(value, dict))):
        if settings is config or "dtype" in settings:
            settings["dtype"] = str(dtype).removeprefix("torch.")
        if untied and (settings is config or "tie_word_embeddings" in settings):
            settings["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def merge_gap(module: Any, dtype: torch.dtype) -> float:
    """How far merging adapters, and rounding the sum to `dtype`, moves a logit: the largest over some tokens."""
    tokens = torch.arange(32, device=module.device)[None] * 7 % module.config.get_text_config().vocab_size
    theirs = module(input_ids=tokens, use_cache=False).logits
    layers = [layer for layer in adapter_layers(module) if is_lora(layer)]
    with patched((layer, partial(_merged, layer, dtype)) for layer in layers):
        ours = module(input_ids=tokens, use_cache=False).logits
    return float((ours.float() - theirs.float()).abs().max())


def _merged(layer: Any, dtype: torch.dtype, x: Tensor) -> Tensor:
    weight = merged_weight(layer).to(dtype).to(x.dtype)
    if type(layer.base_layer) is not torch.nn.Linear:  # GPT-2's Conv1D, whose matrix is transposed
        weight = weight.t()
    bias = layer.base_layer.bias
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(dtype).to(x.dtype))
