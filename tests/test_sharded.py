"""A learner over several processes computes what one process computes, keeps the same checkpoints, and ends as a whole."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from groupwise.files import Digest, sha256
from groupwise.learner.micro_batches import cut_for_ranks, spread
from groupwise.models import LanguageModel
from tests.sharded_cases import CASES, CHECKPOINT, after_updates, learn, new_learner, skipped, state_of
from tests.test_learner import random_batch

ROOT = Path(__file__).parent.parent
RANKS = (2, 3)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(ranks: int, *arguments: str, cwd: Path = ROOT) -> list[subprocess.Popen[str]]:
    """So many processes that find each other as those of torchrun do."""
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    common["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(ranks)
    ]


def end(processes: list[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str]]:
    """The exit code and standard error of each, which have so long."""
    limit, found = time.monotonic() + seconds, []
    try:
        for process in processes:
            _, error = process.communicate(timeout=max(0.1, limit - time.monotonic()))
            found.append((process.returncode, error))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the checkpoint of a single process, and then those of the others."""
    path = tmp_path_factory.mktemp("sharded")
    learner = after_updates(CHECKPOINT)
    (path / "saved by 1").mkdir()
    learner.save(path / "saved by 1")
    torch.save(state_of(learner), path / "found by 1.pt")
    return path


@pytest.fixture(scope="module")
def sharded(directory: Path) -> dict[int, dict[str, Any]]:
    """What 2 and 3 processes have found; the 3 load what the 2 have saved."""
    found = {}
    for ranks in RANKS:
        sources = [f"saved by {number}" for number in range(1, ranks)]
        codes = end(start(ranks, "-m", "tests.sharded_cases", str(directory), json.dumps(sources)), 240)
        assert [code for code, _ in codes] == [0] * ranks, codes
        found[ranks] = torch.load(directory / f"found by {ranks}.pt", weights_only=False)
    return found


@pytest.fixture(scope="module")
def local() -> dict[str, dict[str, Any]]:
    return {}


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", CASES)
def test_several_processes_learn_what_one_learns(
    name: str, ranks: int, sharded: dict[int, dict[str, Any]], local: dict[str, dict[str, Any]]
) -> None:
    if name not in local:
        local[name] = learn(CASES[name])
    ours, theirs = sharded[ranks][name], local[name]
    coarse = 1e3 if name == "bfloat16" else 1.0  # what rounds to another bfloat16 number
    for mine, one in zip(ours["gradient"], theirs["gradient"], strict=True):
        assert distance(mine, one) <= 1e-5 * coarse
        assert CASES[name].rows == "idle" or one.norm() > 1e-3
    for key in ("old", "reference", "values"):
        assert (ours[key] is None) == (theirs[key] is None)
        if ours[key] is not None:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-5 * coarse)
    for mine, one in zip(ours["weights"], theirs["weights"], strict=True):
        assert distance(mine, one) <= 1e-3 * coarse
    mine, one = ours["update"][0], theirs["update"][0]
    assert (mine.tokens, mine.skipped_tokens) == (one.tokens, one.skipped_tokens)
    for kind in ("means", "largest", "step", "latest"):
        assert getattr(mine, kind) == pytest.approx(getattr(one, kind), rel=1e-4 * coarse, abs=1e-6 * coarse, nan_ok=True)
    assert mine.sums.keys() == one.sums.keys()
    if name != "bfloat16":
        for key, values in one.sums.items():
            assert mine.sums[key] == pytest.approx(values, rel=1e-4, abs=1e-5)
    assert [item[:2] for item in ours["records"]] == [item[:2] for item in theirs["records"]]
    for (_, _, values), (_, _, expected) in zip(ours["records"], theirs["records"], strict=True):
        width = min(len(values), len(expected))  # parts are as wide as their longest row
        torch.testing.assert_close(values[:width].float(), expected[:width].float(), rtol=1e-4 * coarse, atol=1e-5 * coarse)
