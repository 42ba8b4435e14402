"""State as JSON and safetensors, and back exactly as it was: nothing that is read can run code.

JSON holds the structure and the numbers. What JSON lacks is an object with one key, its type: {"tuple": […]}, {"dict": [[key,
value], …]}, {"tensor": "3"}, which names a tensor of the safetensors file beside it, {"float": "nan"}, {"int": "0x…"} for long
integers, {"text": [code points]} for texts with halves of surrogate pairs.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file
from torch import Tensor

from groupwise.errors import UserError
from groupwise.files import Digest, written

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls them."""
LONG = 2**63
"""Integers from here on are written in hexadecimal: Python refuses to read decimal ones of thousands of digits."""


# --- tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Digest:
    """Write a safetensors file, one tensor after the other, so that memory stays flat; returns its size and hash.

    The library's own writer says neither what it wrote nor, on a full disk, what is wrong.

    Raises:
        DiskError: it cannot be written.
    """
    names, header = _layout(tensors, metadata)
    with written(path) as file:
        file.write(header)
        for name in names:
            if tensors[name].numel():
                file.write(_data(tensors[name]))
        return file.digest


def _layout(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> tuple[list[str], bytes]:
    """The order in which a safetensors file holds tensors, and what it begins with."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that each is aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return names, len(text).to_bytes(8, "little") + text


def _data(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of at least one element."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


# --- structures


def write_state(stem: Path, state: Any) -> dict[str, Digest]:
    """Write STEM.json and STEM.safetensors; returns what they hold, by name.

    Raises:
        UserError: the state holds what could not be read again.
        DiskError: they cannot be written.
    """
    text, tensors = encode(state)
    of_text = write_text(stem.with_suffix(".json"), text)
    return {**of_text, f"{stem.name}.safetensors": write_tensors(stem.with_suffix(".safetensors"), tensors)}


def write_text(path: Path, text: str) -> dict[str, Digest]:
    """Write a file; returns what it holds, by its name.

    Raises:
        DiskError: it cannot be written.
    """
    with written(path) as file:
        file.write(text.encode())
        return {path.name: file.digest}


def encode(state: Any) -> tuple[str, dict[str, Tensor]]:
    """State as JSON, and the tensors that it names.

    Raises:
        UserError: it holds what could not be read again.
    """
    tensors: dict[str, Tensor] = {}
    try:
        return json.dumps(_encoded(state, tensors), allow_nan=False, separators=(",", ":")), tensors
    except RecursionError as error:
        raise UserError("a checkpoint cannot hold lists and mappings that are nested so deep") from error


def to_bytes(state: Any) -> bytes:
    """State as one message: the length of its JSON, in eight bytes, the JSON, then a safetensors file.

    Raises:
        UserError: it holds what could not be read again.
    """
    text, tensors = encode(state)
    names, header = _layout(tensors)
    content = text.encode()
    data = (_data(tensors[name]) for name in names if tensors[name].numel())
    return b"".join([len(content).to_bytes(8, "little"), content, header, *data])


def from_bytes(message: bytes) -> Any:
    """What `to_bytes` made a message of.

    Raises:
        Exception: whatever reading a message that it did not make raises.
    """
    view = memoryview(message)
    end = 8 + int.from_bytes(view[:8], "little")
    return _decoded(json.loads(bytes(view[8:end])), load_tensors(bytes(view[end:])))


def read_state(stem: Path, tensors: Mapping[str, Tensor] | None = None) -> Any:
    """What `write_state` wrote. `tensors`: those that it names; None: as they are in STEM.safetensors.

    Raises:
        Exception: whatever reading files that it did not write raises.
    """
    tensors = load_file(stem.with_suffix(".safetensors")) if tensors is None else tensors
    return _decoded(json.loads(stem.with_suffix(".json").read_bytes()), tensors)


def _encoded(value: Any, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        # Two halves of a pair beside each other would be read as one character.
        return {"text": [ord(c) for c in value]} if any("\ud800" <= c <= "\udfff" for c in value) else str.__str__(value)
    if isinstance(value, Real):
        if isinstance(value, Integral):
            whole = int(value)
            return whole if -LONG <= whole < LONG else {"int": hex(whole)}
        number = float(value)
        return number if math.isfinite(number) else {"float": str(number)}
    if isinstance(value, Tensor) and value.dtype in DTYPES and value.layout == torch.strided:
        tensors[name := str(len(tensors))] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[_encoded(key, tensors), _encoded(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list):
        return [_encoded(item, tensors) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_encoded(item, tensors) for item in value]}
    raise UserError(
        f"a checkpoint holds numbers, texts, tensors, and lists and mappings of these, and a part of the algorithm remembers "
        f"{type(value).__name__}: {value!r:.100}"
    )


def _decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "text":
            return "".join(map(chr, content))
        case "int":
            return int(content, 16)
        case "float":
            return float(content)
        case "tensor":
            return tensors[content]
        case "dict":
            return {_decoded(key, tensors): _decoded(item, tensors) for key, item in content}
        case "tuple":
            return tuple(_decoded(item, tensors) for item in content)
    raise ValueError(f"there is no type {kind!r}")


def plain(value: Any) -> Any:
    """A value as `write_state` takes it: dataclasses become mappings; what is no number, text, tensor or container of these, such
    as a date in a row of a dataset, becomes its text. Tensors are not copied."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if value is None or isinstance(value, bool | str | Real | Tensor):
        return value
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple)(map(plain, value))
    return str(value)
