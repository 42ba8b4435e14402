"""What a worker process is to load: a function or class in a file, or a Python object by value."""

import hashlib
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle

LARGEST_OBJECT = 64 * 2**20
"""Bytes of an object that is passed to workers by value."""


@dataclass(frozen=True, slots=True)
class Target:
    """A function or class, by its file or by value."""

    name: str
    file: str = ""
    """Absolute; empty: by value."""
    value: bytes = field(default=b"", repr=False)
    key: str = ""
    """Under which a worker keeps it."""

    @classmethod
    def in_file(cls, path: Path, name: str) -> "Target":
        """The object `name` of a Python file."""
        file = str(path.resolve())
        return cls(name, file=file, key=f"{file}:{name}")

    @classmethod
    def of(cls, target: Any) -> "Target":
        """A Python object, by value where it is of the user's script or notebook.

        Raises:
            ValueError: it cannot be pickled, or is larger than `LARGEST_OBJECT`.
        """
        try:
            value = cloudpickle.dumps(target, protocol=pickle.HIGHEST_PROTOCOL)
        except Exception as error:  # what it holds may refuse in any way
            raise ValueError(f"it cannot be pickled: {type(error).__name__}: {error}") from error
        if len(value) > LARGEST_OBJECT:
            raise ValueError(f"pickled it has {len(value) / 2**20:.0f} MiB, more than {LARGEST_OBJECT // 2**20}")
        name = getattr(target, "__name__", type(target).__name__)
        return cls(name, value=value, key=hashlib.sha256(value).hexdigest())
