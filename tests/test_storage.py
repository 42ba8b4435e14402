"""What a resume reads, killed at any operation and damaged in every way: on a run without a model, so that there can be many."""

import enum
import errno
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from groupwise import files
from groupwise.errors import RunError, UserError
from groupwise.files import DiskError, Lock, present
from groupwise.state import DTYPES, read_state, write_state, write_tensors
from groupwise.training import checkpoints
from groupwise.training.export import best_of, find
from groupwise.training.ledger import Entry
from groupwise.training.loop import Trainer
from groupwise.training.metrics_file import MetricsFile
from groupwise.training.pieces import InProcess
from groupwise.training.records import RunDirectory
from groupwise.training.resume import resumption
from groupwise.training.session import start

# --- the state of a run


def same(one: Any, other: Any) -> bool:
    """Equal in value and in type, also NaN; -0.0 is not 0.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        pairs = zip(one.items(), other.items(), strict=True)
        return len(one) == len(other) and all(same(a, c) and same(b, d) for (a, b), (c, d) in pairs)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, float):
        return one.hex() == other.hex()
    return bool(one == other)


keys = st.one_of(st.integers(), st.booleans(), st.text(), st.text(st.characters(categories=["Cs"])), st.floats(allow_nan=False))
tensors = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.uint8]).flatmap(
    lambda dtype: st.lists(st.integers(0, 3), max_size=3).map(lambda shape: (torch.rand(shape) * 200 - 100).to(dtype))
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), keys, tensors, st.sampled_from([-(2**63), 2**63, -(2**300)])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(state=values)
def test_state_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    stem = tmp_path_factory.mktemp("state") / "state"
    digests = write_state(stem, state)
    assert same(read_state(stem), state)
    for name, digest in digests.items():
        assert files.sha256(stem.with_name(name)) == digest


def test_texts_and_numbers_with_names_stay_texts_and_numbers(tmp_path: Path) -> None:
    class Colour(str, enum.Enum):  # noqa: UP042 (a StrEnum's str() is its text, this one's its name)
        RED = "red"

    class Level(enum.IntEnum):
        LOW = 1

    write_state(tmp_path / "state", {Colour.RED: [Colour.RED, Level.LOW]})
    assert same(read_state(tmp_path / "state"), {"red": ["red", 1]})


def test_integers_of_thousands_of_digits(tmp_path: Path) -> None:
    write_state(tmp_path / "state", [7 << 20_000, -(7 << 20_000)])
    assert read_state(tmp_path / "state") == [7 << 20_000, -(7 << 20_000)]


def test_tensors_are_a_safetensors_file_of_every_type(tmp_path: Path) -> None:
    """Also transposed ones, ones that share memory, and empty ones; in 16 and in 8 bits."""
    base = torch.arange(24).view(4, 6)
    wanted = {str(dtype): (base % 2 if dtype == torch.bool else base).to(dtype) for dtype in DTYPES}
    wanted |= {"transposed": base.t(), "part": base[1:, ::2], "empty": torch.zeros(0, 3), "number": torch.tensor(1.5), "ü": base}
    digest = write_tensors(tmp_path / "t.safetensors", wanted, {"what": "these"})
    found = load_file(tmp_path / "t.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)) if tensor.dim() else True
    assert files.sha256(tmp_path / "t.safetensors") == digest


def test_state_that_cannot_be_read_again_is_refused(tmp_path: Path) -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    for value in (object(), {1, 2}, torch.zeros(2, dtype=torch.complex64), nested):
        with pytest.raises(UserError, match="a checkpoint"):
            write_state(tmp_path / "state", {"a": value})


# --- a run


class Learner:
    """A vector that each step moves in its own way."""

    def __init__(self) -> None:
        self.weights = torch.zeros(5, dtype=torch.float64)

    def save(self, directory: Path) -> Any:
        weights = write_tensors(directory / "model.safetensors", {"w": self.weights})
        return {"model.safetensors": weights, **write_state(directory / "learner", {"moments": self.weights * 3})}

    def load(self, directory: Path) -> None:
        self.weights = load_file(directory / "model.safetensors")["w"]
        assert torch.equal(read_state(directory / "learner")["moments"], self.weights * 3)


EVERY = int(os.environ.get("GROUPWISE_KILL_EVERY", "3"))
"""Which share of operations is killed at; 1: all of them."""
SCORES = [0.1, 0.3, 0.2, 0.5, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1]
STEPS = 8


class Run(Trainer):
    """A run with its real directory, checkpoints and resume, and instead of a model a few numbers; a step uses one group up."""

    def __init__(self, path: Path, tree: dict[str, Any]) -> None:
        self.run_directory = RunDirectory(path, None)
        self.store = checkpoints.Store(path / "checkpoints", tree["training"]["keep_checkpoints"])
        self.learner, self.step, self.tree = Learner(), 0, tree  # type: ignore[assignment]
        empty: Any = SimpleNamespace(state_dict=dict, load_state_dict=lambda _: None, load=lambda *_: None)
        self.learner.version = 0  # type: ignore[misc]
        self.collector = self.credit = self.sampler = empty
        self.pieces = InProcess(self.learner, self.sampler)  # type: ignore[arg-type]
        self.watch: Any = SimpleNamespace(catch_up=lambda _: None)
        self.recorders = [self.run_directory]

    def resume(self, checkpoint: checkpoints.Checkpoint) -> None:
        self.step = checkpoints.load(checkpoint, self.learner)["step"]

    def save_if_possible(self) -> bool:
        self.save()
        return True

    def measure(self) -> Any:
        metrics = {"eval/pass@1": SCORES[self.step]}
        self.run_directory.write_held_out(self.step, [])
        self.run_directory.metrics.append(self.step, metrics)
        return SimpleNamespace(metrics=metrics)

    def run(self) -> None:
        """In the order of `Trainer.train`."""
        after = self.measure() if self.step % 3 == 0 else None
        if self.step and after:
            self.keep_best(after)
        while self.step < self.tree["training"]["steps"]:
            self.step += 1
            self.learner.weights = (self.learner.weights * 1.5 + self.step * self.tree["learner"]["learning_rate"]).sin()  # type: ignore
            for name in ("txt", "jsonl"):
                path = self.run_directory.path / "rollouts" / f"step-{self.step:06d}.{name}"
                files.write_atomically(path, f"{self.step}", durable=False)
            loss = float(self.learner.weights.sum())  # type: ignore[call-overload]
            self.run_directory.metrics.append(self.step, {"reward/mean": 0.5, "loss": loss})
            entry = Entry(step=self.step, trained=[self.step - 1], begun=self.step, running=[], finished=[])
            self.run_directory.ledger.append(entry)
            if self.step % self.tree["training"]["checkpoint_every"] == 0:
                self.save()
            if self.step % 3 == 0:
                self.keep_best(self.measure())
        self.run_directory.write_model(self.export)

    def export(self, path: Path) -> dict[str, float]:
        path.mkdir()
        write_tensors(path / "model.safetensors", {"w": self.learner.weights})  # type: ignore[dict-item]
        (path / "config.json").write_text("{}")
        return {}


TREE: dict[str, Any] = {
    "seed": 0,
    "model": {"path": "nowhere"},
    "algorithm": {"name": "dapo", "clip_high": 0.28},
    "learner": {"learning_rate": 0.1, "schedule": "constant"},
    "training": {"steps": STEPS, "checkpoint_every": 2, "keep_checkpoints": 2},
}


def changed(**sections: Any) -> dict[str, Any]:
    return {name: {**value, **sections.get(name, {})} if isinstance(value, dict) else value for name, value in TREE.items()}


def go(path: Path, tree: dict[str, Any] | None = None, *, resume: bool = False) -> list[Any]:
    """What `groupwise train` does: with --out, and where there are checkpoints with --resume. Returns what is said."""
    exists = resume or bool(checkpoints.listed(path / "checkpoints"))
    found = resumption(path) if exists else None
    run = Run(path, tree or (json.loads(json.dumps(found.recorded.tree)) if found else TREE))
    lock = found.lock if found else run.run_directory.claim()
    try:
        events = start(SimpleNamespace(resumption=found, path=path), SimpleNamespace(task=None), run, run.tree)  # type: ignore[arg-type]
        for event in events:
            run.run_directory.record(event)
        run.run()
    finally:
        lock.close()
    return events


def outcome(path: Path) -> dict[str, Any]:
    """All that a finished run promises to be the same."""
    segments = [json.loads(line) for line in (path / "segments.jsonl").read_text().splitlines()]
    return {
        "metrics": (path / "metrics.jsonl").read_bytes(),
        "model": (path / "model" / "model.safetensors").read_bytes(),
        "recipe": (path / "recipe.toml").read_text(),
        "best": json.loads((path / "checkpoints" / "best.json").read_text()),
        "checkpoints": {
            step: checkpoints.verify(p, step).metrics for step, p in checkpoints.listed(path / "checkpoints").items()
        },
        "by step": sorted(str(p.relative_to(path)) for name in ("rollouts", "evaluations") for p in (path / name).iterdir()),
        "last": segments[-1]["recipe"],
    }


class Killed(BaseException):
    """kill -9: nothing that would tidy up catches it."""


class Killer:
    """Counts what is done to files below a directory, and at a certain operation does half of it and raises."""

    def __init__(self) -> None:
        self.at, self.count, self.home = 0, 0, ""
        self.trace: list[tuple[str, str]] = []

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.home or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        path = str(arguments[0])
        if path.startswith(self.home) and (event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            self.happened(event, path)

    def happened(self, event: str, path: str) -> None:
        self.count += 1
        self.trace.append((event, path))
        if self.count == self.at:
            raise Killed

    @contextmanager
    def on(self, home: Path, at: int = 0) -> Iterator[None]:
        self.at, self.count, self.home, self.trace = at, 0, str(home), []
        try:
            yield
        finally:
            self.home = ""


KILLER = Killer()
sys.addaudithook(KILLER.hook)


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Killer:
    write = files.Hashed.write

    def write_half(self: files.Hashed, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        write(self, view[: len(view) // 2])
        if KILLER.home:
            KILLER.happened("write", str(self.file.name))
        write(self, view[len(view) // 2 :])

    def fsync(descriptor: int) -> None:  # a power cut is not simulated, and a real one would only take time
        if KILLER.home:
            KILLER.happened("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink()))

    monkeypatch.setattr(files.Hashed, "write", write_half)
    monkeypatch.setattr(os, "fsync", fsync)
    return KILLER


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    go(path)
    return path


def test_killed_at_any_operation_a_run_ends_the_same(tmp_path: Path, killer: Killer, whole: Path) -> None:
    wanted, path, point = outcome(whole), tmp_path / "run", 1
    while True:
        point += EVERY
        shutil.rmtree(path, ignore_errors=True)
        try:
            with killer.on(path, point):
                go(path)
            break  # there are no more operations
        except Killed:
            go(path)
        assert outcome(path) == wanted, killer.trace[-1]
        leftovers = [p for p in path.rglob(".*") if p.name != ".lock"]
        assert not leftovers, (killer.trace[-1], leftovers)
    assert point > 150


def test_killed_at_any_operation_of_a_resume_with_other_settings(tmp_path: Path, killer: Killer) -> None:
    """And resumed without naming them again: they count once the segment is written, and until then did not happen."""
    begun, path = tmp_path / "begun", tmp_path / "run"
    other = changed(learner={"learning_rate": 0.2})
    with pytest.raises(Killed), killer.on(begun, 180):
        go(begun)
    assert len(checkpoints.listed(begun / "checkpoints")) == 2
    step = max(checkpoints.listed(begun / "checkpoints"))
    wanted = []
    for tree in (TREE, other):
        shutil.copytree(begun, tmp_path / f"wanted-{len(wanted)}")
        go(tmp_path / f"wanted-{len(wanted)}", tree, resume=True)
        wanted.append(outcome(tmp_path / f"wanted-{len(wanted)}"))
    point, seen = 0, set()
    while True:
        point += EVERY
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(begun, path)
        try:
            with killer.on(path, point):
                go(path, other, resume=True)
            break
        except Killed:
            go(path, resume=True)
        found = outcome(path)
        assert found in wanted, killer.trace[-1]
        segments = [json.loads(line) for line in (path / "segments.jsonl").read_text().splitlines()]
        before = [segment for segment in segments if segment["first_step"] <= step]
        assert [segment["recipe"]["learner"]["learning_rate"] for segment in before] == [0.1]
        seen.add(wanted.index(found))
    assert seen == {0, 1}


def test_killed_again_and_again(tmp_path: Path, killer: Killer, whole: Path) -> None:
    chance = random.Random(15)
    wanted = outcome(whole)
    for trial in range(60):
        path = tmp_path / str(trial)
        for _ in range(chance.randrange(1, 5)):
            try:
                with killer.on(path, chance.randrange(1, 200)):
                    go(path)
            except Killed:
                continue
        go(path)
        assert outcome(path) == wanted


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, killer: Killer) -> None:
    """So that a power cut leaves no checkpoint that is not whole: every file is flushed after it was written, the directory
    too, and only then renamed; and the records of its steps before that."""
    with killer.on(tmp_path / "run"):
        go(tmp_path / "run")
    dirty: set[str] = set()
    renamed = 0
    for event, path in killer.trace:
        if event in ("open", "write") and not any(name in path for name in ("/rollouts/", "/evaluations/", ".lock")):
            dirty.add(path)
        elif event == "fsync":
            dirty.discard(path)
        elif event == "os.rename" and "/checkpoints/.partial-step" in path:
            renamed += 1
            assert not dirty, (path, dirty)
    assert renamed >= 4


# --- damage


def damaged(path: Path, how: str, older: Path) -> bool:
    """Damage a file; whether that could be done."""
    content = path.read_bytes()
    middle = len(content) // 2
    if how == "removed":
        path.unlink()
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(content[:middle])
    elif how == "cut at a line":
        path.write_bytes(b"".join(content.splitlines(keepends=True)[:-1]))
    elif how == "flipped":
        path.write_bytes(
            content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 4]) + content[len(content) // 2 + 1 :]
        )
    elif how == "swapped":
        if not older.exists():
            return False
        path.write_bytes(older.read_bytes())
    elif how == "a directory":
        path.unlink()
        path.mkdir()
    return not (path.is_file() and path.read_bytes() == content)


HOW = ["removed", "emptied", "cut", "cut at a line", "flipped", "swapped", "a directory"]


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after six of eight steps, with other settings from the fifth on."""
    path = tmp_path_factory.mktemp("half") / "run"
    go(path, changed(training={"steps": 4}))
    go(path, changed(training={"steps": 6}, learner={"learning_rate": 0.2}), resume=True)
    shutil.rmtree(path / "model")
    return path


LAST = changed(learner={"learning_rate": 0.2})


@pytest.mark.parametrize("how", HOW)
def test_any_file_of_the_newest_checkpoint_is_verified(half: Path, tmp_path: Path, how: str, killer: Killer) -> None:
    newest = half / "checkpoints" / "step-000006"
    assert {p.name for p in newest.iterdir()} >= {"manifest.json", "model.safetensors", "learner.json", "state.safetensors"}
    shutil.copytree(half, tmp_path / "wanted")
    go(tmp_path / "wanted", LAST, resume=True)
    for name in sorted(p.name for p in newest.iterdir()):
        path = tmp_path / name
        shutil.copytree(half, path)
        if not damaged(path / "checkpoints" / "step-000006" / name, how, path / "checkpoints" / "step-000004" / name):
            continue
        events = go(path, LAST, resume=True)
        said = [event.text for event in events if event.name == "checkpoint_damaged"]
        assert len(said) == 1 and said[0].startswith("step-000006 is passed over: "), (name, said)
        assert outcome(path)["model"] == outcome(tmp_path / "wanted")["model"]
        assert outcome(path)["metrics"] == outcome(tmp_path / "wanted")["metrics"]
        assert (path / "checkpoints" / "damaged-step-000006").is_dir()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "recipe.toml", "segments.jsonl", "checkpoints/best.json", "rollouts/step-000003.txt"]
)
def test_any_other_file_is_restored_or_named(half: Path, tmp_path: Path, how: str, name: str, killer: Killer) -> None:
    path, wanted, older = tmp_path / "run", tmp_path / "wanted", tmp_path / "older"
    for to in (path, wanted):
        shutil.copytree(half, to)
    go(wanted, LAST, resume=True)
    go(older, changed(training={"steps": 4}))
    if not damaged(path / name, how, older / name):
        return
    if how == "a directory" and not name.startswith("rollouts"):
        with pytest.raises((DiskError, UserError), match=f"{Path(name).name}: cannot be (read|written): Is a directory"):
            go(path, LAST, resume=True)
        return
    events = go(path, LAST, resume=True)
    said = [event.text for event in events if event.name == "records_damaged"]
    found, expected = outcome(path), outcome(wanted)
    assert found["model"] == expected["model"] and found["recipe"] == expected["recipe"] and found["best"] == expected["best"]
    if (name, how) == ("metrics.jsonl", "cut at a line"):  # the evaluation after the checkpoint, which is repeated
        assert found["metrics"] == expected["metrics"]
    elif name in ("metrics.jsonl", "recipe.toml", "segments.jsonl"):
        assert any(Path(name).name in text for text in said), (said, how)
    if name == "metrics.jsonl":
        records = [json.loads(line) for line in found["metrics"].splitlines()]
        steps = [record["step"] for record in records if "loss" in record]
        assert len(set(steps)) == len(steps) and {7, 8} <= set(steps)
    else:
        assert found["metrics"] == expected["metrics"]


@pytest.mark.parametrize(
    "line",
    [b"5", b"null", b"[1]", b'{"step": "x"}', b'{"step": null}', b'{"step": true}', b'{"step": 1e9}', b"\xff", b"[" * 9999, b""],
)
def test_records_survive_any_line(tmp_path: Path, line: bytes) -> None:
    record = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        record.append(step, {"reward/mean": 1.0, "x": math.nan})
    at_two = files.Digest(
        *(lambda data: (len(data), hashlib.sha256(data).hexdigest()))(b"".join(record.path.read_bytes().splitlines(True)[:2]))
    )
    intact = record.path.read_bytes()
    assert MetricsFile(record.path).rewind(2, [at_two]) is None
    assert [json.loads(text)["step"] for text in record.path.read_text().splitlines()] == [1, 2]
    record.path.write_bytes(intact.replace(b"\n", b"\n" + line + b"\n", 1))
    again = MetricsFile(record.path)
    said = again.rewind(2, [at_two])
    assert said is not None and "kept as metrics.damaged-1.jsonl" in said and "none cannot be read" in said
    assert [json.loads(text)["step"] for text in record.path.read_text().splitlines()] == [1, 2]
    again.append(3, {"reward/mean": 2.0})
    assert files.sha256(record.path) == again.digest


def test_a_repaired_record_is_not_found_damaged_again(half: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(half, path)
    (path / "metrics.jsonl").write_text("torn\n")
    events = go(path, changed(training={"steps": 6}, learner={"learning_rate": 0.2}), resume=True)
    assert "of steps 1 to 6, 6 cannot be read" in " ".join(event.text for event in events)
    events = go(path, LAST, resume=True)
    assert not [event for event in events if event.name == "records_damaged"]
    assert [p.name for p in path.glob("metrics.damaged-*")] == ["metrics.damaged-1.jsonl"]


def test_foreign_names_are_no_checkpoints(half: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(half, path)
    there = path / "checkpoints"
    for name in ("step-notes", "step-000002.bak", "step-7", "step-0000009", ".partial-step-000010", "step-٠٠٠٠٠٩"):
        shutil.copytree(there / "step-000004", there / name)
    (there / "step-000011").write_text("a file")
    assert list(checkpoints.listed(there)) == [3, 4, 6]
    go(path, LAST, resume=True)
    assert {"step-notes", "step-000002.bak", "step-7", "step-0000009", "step-000011"} <= {p.name for p in there.iterdir()}


def test_where_no_checkpoint_is_whole_each_is_named(half: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(half, path)
    (path / "checkpoints" / "step-000003" / "manifest.json").rename(path / "checkpoints" / "step-000003" / "state.pt")
    (path / "checkpoints" / "step-000004" / "manifest.json").write_text("[1]")
    (path / "checkpoints" / "step-000006" / "model.safetensors").unlink()
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(UserError) as error:
        go(path, resume=True)
    assert "step-000006: model.safetensors is missing" in str(error.value)
    assert "step-000004: manifest.json is damaged" in str(error.value)
    assert "step-000003: written by an earlier version" in str(error.value)
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_weights_of_another_step_with_a_manifest_of_their_own(half: Path, tmp_path: Path) -> None:
    """A whole checkpoint under another's name."""
    path = tmp_path / "run"
    shutil.copytree(half, path)
    shutil.rmtree(path / "checkpoints" / "step-000006")
    shutil.copytree(path / "checkpoints" / "step-000004", path / "checkpoints" / "step-000006")
    events = go(path, LAST, resume=True)
    assert "step-000006 is passed over: step-000006 holds step 4" in [event.text for event in events]


# --- settings


def test_an_edited_recipe_is_refused_with_what_would_take_the_edit(half: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(half, path)
    recipe = path / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("clip_high = 0.28", "clip_high = 0.4"))
    with pytest.raises(
        UserError, match=r"algorithm.clip_high: 0.4, and in segments.jsonl 0.28[\s\S]*--set algorithm.clip_high=0.4"
    ):
        go(path, resume=True)
    recipe.unlink()
    assert "recipe.toml is missing; written again from segments.jsonl" in [event.text for event in go(path, resume=True)]


def test_segments_say_with_which_settings_which_steps_were_trained(half: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(half, path)
    events = go(path, changed(algorithm={"clip_high": 0.3}), resume=True)
    segments = [json.loads(line) for line in (path / "segments.jsonl").read_text().splitlines()]
    assert [segment["first_step"] for segment in segments] == [1, 5, 7]
    assert segments[1]["changed"] == {"learner.learning_rate": [0.1, 0.2], "training.steps": [4, 6]}
    assert segments[2]["changed"]["algorithm.clip_high"] == [0.28, 0.3]
    said = [event.text for event in events if event.name == "settings_changed"]
    assert "algorithm.clip_high: 0.28 -> 0.3 (changes results)" in said and "training.steps: 6 -> 8" in said
    assert "learner.learning_rate: 0.2 -> 0.1 (changes results)" in said
    (path / "segments.jsonl").unlink()
    (path / "recipe.toml").unlink()
    shutil.rmtree(path / "checkpoints" / "step-000008")
    go(path, changed(training={"steps": 9}), resume=True)  # what the older checkpoint was trained with is known from it
    segments = [json.loads(line) for line in (path / "segments.jsonl").read_text().splitlines()]
    assert segments[0]["recipe"]["learner"]["learning_rate"] == 0.2 and segments[1]["first_step"] == 7


# --- beginning again


def test_a_run_killed_before_its_first_checkpoint_is_begun_again(tmp_path: Path, killer: Killer, whole: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(Killed), killer.on(path, 30):
        go(path)
    assert not checkpoints.listed(path / "checkpoints")
    with pytest.raises(UserError, match=r"a run with other settings was begun there:\n  learner.learning_rate: 0.1 -> 0.3$"):
        go(path, changed(learner={"learning_rate": 0.3}))
    shutil.copytree(path, tmp_path / "resumed")
    go(path)
    go(tmp_path / "resumed", resume=True)
    assert outcome(path) == outcome(tmp_path / "resumed") == outcome(whole)
    with pytest.raises(UserError, match="to go on with a run: groupwise train --resume"):
        RunDirectory(path, None).check_free()


def test_what_had_checkpoints_is_not_begun_again(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    shutil.rmtree(path / "checkpoints")
    for _ in range(2):
        with pytest.raises(UserError, match="records of 8 steps and no checkpoint"):
            go(path, resume=True)
        shutil.rmtree(path / "model", ignore_errors=True)
    with pytest.raises(UserError, match="records of 8 steps and no checkpoint"):
        go(path)
    assert (path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["notes.txt", "model", "data"])
def test_a_directory_with_something_else_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="already there and not empty"):
        RunDirectory(tmp_path, None).claim()
    assert [p.name for p in tmp_path.iterdir()] == [name]


# --- one process at a time


def test_another_process_is_refused_and_the_lock_dies_with_its_process(half: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(half, path)
    code = (
        "import sys, subprocess, time; from pathlib import Path; from groupwise.files import Lock; "
        "lock = Lock(Path(sys.argv[1])); "
        "subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL); print('ready', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for begin in (lambda: go(path, LAST, resume=True), lambda: Lock(path)):
            with pytest.raises(UserError, match=rf"another process \(pid {process.pid} on .+\) trains in "):
                begin()
        process.kill()
    go(path, LAST, resume=True)  # although the child that it started is still there


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(files.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    assert "no locks" in Lock(tmp_path).warning


# --- the best


def test_the_best_stays_beside_the_newest(whole: Path, tmp_path: Path) -> None:
    """Evaluated after steps 3 and 6, checkpoints after each second: of step 3 there is one because it is the best."""
    assert list(checkpoints.listed(whole / "checkpoints")) == [3, 6, 8]
    assert json.loads((whole / "checkpoints" / "best.json").read_text()) == {"step": 3, "metric": "eval/pass@1", "value": 0.5}
    assert find(whole, "best").step == 3 and find(whole, "newest").step == 8 and find(whole, "6").step == 6
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    (path / "checkpoints" / "best.json").write_text("{}")
    best = best_of(path)
    assert best is not None and best.step == 3
    for which, message in (("7", "there are 3, 6, 8"), ("last", "expected newest, best or a step: 3, 6, 8")):
        with pytest.raises(UserError, match=message):
            find(path, which)
    (path / "checkpoints" / "step-000003" / "state.json").write_text("")
    with pytest.raises(UserError, match=r"state\.json is not the file that was written: 0 bytes"):
        find(path, "best")


def test_a_result_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    for step in (2, 4):
        (tmp_path / f"step-{step:06d}").mkdir()
    store = checkpoints.Store(tmp_path, 3)
    for value in (math.nan, math.inf, -math.inf, None, "0.5"):
        assert store.is_better(2, {"eval/pass@1": value}) is None
        store.resume(4, [{"step": 2, "eval/pass@1": value}, {"step": 4, "eval/pass@1": 0.25}])
        assert store.best == checkpoints.Best(step=4, metric="eval/pass@1", value=0.25)


def test_what_cannot_be_tidied_up_costs_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    """Old checkpoints that the system refuses to remove, as NFS does while somebody reads them, and a best.json that is refused
    too."""
    path, move, replaced = tmp_path / "run", Path.replace, shutil.rmtree

    def refuse_to_remove(path: Any, *arguments: Any, **options: Any) -> None:
        if Path(path).name.startswith(files.REMOVED) and not options.get("ignore_errors"):
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        replaced(path, *arguments, **options)

    def refuse_best(self: Path, target: Any) -> Any:
        if Path(target).name == "best.json":
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return move(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", refuse_to_remove)
        patch.setattr(Path, "replace", refuse_best)
        go(path)
    assert not (path / "checkpoints" / "best.json").exists() and list(checkpoints.listed(path / "checkpoints")) == [3, 6, 8]
    found = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    assert {event["name"] for event in found} == {"disk_low"}
    assert any("Directory not empty" in event["text"] for event in found) and any("best.json" in event["text"] for event in found)
    go(path)
    assert outcome(path) == outcome(whole)


# --- directories and disks


def test_a_reader_finds_what_is_being_replaced(tmp_path: Path) -> None:
    (tmp_path / ".replaced-model").mkdir()
    assert present(tmp_path / "model").name == ".replaced-model"
    (tmp_path / "model").mkdir()
    assert present(tmp_path / "model").name == "model"


def test_a_full_disk_is_one_message_and_changes_nothing(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write in turn finds no room; the run stops, and with room again ends as if nothing had been."""
    wanted = tmp_path / "wanted"
    shutil.copytree(half, wanted)
    go(wanted, LAST, resume=True)
    write, left = files.Hashed.write, [0]

    def full(self: files.Hashed, data: bytes | memoryview) -> None:
        left[0] -= 1
        if left[0] == 0:
            write(self, memoryview(data).cast("B")[:3])
            raise OSError(28, "No space left on device")
        write(self, data)

    monkeypatch.setattr(files.Hashed, "write", full)
    for room in range(1, 1000):
        path = tmp_path / "run"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(half, path)
        left[0] = room
        failed = None
        try:
            go(path, LAST, resume=True)
        except RunError as error:
            failed = error
        if left[0] > 0:
            break  # there was room for everything
        if failed is None:  # only the best one's name found none
            assert [event["name"] for event in map(json.loads, (path / "events.jsonl").open())] == ["resumed", "disk_low"]
        else:
            assert isinstance(failed, DiskError) and str(failed).count("No space left on device") == 1, failed
        assert not list(path.rglob(".partial-*")), failed
        go(path, LAST, resume=True)
        assert outcome(path) == outcome(wanted)
    assert room > 15
