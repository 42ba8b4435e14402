"""The C++ that is compiled on the spot."""

import platform
import shutil

import pytest

from groupwise.kernels.compiled import library


@pytest.mark.skipif(platform.system() != "Linux" or not shutil.which("g++"), reason="other compilers may lack OpenMP")
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sample", []),
        ("layers", []),
        ("blocked", []),
        ("packed_attention", ["-DHEAD_SIZE=8"]),
        ("decode_attention", ["-DHEAD_SIZE=8", "-DBFLOAT16"]),
        ("decode_step", ["-DHEAD_SIZE=8"]),
    ],
)
def test_gcc_makes_every_kernel(name: str, settings: list[str]) -> None:
    assert library(name, *settings) is not None
