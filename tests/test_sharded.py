"""A learner over several processes computes what one process computes, keeps the same checkpoints, and ends as a whole."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import groupwise
from groupwise.errors import UserError
from groupwise.files import Digest, sha256
from groupwise.learner.micro_batches import Budget, spread
from groupwise.learner.probing import probe
from groupwise.models import LanguageModel
from groupwise.types import Batch
from tests.sharded_cases import (
    CASES,
    CHECKPOINT,
    CHECKPOINTS,
    TEXT,
    after_updates,
    annotated,
    command,
    end,
    everything,
    learn,
    led,
    lost,
    new_batch,
    new_learner,
    skipped,
    small,
    start,
    state_of,
)
from tests.test_cli import run
from tests.test_learner import random_batch

RANKS = (2, 3)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the checkpoints of a single process, and then those of several."""
    path = tmp_path_factory.mktemp("sharded")
    found = {}
    for name, case in CHECKPOINTS.items():
        learner = after_updates(case)
        (path / "1" / name).mkdir(parents=True)
        learner.save(path / "1" / name)
        found[f"saved {name}"] = state_of(learner)
    torch.save(found, path / "1.pt")
    return path


@pytest.fixture(scope="module")
def sharded(directory: Path) -> dict[int, dict[str, Any]]:
    """What 2 and 3 processes have found; the 3 load what the 2 have saved."""
    found = {}
    for ranks in RANKS:
        sources = [str(number) for number in range(1, ranks)]
        codes = end(start(ranks, everything, directory, sources, log=directory / "log"), 500)
        assert codes == [0] * ranks, [(directory / f"log.{rank}").read_text()[-3000:] for rank in range(ranks)]
        found[ranks] = torch.load(directory / f"{ranks}.pt", weights_only=False)
    return found


@pytest.fixture(scope="module")
def local() -> dict[str, dict[str, Any]]:
    return {}


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks in RANKS for name in small(ranks)])
def test_several_processes_learn_what_one_learns(
    name: str, ranks: int, sharded: dict[int, dict[str, Any]], local: dict[str, dict[str, Any]]
) -> None:
    if name not in local:
        local[name] = learn(CASES[name])
    ours, theirs = sharded[ranks][name], local[name]
    # Where a last bit of float32 may round to another bfloat16 number; where all weights and what layers exchange are bfloat16.
    coarse = {"bfloat16": 1e3, "gathered in bfloat16": 3e3}.get(name, 1.0)
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
    if coarse == 1:
        for key, values in one.sums.items():
            assert mine.sums[key] == pytest.approx(values, rel=1e-4, abs=1e-5)
    assert [item[:2] for item in ours["records"]] == [item[:2] for item in theirs["records"]]
    for (_, _, values), (_, _, expected) in zip(ours["records"], theirs["records"], strict=True):
        width = min(len(values), len(expected))  # parts are as wide as their longest row
        torch.testing.assert_close(values[:width].float(), expected[:width].float(), rtol=1e-4 * coarse, atol=1e-5 * coarse)


@pytest.mark.parametrize("ranks", RANKS)
def test_an_update_that_is_not_finite_anywhere_is_skipped_everywhere(ranks: int, sharded: dict[int, dict[str, Any]]) -> None:
    assert sharded[ranks]["skipped"] == skipped() == {"skipped": 1.0, "same": True, "then": 1.0, "version": 1}


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether two learners are the same to the bit."""
    tensors = [pair for name in ("weights", "moments") for pair in zip(ours[name], theirs[name], strict=True)]
    return ours["counts"] == theirs["counts"] and all(torch.equal(a, b) for a, b in tensors)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_are_read_by_another_number_of_processes(
    name: str, directory: Path, sharded: dict[int, dict[str, Any]]
) -> None:
    one = torch.load(directory / "1.pt", weights_only=False)[f"saved {name}"]
    assert same(sharded[2][f"{name} of 1"], one)
    assert same(sharded[3][f"{name} of 1"], one)
    assert same(sharded[3][f"{name} of 2"], sharded[2][f"saved {name}"])
    for ranks in RANKS:
        learner = new_learner(CHECKPOINTS[name])
        learner.load(directory / str(ranks) / name)
        assert same(state_of(learner), sharded[ranks][f"saved {name}"])
        torch.testing.assert_close(learner.probe(TEXT), sharded[ranks][f"probe {name}"], rtol=0, atol=1e-5)
        files: dict[str, Digest] = sharded[ranks][f"files {name}"]
        assert len(files) == 2 * ranks + 1
        assert all(sha256(directory / str(ranks) / name / file) == digest for file, digest in files.items())
        sizes = [digest.bytes for file, digest in files.items() if file.startswith("model")]
        assert max(sizes) < 0.9 * sum(sizes)  # each process writes its part


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("ranks", RANKS)
def test_what_is_published_is_the_model(name: str, ranks: int, directory: Path, sharded: dict[int, dict[str, Any]]) -> None:
    model = LanguageModel.load(str(directory / str(ranks) / name / "published"))
    torch.testing.assert_close(probe(model, TEXT), sharded[ranks][f"probe {name}"], rtol=0, atol=1e-5)


def test_a_leader_is_a_learner_until_a_process_fails(tmp_path: Path) -> None:
    """Process 1 fails in the fifth update, the second after the checkpoint was read again."""
    codes = end(start(2, led, tmp_path, log=tmp_path / "log"), 200)
    assert codes == [0, 1], [(tmp_path / f"log.{rank}").read_text()[-3000:] for rank in range(2)]
    found = torch.load(tmp_path / "led.pt", weights_only=False)
    learner = new_learner(CHECKPOINT)
    minibatch = annotated(new_batch(CHECKPOINT, learner), learner)
    for update in found["updates"]:
        assert update.step == pytest.approx(learner.update(minibatch).step, rel=1e-4)
    assert found["again"].step == pytest.approx(found["updates"][-1].step, rel=1e-6)
    assert found["records"] > 1 and found["version"] == 3 and not found["taken back"]
    assert all(sha256(tmp_path / "led" / file) == digest for file, digest in found["files"].items())
    assert len(found["probes"]) == 4 and all(torch.equal(found["probes"][0], other) for other in found["probes"])
    cause = "process 1 of the learner: RuntimeError: this process has a fault"
    assert found["lost"] == f"RunError: {cause}; then the learner's processes have ended: {cause}"


LIMIT = 8.0
"""Seconds for which a process may stand still."""


@pytest.mark.parametrize(
    "how", ["killed", "stopped", "stopped while it saves", "its rows are refused", "without its leader", "closed"]
)
def test_no_process_outlives_the_others(how: str, tmp_path: Path) -> None:
    """Process 0 says so (5, or 6 where running again would not help), or was killed itself (-9); the others see it (1), but for
    one that stands still (None)."""
    stopped = how.startswith("stopped")
    processes = start(3, lost, how, LIMIT, log=tmp_path / "log")
    others = [process for i, process in enumerate(processes) if (stopped, i) != (True, 1)]
    codes = end(others, 150) if not stopped else [*end(others, 150), *end(processes[1:2], 0)]
    logs = [(tmp_path / f"log.{rank}").read_text() for rank in range(3)]
    if stopped:  # whoever sees it first ends at once
        assert codes in ([5, 1, None], [1, 1, None]), logs
        assert "process 1 of the learner stands still: it has not answered" in logs[0] + logs[2]
        return
    expected = {"killed": [5, -9, 1], "its rows are refused": [6, 1, 1], "without its leader": [-9, 1, 1], "closed": [3, 3, 3]}
    assert codes == expected[how], logs
    if how in ("killed", "its rows are refused"):
        *_, said, seconds = logs[0].splitlines()
        why = "a process of the learner has ended or does not answer"
        assert (why if how == "killed" else "process 1 of the learner: your surrogate fails on these rows") in said
        assert float(seconds) < LIMIT


# --- the cut


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("padded", [False, True])
def test_rows_are_spread_once_and_micro_batches_are_equally_many(any_model: Any, ranks: int, padded: bool) -> None:
    batch = random_batch(any_model)
    rows = spread(batch, ranks)
    assert len(rows) == ranks and sorted(torch.cat(rows).tolist()) == list(range(len(batch)))
    budgets = [Budget(20) for _ in range(ranks)]
    cuts = [list(one.cut(batch, padded=padded, rank=rank, ranks=ranks)) for rank, one in enumerate(budgets)]
    assert len({len(cut) for cut in cuts}) == 1
    counted = [row for cut in cuts for rows, counts in cut if counts for row in rows.tolist()]
    assert sorted(counted) == list(range(len(batch)))


def test_groups_stay_together_where_shares_stay_even() -> None:
    def batch(*sizes: int) -> Batch:
        total = sum(sizes)
        nothing = torch.zeros(total, 10)
        return Batch(
            rows_B=torch.arange(total),
            prompts=tuple(torch.ones(4, dtype=torch.long) for _ in sizes),
            group_ids_B=torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)),
            tokens_BT=nothing.long(),
            lengths_B=torch.full((total,), 10),
            mask_BT=nothing == 0,
            rollout_logprobs_BT=nothing,
        )

    assert [rows.tolist() for rows in spread(batch(3, 3), 2)] == [[0, 1, 2], [3, 4, 5]]
    assert [len(rows) for rows in spread(batch(4, 4, 4, 5), 2)] == [8, 9]
    assert [len(rows) for rows in spread(batch(8), 2)] == [4, 4]  # one group: its prompt is run by both
    assert [len(rows) for rows in spread(batch(1, 7), 2)] == [4, 4]
    assert [len(rows) for rows in spread(batch(1), 3)].count(1) == 1


# --- a run

SETTINGS = [
    "rollouts.prompts_per_step=4", "rollouts.group_size=4", "rollouts.max_tokens=12", "algorithm.name=grpo", "training.steps=3",
    "training.eval_problems=6", "learner.minibatches=2", "training.tokens_every=1",
]  # fmt: skip


def torchrun_of(*arguments: object) -> tuple[list[str], dict[str, str]]:
    """A command with its environment."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "groupwise", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "200"}
    settings = [part for item in SETTINGS for part in ("--set", item)]
    return [*words, *settings, *map(str, arguments)], environment


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    words, environment = torchrun_of(*arguments)
    return subprocess.run(words, env=environment, text=True, capture_output=True, timeout=300)


def test_a_run_over_torchrun_is_the_run_of_one_process(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    settings = [part for item in SETTINGS for part in ("--set", item)]
    assert run("train", *settings, "--out", one).exit_code == 0
    done = torchrun("--out", two)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the learner is sharded over the processes of torchrun") == 1
    assert done.stdout.count("step 3/3") == 1
    for step in (1, 2, 3):
        name = f"tokens/step-{step:06d}.parquet"
        ours, theirs = (pyarrow.parquet.read_table(path / name).to_pydict() for path in (two, one))
        for column in ("group", "row", "position", "token", "reward", "advantage"):
            assert ours[column] == theirs[column]
    weights, expected = (load_file(path / "model" / "model.safetensors") for path in (two, one))
    assert all(distance(weights[name], expected[name]) <= 1e-5 for name in expected)
    resumed = run("train", "--resume", two, "--set", "training.steps=4")  # in one process
    assert resumed.exit_code == 0, resumed.output
    assert "4/4" in resumed.output


def test_a_signal_to_torchrun_finishes_the_step_and_saves_it(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with (tmp_path / "log").open("w") as log:
        words, environment = torchrun_of("--set", "training.steps=1000", "--out", out)
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            limit = time.monotonic() + 200
            while not (out / "tokens" / "step-000001.parquet").exists() and time.monotonic() < limit:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            process.wait(100)
        finally:
            process.kill()
    said = (tmp_path / "log").read_text()
    assert "SIGTERM: finishing the step and saving it" in said and "groupwise train --resume" in said
    assert len(list((out / "checkpoints").glob("step-*"))) == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("model.compile=true", "cannot be sharded: set model.compile = false"),
        ("model.device='cpu:0'", "'cpu:0': processes of a run are given devices one by one"),
    ],
)
def test_what_is_wrong_is_said_once_and_ends_all_processes(wrong: str, said: str, tmp_path: Path) -> None:
    codes = end(start(2, command, "train", "--out", str(tmp_path / "run"), "--set", wrong, log=tmp_path / "log"), 200)
    first, second = ((tmp_path / f"log.{rank}").read_text() for rank in range(2))
    assert codes == [2, 2], first + second
    assert first.count(said) == 1
    assert said not in second and "Traceback" not in first + second


def test_other_commands_are_refused_under_torchrun(tmp_path: Path) -> None:
    for arguments in (("sft", "arithmetic-base"), ("eval", "anything")):
        codes = end(start(2, command, *arguments, log=tmp_path / "log"), 100)
        first, second = ((tmp_path / f"log.{rank}").read_text() for rank in range(2))
        assert codes == [2, 2] and first.count("torchrun has started 2 copies of this program") == 1 and not second


def test_a_script_under_torchrun_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match=r"and groupwise\.train\(\) would run in each of them"):
        groupwise.train(out=tmp_path / "run")
