"""Runs are killed, damaged and given full disks: a seeded share of what benchmarks/faults.py does in the hundreds."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from fault_injection import damage, disks, kills
from fault_injection.checks import Reference, files_of, make_reference, metrics_of, unflushed
from fault_injection.preload import Fault, Operation, compile_library, environment, operations
from fault_injection.recipes import RECIPES, write_recipes
from fault_injection.server import THREADS, Server

SEED = 15


@dataclass
class House:
    """The fork server and the undisturbed runs, made when first asked for."""

    server: Server
    library: Path
    recipes: dict[str, Path]
    folder: Path
    references: dict[str, Reference]

    def reference(self, name: str) -> Reference:
        """Of one recipe with a state halfway, which costs as much again."""
        if name not in self.references:
            recipe = self.recipes[name]
            folder = self.folder / recipe.stem
            self.references[name] = make_reference(self.server, name, recipe, folder, halfway=name == "GRPO")
        return self.references[name]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("faults").resolve()
    library = compile_library(folder)
    if library is None:
        pytest.skip("counting file operations needs Linux and a C compiler")
    recipes = write_recipes(folder / "recipes")
    with Server(library, list(recipes.values()), folder / "server") as server:
        yield House(server, library, recipes, folder, {})


WRITER = """
import os, sys
from pathlib import Path
import numpy, pyarrow, pyarrow.parquet, safetensors.numpy
run = Path(sys.argv[1])
(run / "a").mkdir()
(run / "a" / "text").write_text("four")
os.rename(run / "a" / "text", run / "a" / "renamed")
with (run / "kept").open("wb") as file:
    file.write(b"x" * 10)
    file.flush()
    os.fsync(file.fileno())
safetensors.numpy.save_file({"x": numpy.zeros(1000, "float32")}, run / "tensors")
pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), run / "table")
os.unlink(run / "a" / "renamed")
os.rmdir(run / "a")
Path(sys.argv[1] + "-beside").write_text("elsewhere")
print((run / "kept").read_bytes())
"""


def write(house: House, folder: Path, fault: Fault) -> subprocess.CompletedProcess[str]:
    (run := folder / "run").mkdir(parents=True)
    settings = environment(house.library, run, folder / "log", fault)
    command = [sys.executable, "-c", WRITER, str(run)]
    return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)


def test_the_library_sees_the_writes_of_python_rust_and_c_plus_plus(house: House, tmp_path: Path) -> None:
    assert write(house, tmp_path, Fault()).returncode == 0
    seen = [(one.name, one.place) for one in operations(tmp_path / "log")]
    bytes_of: dict[str, int] = {}
    for one in operations(tmp_path / "log"):
        bytes_of[one.path[:4]] = bytes_of.get(one.path[:4], 0) + one.size * (one.name == "write")
    assert seen[:5] == [
        ("mkdir", "a"),
        ("open-truncate", "a/text"),
        ("write", "a/text"),
        ("close", "a/text"),
        ("rename", "a/renamed"),
    ]
    assert seen[5:9] == [("open-truncate", "kept"), ("write", "kept"), ("fsync", "kept"), ("close", "kept")]
    assert seen[-2:] == [("unlink", "a/renamed"), ("rmdir", "a")]
    assert bytes_of["kept"] == 10
    assert bytes_of["tabl"] == (tmp_path / "run" / "table").stat().st_size
    tensors = bytes_of.get("tens", 0) + bytes_of.get(".tmp", 0)  # newer versions write to a temporary name first
    assert tensors == (tmp_path / "run" / "tensors").stat().st_size


def test_the_library_kills_before_or_within_an_operation_and_fails_it(house: House, tmp_path: Path) -> None:
    before = write(house, tmp_path / "before", Fault(action="kill", at=6))
    assert before.returncode == -9 and (tmp_path / "before" / "run" / "kept").read_bytes() == b""
    half = write(house, tmp_path / "half", Fault(action="kill", at=6, half=True))
    assert half.returncode == -9 and (tmp_path / "half" / "run" / "kept").read_bytes() == b"xxxxx"
    full = write(house, tmp_path / "full", Fault(action="fail", at=6))
    assert full.returncode == 1 and "No space left on device" in full.stderr
    denied = write(house, tmp_path / "denied", Fault(denied="kept"))
    assert denied.returncode == 1 and "Permission denied" in denied.stderr


def test_a_forked_run_gives_the_bits_of_a_process_of_its_own(house: House, tmp_path: Path) -> None:
    """And without the library."""
    reference = house.reference("GRPO")
    command = [sys.executable, "-m", "groupwise", "train", str(reference.recipe), "--out", str(tmp_path / "run")]
    subprocess.run(command, env={**os.environ, **THREADS}, check=True, capture_output=True)
    assert files_of(tmp_path / "run") == reference.files
    assert metrics_of(tmp_path / "run") == reference.metrics


@pytest.mark.parametrize("name", RECIPES)
def test_a_killed_run_comes_back_exactly(house: House, name: str) -> None:
    reference, rng = house.reference(name), random.Random(f"{SEED}/{name}")
    trials = kills.plan(reference, 8, rng)
    for kind in kills.KINDS if name == "GRPO" else [rng.choice(["run", "checkpoint"])]:
        trial = rng.choice([one for one in trials if one.kind == kind])
        problems = kills.carry_out(house.server, reference, trial, house.folder / "run")
        assert not problems, trial


def test_what_is_not_flushed_is_found() -> None:
    def done(*texts: str) -> list[Operation]:
        fields = [[*text.split(), "", ""][:3] for text in texts]
        return [Operation(name, path, target, 1) for name, path, target in fields]

    partial, final = "checkpoints/.partial-step-000002", "checkpoints/step-000002"
    begin = done(f"mkdir {partial}", f"open {partial}/a", f"write {partial}/a")
    data, move, name = done(f"fsync {partial}/a"), done(f"rename {partial} {final}"), done("fsync checkpoints")
    prune = done("unlink checkpoints/step-000001/a")
    assert unflushed([*begin, *data, *move, *name, *prune]) == []
    assert unflushed([*begin, *move, *name]) == [f"{partial}/a gets the name {final} before it is flushed"]
    assert unflushed([*begin, *data, *move]) == [f"the name {final} is never flushed"]
    early = unflushed([*begin, *data, *move, *prune, *name])
    assert early == [f"checkpoints/step-000001/a is removed before the name {final} is flushed"]


def test_kills_are_spread_over_the_operations() -> None:
    names = ["open", "write", "write", "write", "write", "close"]
    done = [Operation(name, "metrics.jsonl", "", 1) for name in names] + [Operation("mkdir", "checkpoints", "", 0)]
    assert kills.points(done) == [0, 1, 4, 5, 6]  # writes 2 and 3 are like 1 and 4
    assert kills.points(done, checkpoints=True) == [6]
    found = kills.spread(list(range(100)), 10, random.Random(0))
    assert len(set(found)) == 10 and {after - before for before, after in pairwise(found)} == {10}


def test_data_are_flushed_before_they_get_their_names(house: House) -> None:
    reference = house.reference("GRPO")
    assert not unflushed(reference.operations)
    assert not unflushed(reference.resuming)


def test_damaged_files_are_named_or_change_nothing(house: House) -> None:
    reference, rng = house.reference("GRPO"), random.Random(SEED)
    trials = damage.plan(reference, rng)
    journals = ("recipe.toml", "metrics.jsonl", "segments.jsonl")
    read = [one for one in trials if one.file in journals or one.file.startswith("checkpoints/step-000005")]
    for trial in rng.sample(read, 4) + rng.sample(trials, 1):
        _, problems = damage.carry_out(house.server, reference, trial, house.folder / "run")
        assert not problems, trial


def test_foreign_files_are_passed_over(house: House) -> None:
    reference, rng = house.reference("GRPO"), random.Random(SEED)
    for name in rng.sample(list(damage.FOREIGN), 2):
        _, problems = damage.add_foreign(house.server, reference, name, house.folder / "run")
        assert not problems, name


def test_a_failing_disk_is_said_and_nothing_is_lost(house: House) -> None:
    reference, rng = house.reference("GRPO"), random.Random(SEED)
    for trial in rng.sample(disks.plan(reference, rng), 4):
        _, problems = disks.carry_out(house.server, reference, trial, house.folder / "run")
        assert not problems, trial


def test_a_disk_that_is_really_full_and_then_read_only(house: House, tmp_path: Path) -> None:
    if not disks.may_mount():
        pytest.skip("file systems of its own need root and the right to make mount namespaces")
    problems = disks.really_full(house.library, house.reference("GRPO"), tmp_path, 9)
    assert not problems
