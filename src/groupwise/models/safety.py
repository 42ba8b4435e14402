"""What comes with a model and could run code when it is loaded: refused with what to do, before anything reads it."""

import functools
import json
import logging
import re
from pathlib import Path
from typing import Any

from groupwise.errors import UserError
from groupwise.text import visible

CONVERT = (
    'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; p = {path!r}; d = {out!r}; '
    'M.from_pretrained(p, use_safetensors=False).save_pretrained(d); T.from_pretrained(p).save_pretrained(d)"'
)
CONVERT_ADAPTERS = (
    'python -c "import torch, safetensors.torch as s; p = {path!r}; '
    "s.save_file(torch.load(p + '/adapter_model.bin', weights_only=True), p + '/adapter_model.safetensors')\""
)


def refuse_pickles(path: str) -> None:
    """Refuse weights in a local directory that are no safetensors: reading a pickle can run code.

    Raises:
        UserError: naming the files, and the command that converts them.
    """
    names = sorted(file.name for file in Path(path).iterdir()) if Path(path).is_dir() else []
    kept = any(name.endswith(".safetensors") for name in names)
    shards = [name for name in names if name.endswith(".safetensors.index.json")]
    others = sorted({other for name in shards for other in _listed(Path(path) / name) if not other.endswith(".safetensors")})
    if others:
        raise UserError(f"{path}: {shards[0]} lists {others[0]!r}, which is no safetensors file, and reading it could run code")
    adapters = "adapter_config.json" in names or not kept  # else nothing reads adapter_model.bin
    if adapters and "adapter_model.bin" in names and "adapter_model.safetensors" not in names:
        raise UserError(
            f"the adapters in {path!r} are pickled (adapter_model.bin), and reading them could run code; if you trust them, "
            f"convert them once: {CONVERT_ADAPTERS.format(path=path)}"
        )
    if not kept and any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names):
        raise UserError(
            f"the weights of {path!r} are pickled (.bin), and reading them could run code; if you trust them, convert them "
            f"once: {CONVERT.format(path=path, out=path.rstrip('/') + '-safetensors')}"
        )


def _listed(index: Path) -> list[str]:
    try:
        return [str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of weights: {error!r}") from error


class _Visible(logging.Filter):
    """Shows hidden characters of a message, but for the styles that transformers itself writes."""

    def filter(self, record: logging.LogRecord) -> bool:
        pieces = re.split(r"(\x1b\[[0-9;]*m)", record.getMessage())
        record.msg = "".join(piece if i % 2 else visible(piece, lines=True) for i, piece in enumerate(pieces))
        record.args = ()
        return True


@functools.cache
def show_logs() -> None:
    """Transformers' messages about a model, which hold the names of its tensors and settings, go through `visible`."""
    for handler in logging.getLogger("transformers").handlers:
        handler.addFilter(_Visible())


def refuse_kernels(config: Any, path: str) -> None:
    """Refuse a configuration that names an attention or expert kernel of the hub, which transformers would fetch and run.

    Raises:
        UserError: naming it.
    """
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))):
        for key in ("attn_implementation", "experts_implementation"):
            named = getattr(part, f"_{key}", None)
            if isinstance(named, str) and "/" in named:
                raise UserError(
                    f"the configuration of {path!r} names code from the hub ({key} = {named!r}), which loading would run; remove "
                    "that line from its config.json"
                )
