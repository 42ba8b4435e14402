"""A model's weights in a checkpoint: all of them, or of a model with adapters only what is trained."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from groupwise.errors import UserError
from groupwise.models.adapters import adapter_layers, describe

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def save_weights(module: Any, path: Path) -> None:
    """Write the weights as one safetensors file; tensors that share memory are written once.

    Of a model with adapters those that are trained, and a fingerprint of the others.
    """
    save_file(_stored(module), str(path), metadata=_identity(module))


def load_weights(module: Any, path: Path, device: torch.device) -> None:
    """Read weights that `save_weights` wrote.

    Raises:
        UserError: the adapters are of another form, or on another base.
        Exception: whatever safetensors and torch say of a file that is damaged or of another model.
    """
    with safe_open(str(path), "pt") as file:
        written = file.metadata() or {}
    for what, ours in _identity(module).items():
        if written.get(what) != ours:
            raise UserError(f"{path}: {DIFFERS[what].format(written.get(what), ours)}")
    found, wanted = load_file(str(path), device=str(device)), _stored(module)
    if found.keys() != wanted.keys():
        raise ValueError(f"weights of another model: {sorted(found.keys() ^ wanted.keys())[:3]}")
    module.load_state_dict(found, strict=False)


DIFFERS = {
    "adapters": "its adapters are {}, and the recipe's {}; [model.lora] cannot change in a run",
    "base": "its adapters were trained on another base model (fingerprint {}, and this one's is {}); set model.path to that one",
}


def trained_parameters(module: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().contiguous() for name, parameter in module.named_parameters() if parameter.requires_grad}


def _stored(module: Any) -> dict[str, Tensor]:
    if adapter_layers(module):
        return trained_parameters(module)
    unique: dict[tuple[int, torch.Size], tuple[str, Tensor]] = {}
    for name, tensor in module.state_dict().items():
        unique.setdefault((tensor.data_ptr() or id(tensor), tensor.shape), (name, tensor.contiguous()))
    return dict(unique.values())


def _identity(module: Any) -> dict[str, str]:
    """What must be the same when weights are read again; nothing for a model without adapters."""
    if not adapter_layers(module):
        return {}
    return {"adapters": str(describe(module)), "base": fingerprint(module)}


def fingerprint(module: Any) -> str:
    """Of the parameters that are not trained: a hash of their names, shapes, dtypes, and the sums of their bits."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            bits = parameter.detach().contiguous().view(INTEGERS[parameter.element_size()])
            # Each number is weighted by its place in its row, so that columns in another order show.
            places = torch.arange(1, bits.shape[-1] + 1, device=bits.device) if bits.dim() else 1
            total = int((bits.sum(tuple(range(bits.dim() - 1)), dtype=torch.int64) * places).sum()) if bits.dim() else int(bits)
            name = name.replace(".base_layer.", ".")
            digest.update(f"{name} {list(parameter.shape)} {parameter.dtype} {total}\n".encode())
    return digest.hexdigest()[:16]
