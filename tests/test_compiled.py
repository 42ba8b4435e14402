"""The C++ that is compiled on the spot."""

import platform
import shutil

import pytest
import torch

from groupwise.kernels.blocked_bf16 import why_not_bf16
from groupwise.kernels.compiled import library
from groupwise.kernels.decode_step import step_kernel


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


@pytest.mark.skipif(why_not_bf16() is not None, reason=why_not_bf16() or "")
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_decoding_step_compiles_for_bfloat16_weights(cache_dtype: torch.dtype) -> None:
    assert step_kernel(8, cache_dtype, bf16_weights=True) is not None
