"""A model's weights in a checkpoint: all of them, or of a model with adapters only what is trained."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from groupwise.errors import UserError
from groupwise.files import Digest
from groupwise.models.adapters import adapter_layers, describe
from groupwise.state import write_tensors

CHUNK = 2**20
"""Eight bytes each: how many are summed at once."""


def save_weights(module: Any, path: Path) -> Digest:
    """Write the weights as one safetensors file; tensors that share memory are written once.

    Of a model with adapters those that are trained, and a fingerprint of the others.
    """
    return write_tensors(path, _stored(module), _identity(module))


def load_weights(module: Any, path: Path, device: torch.device) -> None:
    """Read weights that `save_weights` wrote.

    Raises:
        UserError: the adapters are of another form, or on another base.
        ValueError: the weights are of another model.
        Exception: whatever safetensors says of a file that is damaged.
    """
    with safe_open(str(path), "pt") as file:
        written = file.metadata() or {}
    for what, ours in _identity(module).items():
        if written.get(what) != ours:
            raise UserError(f"{path}: {DIFFERS[what].format(written.get(what), ours)}")
    found, wanted = load_file(str(path), device=str(device)), _stored(module)
    check_alike(found, wanted)
    module.load_state_dict(found, strict=False)


def check_alike(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not those of the model: torch would convert other dtypes in silence.

    Raises:
        ValueError: another name, shape or dtype.
    """
    if found.keys() != wanted.keys():
        raise ValueError(f"weights of another model: {sorted(found.keys() ^ wanted.keys())[:3]}")
    for name, tensor in found.items():
        ours, theirs = (f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (wanted[name], tensor))
        if ours != theirs:
            raise ValueError(f"weights of another model: {name} is {theirs}, and here {ours}")


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
    """Of the parameters that are not trained: a hash of their names, shapes, dtypes, and sums of their bits, weighted by place.

    A hash of the bytes would have to bring them all from the device; a sum for each chunk is fast and sees any exchange.
    """
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            data = parameter.detach().reshape(-1).view(torch.uint8)
            data = data.clone() if data.storage_offset() % 8 else data
            inside = len(data) // 8 * 8
            # Cubes: with weights that are linear in the place, two rows of equal sums could change places unnoticed.
            cubes = torch.arange(1, min(CHUNK, inside // 8) + 1, device=data.device) ** 3
            sums = [(chunk * cubes[: len(chunk)]).sum() for chunk in data[:inside].view(torch.int64).split(CHUNK)]
            found = [*torch.stack(sums).tolist(), *data[inside:].tolist()]
            name = name.replace(".base_layer.", ".")
            digest.update(f"{name} {list(parameter.shape)} {parameter.dtype} {found}\n".encode())
    return digest.hexdigest()[:16]
