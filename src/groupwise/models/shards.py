"""Tensors that several processes write, each its slices: safetensors files in the form of torch.distributed.checkpoint.

Not as that library's own writer does it: its files are flushed to the disk and hashed while they are written, and what it keeps
beside them by default is pickled, so that reading it could run code.
"""

import json
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import empty as empty_dtensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from groupwise.files import Digest, explained
from groupwise.state import write_tensors

OFFSETS, OFFSET = "DCP_SHARDING_INFO", "saved_offsets"
"""What torch.distributed.checkpoint calls, in a file's metadata, where in its tensor each slice begins."""


def write_shards(
    stem: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, rank: int
) -> dict[str, Digest]:
    """Write the slices that this process holds of sharded tensors as STEM/RANK.safetensors; process 0 writes all other tensors.

    Raises:
        DiskError: it cannot be written.
    """
    slices: dict[str, Tensor] = {}
    offsets: dict[str, dict[str, list[int]]] = {}
    for name, tensor in tensors.items():
        held, offset = tensor, (0,) * tensor.dim()
        if isinstance(tensor, DTensor):
            held = tensor.to_local()
            _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        if held.numel() if isinstance(tensor, DTensor) else rank == 0:
            slices[name], offsets[name] = held, {OFFSET: list(offset)}
    with explained(stem):
        stem.mkdir(exist_ok=True)
    path = stem / f"{rank:05d}.safetensors"
    digest = write_tensors(path, slices, {**(metadata or {}), OFFSETS: json.dumps(offsets)})
    return {f"{stem.name}/{path.name}": digest}


class Stored:
    """Tensors in STEM.safetensors, or in the files of STEM/ that several processes wrote."""

    def __init__(self, stem: Path) -> None:
        """Raises:
        Exception: whatever safetensors says of files that are missing or damaged.
        """
        whole = stem.with_name(f"{stem.name}.safetensors")
        self._files = sorted(stem.glob("*.safetensors")) if stem.is_dir() else [whole]
        found = _Reader(self._files).read_metadata().state_dict_metadata.items()
        self._tensors = {name: tensor for name, tensor in found if isinstance(tensor, TensorStorageMetadata)}

    def metadata(self) -> dict[str, str]:
        with safe_open(str(self._files[0]), "pt") as file:
            return dict(file.metadata() or {})

    def alike(self) -> dict[str, Tensor]:
        """Tensors without memory, of the names, shapes and dtypes of those that are stored."""
        found = self._tensors.items()
        return {name: torch.empty(tensor.size, dtype=tensor.properties.dtype, device="meta") for name, tensor in found}

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors of the same names, shapes and dtypes; of a sharded one, the slice that this process holds."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is meant
            load(dict(tensors), storage_reader=_Reader(self._files), no_dist=True)

    def read(self, mesh: DeviceMesh | None = None, whole: Collection[str] = ()) -> dict[str, Tensor]:
        """All tensors; with a mesh, those that have dimensions as slices, but for those called `whole`."""
        found: dict[str, Tensor] = {}
        for name, tensor in self.alike().items():
            sharded = mesh is not None and tensor.dim() > 0 and name not in whole
            settings: dict[str, Any] = {"device_mesh": mesh, "placements": [Shard(0)]} if sharded else {}
            found[name] = (empty_dtensor if sharded else torch.empty)(tuple(tensor.shape), dtype=tensor.dtype, **settings)
        self.read_into(found)
        return found


class _Files(FileSystem):
    """Of a directory, only these files."""

    def __init__(self, files: Iterable[Path]) -> None:
        super().__init__()
        self._files = [str(file) for file in files]

    def ls(self, path: Any) -> list[str]:
        return self._files


class _Reader(HuggingFaceStorageReader):
    def __init__(self, files: list[Path]) -> None:
        super().__init__(str(files[0].parent))
        self.fs = _Files(files)
