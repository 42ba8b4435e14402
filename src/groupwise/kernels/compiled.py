"""C++ source files compiled for this processor when they are first needed: about half a second each, nothing kept on disk."""

import ctypes
import functools
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)
# No -lgomp: the OpenMP symbols resolve to the runtime that PyTorch has loaded, so both share one thread pool.
_COMPILE = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-c"]
_failures: dict[tuple[str, ...], str] = {}
"""Why `library` returned None, keyed by its arguments."""


@functools.cache
def library(name: str, *settings: str) -> ctypes.CDLL | None:
    """Compile and load <name>.cpp of this package with extra compiler flags; None if that fails (`unavailable` says why)."""
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    compiler = shlex.split(os.environ["CXX"]) if os.environ.get("CXX") else [found] if found else None
    if compiler is None:
        _failures[name, *settings] = "no C++ compiler found (install g++ or clang++, or set CXX)"
        _log.info("kernels of %s.cpp are unavailable: no C++ compiler", name)
        return None
    source = str(Path(__file__).parent / f"{name}.cpp")
    try:
        with tempfile.TemporaryDirectory() as directory:
            compiled, linked = str(Path(directory, f"{name}.o")), str(Path(directory, f"{name}.so"))
            # Compile and link separately: -fopenmp at link time would load a second OpenMP runtime with its own threads.
            for arguments in ([*_COMPILE, *settings, source, "-o", compiled], ["-shared", compiled, "-o", linked]):
                subprocess.run([*compiler, *arguments], check=True, capture_output=True, text=True, errors="replace")
            return ctypes.CDLL(linked, mode=os.RTLD_NOW)
    except (OSError, subprocess.CalledProcessError) as error:
        message = str(getattr(error, "stderr", None) or error)
        _failures[name, *settings] = _first_error(message)
        _log.info("kernels of %s.cpp are unavailable: %s", name, message)
        return None


def unavailable(name: str, *settings: str) -> str | None:
    """Why `library` with these arguments is None: no C++ compiler, or its first error. None if the library is there."""
    return None if library(name, *settings) is not None else _failures[name, *settings]


def _first_error(message: str) -> str:
    # GCC may print "In file included from ..." lines before the error itself.
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["the compiler gave no message"]
    return next((line for line in lines if "error" in line.lower()), lines[0])


def function(loaded: ctypes.CDLL, name: str, tensors: int, numbers: int, sizes: int) -> Callable[..., None]:
    """A C function of a loaded library, callable with tensors.

    Args:
        tensors: how many pointers it takes first. Each tensor must be on the CPU, with the dtype and memory layout that the C
            function expects, for nothing is checked; None is passed as a null pointer.
        numbers: how many floats follow.
        sizes: how many int64 follow those.
    """
    symbol = loaded[name]
    symbol.argtypes = [ctypes.c_void_p] * tensors + [ctypes.c_float] * numbers + [ctypes.c_int64] * sizes
    symbol.restype = None

    def call(*arguments: Any) -> None:
        symbol(*[None if x is None else x.data_ptr() for x in arguments[:tensors]], *arguments[tensors:])

    return call
