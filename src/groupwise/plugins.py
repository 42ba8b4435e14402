"""A user's own functions and classes, named in a recipe as "file.py:name"."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from groupwise.errors import UserError, nearest
from groupwise.guard import user_code_at_start


@dataclass(frozen=True, slots=True)
class UserFunction:
    """A function or class of the user's, and where it came from."""

    function: Callable[..., Any]
    reference: str
    """Absolute "file.py:function"."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.function(*arguments, **named)


def is_reference(value: object) -> bool:
    return isinstance(value, str) and ".py:" in value


def find_file(reference: str, base: Path) -> tuple[Path, str]:
    """The file of "file.py:function", absolute, and the name in it; a relative file is looked for beside the recipe, then here.

    Raises:
        UserError: there is no such file.
    """
    file, _, name = reference.rpartition(":")
    path = next((path for path in (base / file, Path(file)) if path.is_file()), None)
    if path is None:
        raise UserError(f"{reference}: there is no file {file!r} beside the recipe or here")
    return path.resolve(), name


def load_function(reference: str, base: Path) -> UserFunction:
    """Load the function that "file.py:function" names into this process; see `find_file`.

    Raises:
        UserError: no such file or function, or the file does not run.
    """
    path, name = find_file(reference, base)
    module_name = f"groupwise_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    with user_code_at_start(str(path)):
        spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{path}: there is no function {name!r}{nearest(name, known)}")
    return UserFunction(function, f"{path}:{name}")
