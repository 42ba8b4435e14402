"""C++ compiled for this processor when it is first needed: half a second, and no file of it stays."""

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
# No -lgomp: OpenMP's functions are found in the process, so that the threads are those of PyTorch and no others.
_COMPILE = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-c"]


@functools.cache
def library(name: str, *settings: str) -> ctypes.CDLL | None:
    """<name>.cpp of this package, compiled with such settings; None where it cannot be compiled or loaded."""
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    compiler = shlex.split(os.environ["CXX"]) if os.environ.get("CXX") else [found] if found else None
    if compiler is None:
        _log.info("without the kernels of %s: no C++ compiler", name)
        return None
    source = str(Path(__file__).parent / f"{name}.cpp")
    try:
        with tempfile.TemporaryDirectory() as directory:
            compiled, linked = str(Path(directory, f"{name}.o")), str(Path(directory, f"{name}.so"))
            # Linked in a second step, for -fopenmp there would bring a second set of threads.
            for arguments in ([*_COMPILE, *settings, source, "-o", compiled], ["-shared", compiled, "-o", linked]):
                subprocess.run([*compiler, *arguments], check=True, capture_output=True, text=True, errors="replace")
            return ctypes.CDLL(linked, mode=os.RTLD_NOW)
    except (OSError, subprocess.CalledProcessError) as error:
        _log.info("without the kernels of %s: %s", name, getattr(error, "stderr", None) or error)
        return None


def function(of: ctypes.CDLL, name: str, tensors: int, numbers: int, sizes: int) -> Callable[..., None]:
    """A C function of so many tensors (on the CPU, laid out as it expects; None for a null pointer), floats and integers."""
    found = of[name]
    found.argtypes = [ctypes.c_void_p] * tensors + [ctypes.c_float] * numbers + [ctypes.c_int64] * sizes
    found.restype = None

    def call(*arguments: Any) -> None:
        found(*[None if x is None else x.data_ptr() for x in arguments[:tensors]], *arguments[tensors:])

    return call
