"""A model's weights in a checkpoint: all of them, or of a model with adapters only what is trained."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from groupwise.errors import UserError
from groupwise.files import Digest
from groupwise.models.adapters import adapter_layers, describe
from groupwise.models.shards import Stored
from groupwise.state import write_tensors

CHUNK = 2**20
"""Eight bytes each: how many are summed at once."""


def save_weights(module: Any, path: Path) -> Digest:
    """Write the weights as one safetensors file; tensors that share memory are written once.

    Of a model with adapters those that are trained, and a fingerprint of the others.
    """
    return write_tensors(path, stored(module), identity(module))


def load_weights(module: Any, stem: Path, ours: Mapping[str, str] | None = None) -> None:
    """Read weights that `save_weights` wrote as STEM.safetensors, or several processes as the files of STEM/.

    `ours`: the module's `identity`, where it was sharded since.

    Raises:
        UserError: the adapters are of another form, or on another base.
        ValueError: the weights are of another model.
        Exception: whatever safetensors says of a file that is damaged.
    """
    found, tensors, wanted = Stored(stem), _tensors(module), stored(module)
    written = found.metadata()
    for what, expected in (identity(module) if ours is None else ours).items():
        if written.get(what) != expected:
            raise UserError(f"{stem}: {DIFFERS[what].format(written.get(what), expected)}")
    check_alike(found.alike(), wanted)
    found.read_into(wanted)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not tensor.is_contiguous():  # then what was filled is a copy
                tensor.copy_(wanted[name])


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
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}


def stored(module: Any) -> dict[str, Tensor]:
    """The tensors of a checkpoint, contiguous; those of the module, or copies where its own are not."""
    return {name: tensor.contiguous() for name, tensor in _tensors(module).items()}


def _tensors(module: Any) -> dict[str, Tensor]:
    """The module's tensors that are in a checkpoint; of those that share memory, the first."""
    if adapter_layers(module):
        return trained_parameters(module)
    unique: dict[tuple[int, torch.Size], tuple[str, Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        place = 0 if isinstance(tensor, DTensor) else tensor.data_ptr()
        unique.setdefault((place or id(tensor), tensor.shape), (name, tensor.detach()))
    return dict(unique.values())


def identity(module: Any) -> dict[str, str]:
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
