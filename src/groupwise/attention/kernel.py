"""decode.cpp, compiled for this processor when it is first needed: half a second, and no file of it stays."""

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

import torch

KEYS_AT_ONCE = 32
"""The places that a prompt's keys take are a multiple of this."""

_log = logging.getLogger(__name__)
_SOURCE = Path(__file__).parent / "decode.cpp"
_ELEMENTS = {torch.float32: [], torch.bfloat16: ["-DBFLOAT16"]}
# No -lgomp: OpenMP's functions are found in the process, so that the threads are those of PyTorch and no others.
_COMPILE = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-c"]


@functools.cache
def decode_kernel(head_size: int, dtype: torch.dtype) -> Callable[..., None] | None:
    """decode() of decode.cpp for heads of this size and tensors of this dtype; None where it cannot be compiled or loaded.

    It takes its arguments as there: tensors, contiguous and on the CPU, the scale, and sizes.
    """
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    compiler = shlex.split(os.environ["CXX"]) if os.environ.get("CXX") else [found] if found else None
    if compiler is None or dtype not in _ELEMENTS:
        _log.info("generation without its own attention kernel: %s", f"no kernel for {dtype}" if compiler else "no C++ compiler")
        return None
    settings = [f"-DHEAD_SIZE={head_size}", f"-DLANES={KEYS_AT_ONCE}", *_ELEMENTS[dtype]]
    try:
        with tempfile.TemporaryDirectory() as directory:
            compiled, library = str(Path(directory, "decode.o")), str(Path(directory, "decode.so"))
            # Linked in a second step, for -fopenmp there would bring a second set of threads.
            for arguments in ([*_COMPILE, *settings, str(_SOURCE), "-o", compiled], ["-shared", compiled, "-o", library]):
                subprocess.run([*compiler, *arguments], check=True, capture_output=True, text=True, errors="replace")
            function = ctypes.CDLL(library, mode=os.RTLD_NOW).decode
    except (OSError, subprocess.CalledProcessError) as error:
        _log.info("generation without its own attention kernel: %s", getattr(error, "stderr", None) or error)
        return None
    function.argtypes = [ctypes.c_void_p] * 12 + [ctypes.c_float] + [ctypes.c_int64] * 6
    function.restype = None

    def call(*arguments: Any) -> None:
        function(*(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments))

    return call
