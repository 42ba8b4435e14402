"""Weights on their way to samplers of other processes: a Hugging Face model directory, whole as soon as it exists."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from groupwise import files
from groupwise.errors import UserError, first_line
from groupwise.models import export
from groupwise.models.adapters import adapter_layers

if TYPE_CHECKING:
    from groupwise.models.language_model import LanguageModel


def publish(model: "LanguageModel", directory: Path) -> None:
    """Write the model's weights, adapters merged, in their own dtype; see `Learner.publish`.

    A head that is tied to the embeddings is written like any other tensor: vLLM 0.32 on a CPU keeps a packed copy of it, which a
    reload renews only where the files name it.

    Raises:
        DiskError: they cannot be written.
    """
    partial = directory.with_name(files.PARTIAL + directory.name)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with files.explained(directory):
            export.save_model(model.module, partial, model.dtype, with_tied=True)
            partial.rename(directory)
    except SafetensorError as error:  # raised for what the system says, which is in its text only
        raise files.DiskError(f"{directory}: cannot be written: {first_line(error)}") from error


class Published:
    """Weights in such a directory that fit a model, checked before any tensor of it is changed."""

    def __init__(self, model: "LanguageModel", directory: Path) -> None:
        """
        Raises:
            UserError: there are none, they are another model's, or the model has adapters.
        """
        self._directory, self._module = directory, model.module
        if adapter_layers(self._module):
            raise UserError("published weights have adapters merged into them, and this model has adapters beside its own")
        self._check_config()
        self._ours = _stored(self._module)
        """The model's tensors by their names in the module; of those that share memory, the first."""
        self._files = self._names()
        self._own_names = self._fits()
        """Whether tensors are called in the files as they are in the module."""

    def _check_config(self) -> None:
        path = self._directory / "config.json"
        try:
            theirs = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: no model has been published there: {first_line(error)}") from error
        ours = self._module.config
        for key, mine in (("model_type", ours.model_type), ("tie_word_embeddings", _tied(self._module))):
            if (found := theirs.get(key, mine)) != mine:
                raise UserError(f"{self._directory}: another model's weights: its {key} is {found!r}, and here {mine!r}")

    def _names(self) -> dict[str, Path]:
        """Which file holds each tensor. That each is as long as its header says is checked when it is opened."""
        found: dict[str, Path] = {}
        for path in sorted(self._directory.glob("*.safetensors")):
            try:
                with safe_open(str(path), "pt") as file:
                    found |= dict.fromkeys(file.keys(), path)
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path}: cannot be read: {first_line(error)}") from error
        if not found:
            raise UserError(f"{self._directory}: no *.safetensors files in it")
        tied = self._module.state_dict().keys() - self._ours.keys()  # each is in the files under its other name too
        return {name: path for name, path in found.items() if name not in tied}

    def _fits(self) -> bool:
        """
        Raises:
            UserError: a tensor has another shape or dtype.
        """
        if self._files.keys() != self._ours.keys():
            return False
        for name, path in self._files.items():
            with safe_open(str(path), "pt") as file:
                _check_alike(name, file.get_slice(name), self._ours[name])
        return True

    @torch.no_grad()
    def load(self) -> None:
        """Copy them into the model.

        Raises:
            UserError: they are another model's, which is seen only now where transformers stores tensors under other names.
            OSError, SafetensorError: the files could not be read; some tensors may have been copied.
        """
        if not self._own_names:
            self._load_converted()
            return
        for path in dict.fromkeys(self._files.values()):
            with safe_open(str(path), "pt") as file:
                for name in self._ours.keys() & set(file.keys()):
                    self._ours[name].copy_(file.get_tensor(name))

    def _load_converted(self) -> None:
        """Through a second model, for architectures whose tensors transformers splits, joins or renames in files."""
        try:
            other, info = type(self._module).from_pretrained(
                self._directory, dtype=self._module.dtype, use_safetensors=True, output_loading_info=True
            )
        except Exception as error:  # transformers raises what it likes about files of another model
            raise UserError(f"{self._directory}: another model's weights: {first_line(error)}") from error
        for kind, names in info.items():
            if names and kind != "error_msgs":
                raise UserError(f"{self._directory}: another model's weights: {kind}: {', '.join(sorted(map(str, names))[:3])}")
        theirs = _stored(other)
        if theirs.keys() != self._ours.keys():
            differing = sorted(theirs.keys() ^ self._ours.keys())[:3]
            raise UserError(f"{self._directory}: another model's weights: {', '.join(differing)}")
        for name, tensor in theirs.items():
            if tensor.shape != self._ours[name].shape:
                raise UserError(f"{self._directory}: another model's weights: {name} is {list(tensor.shape)}")
        for name, tensor in theirs.items():
            self._ours[name].copy_(tensor)


def _stored(module: Any) -> dict[str, Tensor]:
    """What `save_pretrained` writes, before it gives tensors their names in files."""
    unique: dict[tuple[int, torch.Size], tuple[str, Tensor]] = {}
    for name, tensor in module.state_dict().items():
        unique.setdefault((tensor.data_ptr() or id(tensor), tensor.shape), (name, tensor))
    return dict(unique.values())


def _tied(module: Any) -> bool:
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def _check_alike(name: str, theirs: Any, ours: Tensor) -> None:
    """A tensor takes another of its shape; floating ones are converted, as a sampler with a dtype of its own needs.

    Raises:
        UserError: it is another model's.
    """
    shape, kind = list(theirs.get_shape()), str(theirs.get_dtype())
    floating = kind.startswith(("F", "BF"))
    if shape != list(ours.shape) or floating != ours.is_floating_point():
        here = f"{list(ours.shape)} {str(ours.dtype).removeprefix('torch.')}"
        raise UserError(f"another model's weights: {name} is {shape} {kind}, and here {here}")
