"""A learner in a process of its own learns as one in this process does, to the bit, also where it is killed on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import torch
from safetensors.torch import load_file

from groupwise.cluster.learner_process import make
from groupwise.errors import LearnerLost, RunError, UserError
from groupwise.learner.local import LocalLearner
from groupwise.learner.remote import RemoteLearner
from groupwise.state import from_bytes, to_bytes
from groupwise.training import session
from groupwise.training.output import make_console
from groupwise.types import Batch
from tests.learner_processes import Apart, LearnerProcess, launcher
from tests.test_learner import random_batch

SETTINGS = [
    "model.path=arithmetic-base", "algorithm.name=grpo", "rollouts.prompts_per_step=2", "rollouts.group_size=4",
    "rollouts.max_tokens=8", "training.steps=6", "training.checkpoint_every=2", "training.eval_every=3",
    "training.eval_problems=4", "training.tokens_every=1", "learner.minibatches=2", "learner.old_logprobs=recompute",
]  # fmt: skip
RECIPE = """
[model]
path = "arithmetic-base"
[algorithm]
name = "grpo"
beta = 0.1
[learner]
minibatches = 2
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LearnerProcess]:
    recipe = tmp_path_factory.mktemp("learner") / "recipe.toml"
    recipe.write_text(RECIPE)
    found = LearnerProcess(recipe, timeout=5.0)
    yield found
    found.stop()


@pytest.fixture
def remote(host: LearnerProcess) -> RemoteLearner:
    """A learner as a run begins with it."""
    if host.failure() is not None or host.learner.version > 0:
        host.restart()
    return host.learner


def batch_of(kind: type[Batch], batch: Batch) -> Batch:
    return kind(**{item.name: getattr(batch, item.name) for item in fields(kind)})


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_updates_are_those_of_a_learner_in_this_process(host: LearnerProcess, remote: RemoteLearner, tmp_path: Path) -> None:
    local, tokenizer = make(host.recipe)
    assert isinstance(local, LocalLearner)
    batch = random_batch(local.model)
    sampled = batch_of(Batch, batch)
    found = []
    for learner, place in ((local, tmp_path / "local"), (remote, tmp_path / "remote")):
        place.mkdir()
        records: list[Any] = []
        learner.begin_step()
        with_logprobs, metrics = learner.compute_logprobs(sampled)
        assert learner.take_back() and learner.version == 0
        updates = [learner.update(batch, records.append), learner.update(batch)]
        assert learner.version == 2 and not learner.take_back()
        learner.save(place)
        learner.publish(place / "published")
        exported = learner.export(place / "model", tokenizer)
        logprobs = {item.name: getattr(with_logprobs, item.name) for item in fields(with_logprobs)}
        probed = learner.probe(torch.arange(2, 9))
        found.append((logprobs, metrics, updates, records, exported, probed))
    assert same(*found)
    for name in ("model.safetensors", "learner.safetensors", "published/model.safetensors", "model/model.safetensors"):
        assert same(*(load_file(tmp_path / place / name) for place in ("local", "remote"))), name
    ours, theirs = ({path.name for path in (tmp_path / place / "model").iterdir()} for place in ("local", "remote"))
    assert ours == theirs
    remote.load(tmp_path / "local")
    assert remote.version == 2 and same(remote.update(batch), local.update(batch))


def test_a_message_holds_any_state() -> None:
    state = {"a": [1.5, float("nan"), (None, "é\ud800")], "t": torch.arange(6).reshape(2, 3)[:, 1:], "empty": torch.zeros(0, 4)}
    back = from_bytes(to_bytes(state))
    assert same(back["t"], state["t"]) and same(back["empty"], state["empty"])
    assert str(back["a"]) == str(state["a"])


def test_errors_travel(host: LearnerProcess, remote: RemoteLearner, tmp_path: Path) -> None:
    batch = random_batch(make(host.recipe)[0].model)  # type: ignore[attr-defined]
    with pytest.raises(RunError, match="the learner failed: FileNotFoundError") as caught:
        remote.load(tmp_path)
    assert "local.py" in str(caught.value.__cause__)
    batch.prompts[0][0] = 10**9
    with pytest.raises(RunError, match="the learner failed: IndexError") as caught:
        remote.update(batch)
    assert "in _accumulate" in str(caught.value.__cause__)
    (tmp_path / "learner.json").mkdir()
    with pytest.raises(RunError, match=r"learner\.json: cannot be written: Is a directory") as caught:
        remote.save(tmp_path)
    assert type(caught.value).__name__ == "DiskError"


def test_what_is_wrong_with_a_recipe_is_said_by_the_first_call(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[model]\npath = "nowhere"\n')
    host = LearnerProcess(recipe)
    try:
        for _ in range(2):
            with pytest.raises(UserError, match=r"recipe\.toml.*model\.path.*nowhere"):
                _ = host.learner.version
    finally:
        host.stop()


def test_nobody_else_drives_it(host: LearnerProcess, remote: RemoteLearner) -> None:
    _ = remote.version
    assert httpx.get(f"{remote.address}/health").json()["pid"]
    with pytest.raises(LearnerLost, match="401"):
        RemoteLearner(remote.address, "a guess").begin_step()
    assert httpx.get(f"{remote.address}/calls/1").status_code == 401
    with pytest.raises(LearnerLost, match="404"):
        remote._call("weights")


SILENT = r"has not answered for 1 s \(cluster\.timeout\)"


@pytest.mark.parametrize(("number", "says"), [(signal.SIGKILL, "is gone: exit status -9"), (signal.SIGSTOP, SILENT)])
def test_a_dead_or_frozen_process_is_noticed(host: LearnerProcess, remote: RemoteLearner, number: int, says: str) -> None:
    remote.timeout = 1.0
    remote.connect(remote.address)
    batch = random_batch(make(host.recipe)[0].model)  # type: ignore[attr-defined]
    remote.begin_step()
    host.strike("update", number)
    started = time.monotonic()
    with pytest.raises(LearnerLost, match=says):
        _ = [remote.update(batch) for _ in range(1000)]
    assert time.monotonic() - started < 20
    with pytest.raises(LearnerLost):
        remote.begin_step()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ranks_of(host: LearnerProcess) -> list[int]:
    """What torchrun has started."""
    return [pid for torchrun in children(host.process.keeper.pid) for pid in children(torchrun)]


def test_two_processes_learn_as_one(host: LearnerProcess, tmp_path: Path) -> None:
    shutil.copy(host.recipe, recipe := tmp_path / "recipe.toml")
    local, tokenizer = make(recipe)
    batch = random_batch(local.model)  # type: ignore[attr-defined]
    two = LearnerProcess(recipe, processes=2)
    try:
        ours, theirs = (learner.update(batch) for learner in (local, two.learner))
        assert theirs.step["loss"] == pytest.approx(ours.step["loss"], rel=1e-5)
        assert theirs.step["grad_norm"] == pytest.approx(ours.step["grad_norm"], rel=1e-5)
        exported = [
            (learner.export(tmp_path / name, tokenizer), name) for learner, name in ((local, "one"), (two.learner, "two"))
        ]
        one, other = (load_file(tmp_path / name / "model.safetensors") for _, name in exported)
        assert all(torch.allclose(one[name], other[name], atol=2e-6) for name in one)
        os.kill(next(pid for pid in ranks_of(two) if pid != two.learner.health()["pid"]), signal.SIGKILL)
        with pytest.raises(LearnerLost):
            _ = [two.learner.update(batch) for _ in range(100)]
        two.restart()
        assert two.learner.update(batch) == theirs
    finally:
        two.stop()


def test_a_part_that_fails_in_one_of_two_processes_is_named(tmp_path: Path) -> None:
    """And the learner is not started again, which would not help."""
    recipe, part = tmp_path / "recipe.toml", tmp_path / "own.py"
    part.write_text(FAILS)
    recipe.write_text(RECIPE.replace("beta = 0.1", f'surrogate = "{part}:fails_on_one"'))
    two = LearnerProcess(recipe, processes=2)
    try:
        batch = random_batch(make(recipe)[0].model)  # type: ignore[attr-defined]
        with pytest.raises(RunError, match=r"process 1 of the learner: .*not with these rows") as failed:
            two.learner.update(batch)
        assert not isinstance(failed.value, LearnerLost)
    finally:
        two.stop()


FAILS = """
import os

def fails_on_one(terms):
    if os.environ.get("RANK") == "1":
        raise ValueError("not with these rows")
    return -terms.advantages_BT * terms.logprobs_BT, terms.logprobs_BT > 0
"""


# --- runs


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on time and processes."""
    drop = ("seconds/", "tokens_per_second", "memory/", "cluster/", "time")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.startswith(drop)} for line in lines]


def events(run: Path) -> list[str]:
    path = run / "events.jsonl"
    return [json.loads(line)["name"] for line in path.read_text().splitlines()] if path.exists() else []


def train(run: Path, launch: session.Launch = session.in_process, *more: str) -> None:
    session.run(session.plan(overrides=[*SETTINGS, *more], out=run), make_console(quiet=True), launch=launch)


def assert_same_run(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    for name in ("model/model.safetensors", "checkpoints/step-000006/learner.safetensors"):
        assert same(load_file(one / name), load_file(other / name)), name
    for place in ("rollouts", "tokens", "checkpoints"):
        assert sorted(p.name for p in (one / place).iterdir()) == sorted(p.name for p in (other / place).iterdir())
    for path in (one / "rollouts").iterdir():
        assert path.read_bytes() == (other / "rollouts" / path.name).read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(run)
    return run


class Strikes:
    """Kills a learner at chosen calls, counted over all its lives."""

    def __init__(self, **at: tuple[int, bool]) -> None:
        """Call -> (its how maniest, whether while it is being done: else just before)."""
        self.at, self.counts = at, dict.fromkeys(at, 0)
        self.done: list[str] = []

    def __call__(self, pieces: Apart) -> None:
        call = pieces.learner._call

        def struck(name: str, **arguments: Any) -> Any:
            self.counts[name] = self.counts.get(name, 0) + 1
            which, during = self.at.get(name, (0, False))
            if self.counts[name] == which:
                self.done.append(name)
                if during:
                    pieces.host.strike(name)
                    for _ in range(1000):  # on a busy machine a short call may be done before it is struck
                        call(name, **arguments)
                    raise AssertionError(f"no {name} was struck")
                pieces.host.send()
            return call(name, **arguments)

        pieces.learner._call = struck  # type: ignore[method-assign]


def test_a_learner_killed_five_times_ends_with_the_same_weights(undisturbed: Path, tmp_path: Path) -> None:
    """Before the first checkpoint, between two steps, while it loads a checkpoint, saves one, exports the model."""
    strikes = Strikes(update=(1, True), begin_step=(6, False), load=(1, False), save=(2, True), export=(1, True))
    train(tmp_path / "run", launcher(tmp_path / "pieces", strikes))
    assert sorted(strikes.done) == sorted(strikes.at)
    assert_same_run(tmp_path / "run", undisturbed)
    said = events(tmp_path / "run")
    assert said.count("learner_lost") == 5 and said[-1] == "learner_restarted"
    assert not list((tmp_path / "run").rglob(".partial-*"))
    last = [row for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) if "loss" in row][-1]
    assert last["cluster/learner_restarts"] == 4  # before the export


def test_a_learner_that_dies_too_often_ends_the_run(tmp_path: Path) -> None:
    def strikes(pieces: Apart) -> None:
        pieces.learner._call = dying(pieces, pieces.learner._call)  # type: ignore[method-assign]

    def dying(pieces: Apart, call: Callable[..., Any]) -> Callable[..., Any]:
        def struck(name: str, **arguments: Any) -> Any:
            if name == "begin_step":
                pieces.host.send()
            return call(name, **arguments)

        return struck

    with pytest.raises(RunError, match="was started 2 times"):
        train(tmp_path / "run", launcher(tmp_path / "pieces", strikes, most=1))
    assert events(tmp_path / "run") == ["learner_lost", "learner_restarted", "learner_lost", "failed"]


def test_a_killed_controller_goes_on_to_the_same_weights(undisturbed: Path, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, "-m", "tests.learner_processes", str(run), *SETTINGS]
    with log.open("wb") as file:
        controller = subprocess.Popen(command, stdout=file, stderr=file)
        deadline = time.monotonic() + 120
        while not (run / "checkpoints" / "step-000004").exists() and controller.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        controller.kill()
        controller.wait()
        shutil.rmtree(run / "model", ignore_errors=True)
        subprocess.run(command[:4], stdout=file, stderr=file, check=True, timeout=120)
    assert "goes on from checkpoints/step-00000" in log.read_text()
    assert_same_run(run, undisturbed)
