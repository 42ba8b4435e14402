"""Failures in every part of a step: one message, what was reached is saved, and a resumed run ends with the same bits."""

import contextlib
import errno
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import Result

from groupwise.errors import is_out_of_memory
from groupwise.files import DiskError
from groupwise.learner import optimiser
from groupwise.learner.local import LocalLearner
from groupwise.models import LanguageModel
from groupwise.training import loop, room
from groupwise.training.failures import explain, traceback_of
from groupwise.training.metrics_file import MetricsFile
from tests.test_cli import run

STEPS = 4
SMALL = [
    *("training.steps=4", "training.eval_problems=4", "training.eval_every=2", "training.tokens_every=0", "task.grades=[1,2]"),
    *("training.checkpoint_every=10", "rollouts.prompts_per_step=4", "rollouts.group_size=4", "rollouts.max_tokens=12"),
]
SETS = [part for item in SMALL for part in ("--set", item)]


def train(out: Path, *more: str) -> Result:
    return run("train", "grpo", *SETS, *(part for item in more for part in ("--set", item)), "--out", out)


def resume(out: Path) -> Result:
    return run("train", "--resume", out)


def saved(out: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*"))


def events(out: Path, name: str) -> list[dict[str, Any]]:
    path = out / "events.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["name"] == name]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step-{STEPS:06d}" / "model.safetensors")


def metrics(out: Path) -> list[dict[str, Any]]:
    timed = ("seconds", "memory", "tokens_per_second")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(timed)} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    result = train(out)
    assert result.exit_code == 0, result.output
    return out


def check_same_end(out: Path, whole: Path) -> None:
    result = resume(out)
    assert result.exit_code == 0, result.output
    theirs = weights(whole)
    assert all(torch.equal(value, theirs[name]) for name, value in weights(out).items())
    assert metrics(out) == metrics(whole)


class Fails:
    """Raises at one of the calls of a method, or at several."""

    def __init__(self, owner: Any, name: str, call: int, error: BaseException, after: bool = False, times: int = 1) -> None:
        """`after`: the method has done its work."""
        self.count, self.before = 0, getattr(owner, name)
        fails = self

        def method(*args: Any, **kwargs: Any) -> Any:
            fails.count += 1
            now = call <= fails.count < call + times
            if now and not after:
                raise error
            result = fails.before(*args, **kwargs)
            if now and after:
                raise error
            return result

        self.owner, self.name, self.method = owner, name, method

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.owner, self.name, self.method)
            yield


UPDATES = 4 * (STEPS - 2) + 1
"""The first update of step 3, of four updates each."""
BEFORE_ANY_CHANGE: dict[str, Callable[[], Fails]] = {
    "log-probabilities": lambda: Fails(LocalLearner, "compute_logprobs", 3, ZeroDivisionError("a bug")),
    "advantages": lambda: Fails(loop.CreditAssigner, "assign", 3, RuntimeError("a bug"), after=True),
    "first gradient": lambda: Fails(LocalLearner, "_gradient", UPDATES, SystemExit(0), after=True),
    "collecting": lambda: Fails(loop.Collector, "collect", 3, KeyError("a bug"), after=True),
}
LATER: dict[str, Callable[[], Fails]] = {
    "second gradient": lambda: Fails(LocalLearner, "_gradient", UPDATES + 1, RuntimeError("a bug")),
    "in the optimiser": lambda: Fails(torch.optim.AdamW, "step", UPDATES, RuntimeError("a bug")),
    "recording": lambda: Fails(MetricsFile, "append", 5, OSError(errno.EIO, "a bug")),
}


@pytest.mark.parametrize("place", BEFORE_ANY_CHANGE)
def test_what_fails_before_a_weight_changes_leaves_the_last_step(place: str, tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    with BEFORE_ANY_CHANGE[place]().failing():
        result = train(out)
    assert result.exit_code == 1 and saved(out) == [2], result.output
    assert "the run failed: step 3: " in result.stderr and "Traceback" not in result.output
    assert "stopped after step 2; to go on from step-000002" in result.stdout and "done again" not in result.stdout
    (fault,) = events(out, "failed")
    assert fault["kind"] == "fault" and "Traceback" in fault["traceback"] and fault["text"] in result.stderr
    check_same_end(out, whole)


@pytest.mark.parametrize("place", LATER)
def test_what_fails_when_weights_have_changed_leaves_the_last_checkpoint(place: str, tmp_path: Path, whole: Path) -> None:
    """No checkpoint mixes two steps: the one before is named, and what is done again comes out the same."""
    out = tmp_path / "run"
    with LATER[place]().failing():
        result = train(out, "training.checkpoint_every=1", "training.keep_checkpoints=9")
    assert result.exit_code == 1 and saved(out)[-1] == 2, result.output
    assert "to go on from step-000002" in result.stdout
    check_same_end(out, whole)


def test_steps_that_will_be_done_again_are_said(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    with Fails(LocalLearner, "_gradient", UPDATES + 5, RuntimeError("a bug")).failing():
        result = train(out, "training.checkpoint_every=2")
    said = f"stopped after step 3; to go on from step-000002: groupwise train --resume {out} (step 3 is done again)"
    assert said in result.stdout, result.output
    check_same_end(out, whole)


def test_an_evaluation_that_fails_leaves_the_step(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    with Fails(loop, "evaluate", 2, ValueError("a bug")).failing():
        result = train(out)
    assert result.exit_code == 1 and saved(out) == [2]
    assert "the evaluation after step 2: ValueError: a bug" in result.stderr
    check_same_end(out, whole)


def test_an_export_that_fails_can_be_done_again(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    with Fails(LocalLearner, "export", 1, ValueError("a bug")).failing():
        result = train(out)
    assert result.exit_code == 1 and saved(out)[-1] == STEPS and "a bug" in result.stderr
    check_same_end(out, whole)


def test_updates_that_are_not_finite_leave_the_last_step(tmp_path: Path, whole: Path) -> None:
    """Also their count: a resumed run may skip as many as one that begins."""
    out = tmp_path / "run"
    step, count = optimiser.Optimiser._step, 0

    def diverged(self: optimiser.Optimiser, loss: float) -> optimiser.Step:
        nonlocal count
        count += 1
        return step(self, float("nan") if count >= UPDATES else loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimiser.Optimiser, "_step", diverged)
        result = train(out, "learner.max_bad_updates=4")
    assert result.exit_code == 1 and saved(out) == [2], result.output
    assert "4 updates in a row had a loss or a gradient that is not finite" in result.stderr
    check_same_end(out, whole)


PARTS = {
    "raises": "raise ValueError('my own bug')",
    "exits": "import sys; sys.exit(0)",
    "text raises": "raise type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})()",
    "interrupts": "raise KeyboardInterrupt",
}


@pytest.mark.parametrize("how", PARTS)
def test_a_part_of_the_users_is_named_with_its_line(how: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (tmp_path / "mine.py").write_text(
        "import os\nfrom groupwise.algorithms import Credit\ndef advantage(o):\n"
        f"    if os.path.exists('{out}/rollouts/step-000001.txt'):\n        {PARTS[how]}\n"
        "    return Credit(advantages=o.rewards_B)\n"
    )
    result = train(out, f"algorithm.advantage={tmp_path}/mine.py:advantage")
    assert result.exit_code == 1, result.output
    assert f"algorithm.advantage = '{tmp_path}/mine.py:advantage': " in result.stderr and "(mine.py, line 5)" in result.stderr
    assert saved(out) == [1] and "to go on from step-000001" in result.stdout
    (fault,) = events(out, "failed")
    assert "mine.py" in fault["traceback"] and "Traceback" not in result.output


def test_memory_of_a_part_that_cannot_be_saved_is_found_after_the_first_step(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.CreditAssigner, "state_dict", lambda _: {"seen": object()})
        result = train(out)
    assert result.exit_code == 2 and "a part of the algorithm remembers object" in result.stderr, result.output
    assert [event["step"] for event in events(out, "failed")] == [1] and saved(out) == []


def test_a_resumed_run_takes_what_it_began_with_from_its_records(tmp_path: Path, whole: Path) -> None:
    """It loads no model for that."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    with pytest.MonkeyPatch.context() as patch:
        # The policy and GRPO's reference are loaded, and no third model.
        patch.setattr(LanguageModel, "load", Fails(LanguageModel, "load", 3, MemoryError()).method)
        result = resume(out)
    assert result.exit_code == 0 and "Examples" not in result.stdout, result.output
    (row,) = [line for line in result.stdout.splitlines() if "mean length" in line]
    assert f"{first['eval/length']:.1f}" in row and "?" not in row
    (out / "metrics.jsonl").unlink()
    lost = resume(out)
    (row,) = [line for line in lost.stdout.splitlines() if "mean length" in line]
    assert lost.exit_code == 0 and "?" in row


# --- disk


def test_a_full_disk_leaves_the_checkpoint_to_the_next_step(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    with Fails(loop.Trainer, "save", 1, DiskError("No space left on device")).failing():
        result = train(out, "training.checkpoint_every=2", "training.keep_checkpoints=9", "training.eval_every=10")
    assert result.exit_code == 0, result.output
    assert saved(out) == [3, 4]  # the one of step 2 came a step late
    (event,) = events(out, "disk_low")
    assert event["step"] == 2 and "tried again" in event["text"] and "training.keep_checkpoints" in event["advice"]
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(out).items())


def test_a_run_without_a_checkpoint_ends_where_none_can_be_written_and_is_begun_again(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    # Of step 2, twice, as its evaluation is the best so far, and after step 3.
    with Fails(loop.Trainer, "save", 1, DiskError("No space left on device"), times=3).failing():
        result = train(out, "training.checkpoint_every=2")
    assert result.exit_code == 1 and "no checkpoint can be written, and the run has none yet" in result.stderr
    assert saved(out) == []
    check_same_end(out, whole)


def test_a_disk_without_room_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, found = tmp_path, []
    checkpoint = out / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "file").write_bytes(bytes(100))
    free, written = [0], list[int]()
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    keeper = room.Room(out, lambda: written.append(free[0]), found.append)
    for free[0], fits in (
        (1000, True),
        (150, True),
        (150, True),
        (99, False),
        (99, False),
        (101, True),
        (500, True),
        (150, True),
    ):
        assert keeper.write(2, last=False) is fits and keeper.owed is not fits
    assert written == [1000, 150, 150, 101, 500, 150]
    assert ["nearly full" in event.text for event in found] == [True, False, True]  # each once until it has recovered
    free[0] = 50
    with pytest.raises(room.RunError, match="the last checkpoint, of step 4, cannot be written"):
        keeper.write(4, last=True)


# --- loading


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from groupwise.models.loading import resolve

    shutil.copytree(resolve("arithmetic-base"), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    name = sorted(name for name in tensors if "mlp" in name)[0]
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    result = train(tmp_path / "run", f"model.path={tmp_path}/model")
    assert result.exit_code == 2 and f"1 of {tensors[name].numel()} in {name}" in result.stderr, result.output


def test_errors_that_say_that_memory_is_short() -> None:
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50)
    assert is_out_of_memory(raised.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    for library in ("CUBLAS", "CUDNN"):
        assert is_out_of_memory(RuntimeError(f"CUDA error: {library}_STATUS_ALLOC_FAILED when calling `create(handle)`"))
    assert not is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))


@pytest.mark.parametrize("own", [ZeroDivisionError, SystemExit, KeyboardInterrupt])
def test_an_exception_whose_text_raises_is_explained(own: type[BaseException]) -> None:
    class Odd(RuntimeError):
        def __str__(self) -> str:
            raise own

    assert not is_out_of_memory(Odd())
    assert str(explain(Odd(), "step 3")) == f"step 3: Odd: its text raises {own.__name__} (no line is known)"
    assert traceback_of(Odd())
