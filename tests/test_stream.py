"""Asynchronous training, with the native engine in a thread of its own: bounds, order, what a kill leaves, what an error does."""

import asyncio
import dataclasses
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import groupwise
from groupwise.cluster import launch_of
from groupwise.config import Recipe, load
from groupwise.errors import LearnerLost, RunError, UserError
from groupwise.evidence.document import document
from groupwise.evidence.runs import open_run
from groupwise.rollouts.base import Request
from groupwise.state import read_state, write_state
from groupwise.terminal import Terminal
from groupwise.training import checkpoints, session
from groupwise.training.collect import Collector
from groupwise.training.interrupts import Interrupted
from groupwise.training.ledger import LEDGER, Entry, check, check_run, entries
from groupwise.training.loop import Trainer
from groupwise.training.records import RunDirectory
from groupwise.training.setup import Ready, prepare
from groupwise.training.stream import Stream
from groupwise.types import Completion
from tests.beside import Beside, beside, trainer_of
from tests.test_cli import run as run_command

SOURCES = Path(groupwise.__file__).parents[1], Path(__file__).parents[1]
SETTINGS: dict[str, Any] = {
    "algorithm.name": "grpo",
    "rollouts.group_size": 4,
    "rollouts.prompts_per_step": 4,
    "rollouts.max_tokens": 24,
    "training.steps": 4,
    "training.eval_every": 2,
    "training.eval_problems": 4,
    "training.tokens_every": 0,
    "learner.minibatches": 2,
}


@pytest.fixture(autouse=True)
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No thread is left: neither samplers' nor streams'."""
    pieces: list[Beside] = []
    made = Beside.__init__
    monkeypatch.setattr(Beside, "__init__", lambda self, *args, **more: (made(self, *args, **more), pieces.append(self))[0])
    yield
    for one in pieces:
        one.thread.close()


def ready_of(tmp_path: Path, **changes: Any) -> Ready:
    (tmp_path / "empty.toml").write_text("")
    named_changes = {key.replace("__", "."): value for key, value in changes.items()}
    recipe, source = load(tmp_path / "empty.toml", Recipe, (), {**SETTINGS, **named_changes})
    return prepare(recipe, source)


def stale(tmp_path: Path, staleness: int, window: int = 1, **changes: Any) -> Ready:
    more = {"cluster.window": window} if staleness else {}
    return ready_of(tmp_path, **{"cluster.samplers": 1, "cluster.staleness": staleness, **more, **changes})


def in_process(ready: Ready, path: Path, *, stream: bool) -> Trainer:
    """A trainer of a synchronous recipe in one process, whose groups come from a `Stream` or from a `Collector`."""
    directory = RunDirectory(path, ready.tokenizer)
    directory.create({})
    trainer = Trainer(ready, directory)
    if stream:
        trainer.collector = Stream(ready.rollouts(trainer.sampler), ready.recipe, ready.algorithm)
    return trainer


def ledger(path: Path) -> list[Entry]:
    return list(entries((path / LEDGER).read_bytes()))


def metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.learner.weights().module.state_dict().items()}  # type: ignore[attr-defined]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


# --- staleness 0


@pytest.mark.parametrize(
    "algorithm", [{}, {"algorithm.name": "dapo", "algorithm.dynamic_sampling": False}, {"algorithm.allocation": "hit_utility"}]
)
def test_staleness_0_is_the_synchronous_run_to_the_bit(tmp_path: Path, algorithm: dict[str, Any]) -> None:
    runs = []
    for stream in (False, True):
        trainer = in_process(ready_of(tmp_path, **algorithm), tmp_path / str(stream), stream=stream)
        trainer.train()
        runs.append(trainer)
    assert isinstance(runs[0].collector, Collector) and isinstance(runs[1].collector, Stream)
    assert same(weights(runs[0]), weights(runs[1]))
    assert (tmp_path / "False" / LEDGER).read_bytes() == (tmp_path / "True" / LEDGER).read_bytes()
    drop = ("seconds/", "tokens_per_second", "memory/", "cluster/")
    ours, theirs = (
        [{key: value for key, value in record.items() if not key.startswith(drop)} for record in metrics(tmp_path / name)]
        for name in ("True", "False")
    )
    assert ours == theirs


class Jittering:
    """A sampler whose answers come in another order each time."""

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler, self.random = sampler, random.Random(seed)

    async def generate(self, request: Request) -> tuple[Completion, ...]:
        found: tuple[Completion, ...] = await self.sampler.generate(request)
        await asyncio.sleep(self.random.random() / 20)
        return found


def test_with_dynamic_sampling_staleness_0_does_not_depend_on_the_timing(tmp_path: Path) -> None:
    """The first groups that are selected, in the order of their positions; a limit that is reached makes no difference."""
    for rounds in (10, 1):
        found = []
        for seed in range(2):
            path = tmp_path / f"{rounds}-{seed}"
            more = {"algorithm.name": "dapo", "rollouts.max_rounds": rounds, "task.grades": [4]}
            trainer = in_process(ready_of(tmp_path, **more), path, stream=True)
            assert isinstance(trainer.collector, Stream)
            jittering = Jittering(trainer.sampler, seed)
            trainer.collector.rollouts = dataclasses.replace(trainer.collector.rollouts, sampler=jittering)
            trainer.train()
            found.append((weights(trainer), (path / LEDGER).read_bytes()))
            assert check_run(path) == []
            batches = [entry.trained for entry in ledger(path)]
            assert all(len(batch) == 4 for batch in batches) if rounds == 10 else any(len(batch) < 4 for batch in batches)
            assert any(entry.dropped for entry in ledger(path))
        assert same(found[0][0], found[1][0]) and found[0][1] == found[1][1]


# --- staleness 1 and more


@pytest.mark.parametrize(("staleness", "window"), [(1, 1), (1, 6), (4, 1), (4, 9)])
def test_the_bound_is_never_exceeded_with_ragged_lengths(tmp_path: Path, staleness: int, window: int) -> None:
    ready = stale(tmp_path, staleness, window, **{"training.steps": 8, "training.eval_every": 8})
    trainer, pieces = trainer_of(ready, tmp_path / "run", delay=0.004)
    assert isinstance(trainer.collector, Stream)
    largest, updates = trainer.collector.admission.largest_age, 2
    ages: list[int] = []
    learn = trainer.learn

    def watched(batch: Any, collected: Any, *more: Any) -> Any:
        for group in collected.groups:
            for completion in group.completions:
                ages.append(trainer.learner.version - completion.oldest_version)
                assert sum(span.end - span.start for span in completion.versions) == len(completion.tokens)
        assert sorted(group.position for group in collected.groups) == [group.position for group in collected.groups]
        return learn(batch, collected, *more)

    trainer.learn = watched  # type: ignore[method-assign]
    trainer.train()
    steps = [record for record in metrics(tmp_path / "run") if "reward/mean" in record]
    assert max(record["cluster/age_max"] for record in steps) <= largest
    assert 0 < max(ages) <= updates * largest
    assert pieces.most <= (staleness + 1) * 4
    assert len(pieces.loops) == 1, "evaluations run where groups are made"
    found = ledger(tmp_path / "run")
    assert check(found) == [] and found[-1].begun == 32 and not found[-1].running and not found[-1].finished
    if window == 1:
        assert [entry.trained for entry in found] == [[4 * step + i for i in range(4)] for step in range(8)]


def test_completions_go_on_under_new_weights_and_say_which_made_which_tokens(tmp_path: Path) -> None:
    """Each token's log-probability is that of the version that is named, and so is what the ratio is taken against."""
    ready = stale(tmp_path, 2, **{"training.steps": 6, "training.eval_every": 6, "learner.learning_rate": 1e-3})
    trainer, pieces = trainer_of(ready, tmp_path / "run")
    pieces.hold(3)
    published, batches, groups = {0: weights(trainer)}, list[Any](), list[Any]()
    bring, compute, learn = pieces.bring_weights, trainer.learner.compute_logprobs, trainer.learn

    def learning(batch: Any, collected: Any, *more: Any) -> Any:
        pieces.learns = True
        batches.append(batch)
        groups.append(collected.groups)
        time.sleep(0.1)
        return learn(batch, collected, *more)

    def bring_and_keep() -> None:
        bring()
        published[trainer.learner.version] = weights(trainer)

    trainer.learn, pieces.bring_weights = learning, bring_and_keep  # type: ignore[method-assign]
    trainer.train()
    mixed = [c for of_step in groups for group in of_step for c in group.completions if len(c.versions) > 1]
    assert mixed, "weights came while completions were under way"
    for batch, of_step in zip(batches, groups, strict=True):
        completions = [completion for group in of_step for completion in group.completions]
        for version in {span.version for completion in completions for span in completion.versions}:
            trainer.learner.weights().module.load_state_dict(published[version])  # type: ignore[attr-defined]
            found_BT = compute(batch)[0].old_logprobs_BT
            for row, completion in enumerate(completions):
                for span in completion.versions:
                    if span.version == version:
                        ours, theirs = (of[row, span.start : span.end] for of in (batch.rollout_logprobs_BT, found_BT))
                        assert torch.allclose(ours, theirs, atol=1e-4)


def test_the_lengths_that_are_trained_on_do_not_depend_on_the_bound(tmp_path: Path) -> None:
    """With a learning rate of 0 the weights stay, so that groups are the same whenever they are made: not one is left out because
    it came late, though the longest come last by far."""
    found = []
    for staleness, window in ((0, 1), (1, 1), (4, 1), (4, 16)):
        more = {"learner.learning_rate": 0.0, "training.steps": 6, "training.eval_every": 6, "rollouts.group_size": 2}
        path = tmp_path / f"{staleness}-{window}"
        trainer, _ = trainer_of(stale(tmp_path, staleness, window, **more), path, delay=0.005)
        lengths: list[int] = []
        learn = trainer.learn
        trainer.learn = lambda batch, *more, learn=learn, lengths=lengths: (  # type: ignore[method-assign,misc]
            lengths.extend(batch.lengths_B.tolist()), learn(batch, *more))[1]  # fmt: skip
        trainer.train()
        assert len(set(lengths)) > 4, "they are ragged"
        found.append(sorted(lengths))
    assert all(lengths == found[0] for lengths in found)


@pytest.mark.parametrize(
    "settings", [{"algorithm.name": "dcpo"}, {"algorithm.allocation": "thompson", "algorithm.candidates": 2.0}]
)
def test_histories_count_each_group_once(tmp_path: Path, settings: dict[str, Any]) -> None:
    more = {"algorithm.dynamic_sampling": True, "task.grades": [3, 4], "training.steps": 4, **settings}
    trainer, _ = trainer_of(stale(tmp_path, 2, 3, **more), tmp_path / "run", delay=0.002)
    trainer.train()
    used = [position for entry in ledger(tmp_path / "run") for of in (entry.trained, *entry.dropped.values()) for position in of]
    assert check_run(tmp_path / "run") == []
    if settings.get("algorithm.name") == "dcpo":
        assert sum(entry["visits"] for entry in trainer.credit.history.values()) == len(used)
    else:
        assert sum(a + b - 2 for a, b in trainer.collector.supply.history.values()) == 4 * len(used)


# --- what is saved


def test_a_state_holds_what_is_under_way(tmp_path: Path) -> None:
    """Another process goes on with the same positions, problems and random numbers, and with what was finished."""
    ready = stale(tmp_path, 2, **{"training.steps": 6, "algorithm.allocation": "thompson", "algorithm.candidates": 2.0})
    trainer, _ = trainer_of(ready, tmp_path / "one", delay=0.03)
    trainer.train_step()
    state = trainer.collector.state_dict()
    assert state["running"], "something is under way"
    write_state(tmp_path / "state", state)
    orders: dict[int, tuple[str, int]] = {}
    other, _ = trainer_of(stale(tmp_path, 2, **{"training.steps": 6}), tmp_path / "two")
    assert isinstance(trainer.collector, Stream) and isinstance(other.collector, Stream)
    known = {position: item.drawn.problem.id for position, item in trainer.collector._running.items()}
    other.collector.load_state_dict(read_state(tmp_path / "state"))
    order = other.collector.supply.order

    def seen(drawn: Any, position: int) -> Any:
        made = order(drawn, position)
        orders[position] = made.problem.id, made.draw.seed
        return made

    other.collector.supply.order = seen  # type: ignore[method-assign]
    collected = other.collector.collect(1)
    assert [group.position for group in collected.groups] == [4, 5, 6, 7]
    for position, problem in known.items():
        assert orders.get(position, (problem, 0))[0] == problem
    positions = [position for position, _, _ in state["running"]]
    assert sorted(orders)[: len(positions)] == positions, "what ran is begun again, first"
    for one in (trainer, other):
        one.collector.close()


def test_a_step_that_fails_is_taken_back(tmp_path: Path) -> None:
    """It is saved, and the groups that it had taken wait for it again."""
    ready = stale(tmp_path, 1)
    trainer, _ = trainer_of(ready, tmp_path / "run", delay=0.002)
    compute, calls = trainer.learner.compute_logprobs, []

    def failing(batch: Any) -> Any:
        calls.append(batch)
        if len(calls) == 3:
            raise RuntimeError("a cable was pulled")
        return compute(batch)

    trainer.learner.compute_logprobs = failing  # type: ignore[method-assign]
    with pytest.raises(RunError, match="step 3: RuntimeError: a cable was pulled"):
        trainer.train()
    assert (
        sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.startswith("step"))[-1]
        == "step-000002"
    )
    state = read_state(tmp_path / "run" / "checkpoints" / "step-000002" / "state")["collector"]
    under_way = [tree["position"] for _, _, tree in state["finished"]] + [position for position, _, _ in state["running"]]
    assert sorted(under_way) == list(range(8, state["begun"])), "positions 0 to 7 were used up by two steps"


def test_what_fails_in_the_background_ends_the_run(tmp_path: Path) -> None:
    for number, error in enumerate((RuntimeError("the engine broke"), SystemExit(3))):
        trainer, pieces = trainer_of(stale(tmp_path, 1), tmp_path / str(number), delay=0.002)
        generate, calls = pieces.generate, []

        async def failing(request: Request, generate: Any = generate, calls: Any = calls, error: Any = error) -> Any:
            calls.append(request)
            if len(calls) > 12:
                raise error
            return await generate(request)

        trainer.collector.rollouts = dataclasses.replace(
            trainer.collector.rollouts, sampler=type("S", (), {"generate": staticmethod(failing)})()
        )
        with pytest.raises(RunError, match=f"{type(error).__name__}: {error}"):
            trainer.train()
        assert not trainer.collector.thread._thread.is_alive()  # type: ignore[union-attr]


def test_a_run_whose_scores_all_fail_stops_and_can_go_on(tmp_path: Path) -> None:
    """The groups that failed are dropped, and others are begun for them."""
    (tmp_path / "data.jsonl").write_text("".join(f'{{"prompt": "{i}+1=", "answer": "{i + 1}"}}\n' for i in range(30)))
    code = "def late(completions, trainer_state, **_):\n    if trainer_state.global_step == {}: raise ValueError('away')\n"
    code += "    return [float(len(text)) for text in completions]\n"
    (tmp_path / "mine.py").write_text(code.format(2))
    task = {"name": "dataset", "path": str(tmp_path / "data.jsonl"), "reward": f"{tmp_path}/mine.py:late"}
    more = {"task": task, "rollouts.max_failed_groups": 3, "training.steps": 5, "training.eval_every": 5}
    trainer, pieces = trainer_of(stale(tmp_path, 1, **more), tmp_path / "run")
    with pytest.raises(RunError, match=r"failed for every completion of 3 groups in a row: 4 raised; .*ValueError: away"):
        trainer.train()
    (tmp_path / "mine.py").write_text(code.format(99))
    again = Trainer(stale(tmp_path, 1, **more), RunDirectory(tmp_path / "run", None), pieces=pieces)
    checkpoint, _ = checkpoints.newest(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None and checkpoint.step in (2, 3)
    again.resume(checkpoint)
    again.train()
    found = ledger(tmp_path / "run")
    assert check(found) == [] and [entry.step for entry in found] == [1, 2, 3, 4, 5]
    assert sum(len(entry.dropped.get("failed", ())) for entry in found) >= 3


def lines(run: Path) -> int:
    return len((run / LEDGER).read_bytes().splitlines()) if (run / LEDGER).exists() else 0


def test_a_killed_run_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """SIGKILL with groups under way and records after the last checkpoint; resumed, stopped by a signal, and resumed again."""
    (tmp_path / "r.toml").write_text("")
    run, changes = tmp_path / "run", {**SETTINGS, "training.steps": 10, "training.checkpoint_every": 4, "training.eval_every": 10}
    changes |= {"cluster.samplers": 1, "cluster.staleness": 2, "cluster.window": 3, "algorithm.name": "dapo"}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, SOURCES)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.beside", run, tmp_path / "r.toml"]
    settings = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    process = subprocess.Popen([*command, *settings], env=environment, stdout=subprocess.DEVNULL)
    while lines(run) < 6:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    with pytest.raises(Interrupted):
        session.run(session.plan(resume=run), Terminal(quiet=True), launch=lambda *of: beside(*of, stop_after=6))
    assert check_run(run) == []
    session.run(session.plan(resume=run), Terminal(quiet=True), launch=beside)
    found = ledger(run)
    assert check(found) == [] and [entry.step for entry in found] == list(range(1, 11))
    assert max(record["cluster/age_max"] for record in metrics(run) if "reward/mean" in record) <= 3


def test_a_learner_that_is_lost_costs_no_group(tmp_path: Path) -> None:
    """It is started again, and the run goes back to its last checkpoint while groups are under way."""
    more = {"training.steps": 8, "training.checkpoint_every": 3, "training.eval_every": 8, "algorithm.name": "dapo"}
    trainer, pieces = trainer_of(stale(tmp_path, 2, 2, **more), tmp_path / "run", delay=0.01)
    calls: list[int] = []

    def losing() -> None:
        update = pieces.learner.update

        def update_or_die(*of: Any) -> Any:
            calls.append(trainer.step)
            if len(calls) in (5, 13, 16):
                raise LearnerLost("the learner is gone")
            return update(*of)

        pieces.learner.update = update_or_die  # type: ignore[method-assign]

    losing()
    restart = pieces.restart_learner
    pieces.restart_learner = lambda: (restart(), pieces.learner.__dict__.pop("update"), losing())[0]  # type: ignore[method-assign]
    trainer.train()
    found = ledger(tmp_path / "run")
    assert check(found) == [] and [entry.step for entry in found] == list(range(1, 9))
    assert len(calls) > 16 + 3, "updates were made again"
    assert max(record["cluster/age_max"] for record in metrics(tmp_path / "run") if "reward/mean" in record) <= 3
    said = run_command("ledger", tmp_path / "run")
    assert said.exit_code == 0 and "8 steps, " in said.stdout and "used up exactly once" in said.stdout
    with (tmp_path / "run" / LEDGER).open("ab") as file:
        file.write(dataclasses.replace(found[-1], step=9).line)
    said = run_command("ledger", tmp_path / "run")
    assert said.exit_code == 1 and "was used up before, or never begun" in said.stderr.replace("\n", " ")
    assert {"age", "queues", "idle"} <= {figure["id"] for figure in document([open_run(tmp_path / "run")])["figures"]}


def test_a_synchronous_run_goes_on_asynchronously_and_not_back(tmp_path: Path) -> None:
    path, more = tmp_path / "run", {"algorithm.name": "dapo", "rollouts.max_age": 3, "task.grades": [1, 2]}
    first = in_process(ready_of(tmp_path, **more, **{"training.steps": 2}), path, stream=False)
    first.train()
    kept = [group.position for _, group in first.collector.surplus]  # type: ignore[union-attr]
    more["rollouts.max_age"] = 0
    ready = stale(tmp_path, 1, **more)
    checkpoint, _ = checkpoints.newest(path / "checkpoints")
    assert checkpoint is not None
    second = Trainer(ready, RunDirectory(path, None), pieces=Beside(ready))
    second.resume(checkpoint)
    second.train()
    found = ledger(path)
    assert check(found) == [] and [entry.step for entry in found] == [1, 2, 3, 4]
    assert found[2].dropped.get("surplus", []) == kept != []
    checkpoint, _ = checkpoints.newest(path / "checkpoints")
    assert checkpoint is not None
    third = in_process(ready_of(tmp_path, **more), tmp_path / "third", stream=False)
    with pytest.raises(UserError, match=r"cluster.staleness: cannot become 0 in a run that was above it"):
        third.resume(checkpoint)


def test_a_state_whose_groups_would_be_too_old_under_new_settings_is_refused(tmp_path: Path) -> None:
    """A lower bound, or smaller batches. With the same settings, or a higher bound, the run goes on."""
    more = {"training.steps": 6, "training.eval_every": 6}
    trainer, _ = trainer_of(stale(tmp_path, 4, **more), tmp_path / "one", delay=0.002)
    trainer.train_step()
    state = trainer.collector.state_dict()
    trainer.collector.close()
    assert len(state["running"]) + len(state["finished"]) == 20
    for changes, fits in (({}, True), ({"cluster.staleness": 5}, True), ({"cluster.staleness": 1}, False)):
        other, _ = trainer_of(stale(tmp_path, 4, **{**more, **changes}), tmp_path / str(changes))
        if fits:
            other.collector.load_state_dict(state)
        else:
            with pytest.raises(UserError, match=r"^cluster.staleness: 20 groups under way .* more than 1 steps"):
                other.collector.load_state_dict(state)
        other.collector.close()
    other, _ = trainer_of(stale(tmp_path, 4, **more, **{"rollouts.prompts_per_step": 2}), tmp_path / "two")
    with pytest.raises(UserError, match=r"leave cluster.staleness, cluster.window and rollouts.prompts_per_step as they were"):
        other.collector.load_state_dict(state)
    other.collector.close()


def test_a_run_that_finds_no_group_can_go_on_with_other_problems(tmp_path: Path) -> None:
    """What was refused before does not count against the limit again, and is used up by the next batch."""
    easy = {"algorithm.name": "dapo", "rollouts.max_rounds": 2, "rollouts.max_failed_groups": 99, "training.steps": 2}
    (tmp_path / "data.jsonl").write_text("".join(f'{{"prompt": "{i}+1=", "answer": "{i + 1}"}}\n' for i in range(30)))
    (tmp_path / "mine.py").write_text("def same(completions, **_):\n    return [1.0] * len(completions)\n")
    task = {"name": "dataset", "path": str(tmp_path / "data.jsonl"), "reward": f"{tmp_path}/mine.py:same"}
    trainer, pieces = trainer_of(stale(tmp_path, 1, **easy, task=task), tmp_path / "run")
    with pytest.raises(RunError, match=r"step 1: dynamic sampling found 0 groups to train on"):
        trainer.train()
    code = "def same(completions, **_):\n    return [float(i) for i in range(len(completions))]\n"
    (tmp_path / "mine.py").write_text(code)
    ready = stale(tmp_path, 1, **easy, task=task)
    again = Trainer(ready, RunDirectory(tmp_path / "run", None), pieces=pieces)
    checkpoint, _ = checkpoints.newest(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 0
    again.resume(checkpoint)
    again.train()
    found = ledger(tmp_path / "run")
    assert check(found) == [] and [entry.step for entry in found] == [1, 2]
    assert sum(map(len, found[0].dropped.values())) >= 8


def test_a_synchronous_run_that_goes_on_asynchronously_corrects_what_is_stale(tmp_path: Path) -> None:
    """Its settings hold the synchronous default, which nobody chose."""
    (tmp_path / "r.toml").write_text("")
    changes = {**SETTINGS, "training.steps": 1, "training.eval_every": 1, "cluster.samplers": 1}
    session.run(session.plan(tmp_path / "r.toml", out=tmp_path / "run", changes=changes), Terminal(quiet=True), launch=beside)
    for asked, correction in (({}, "tis"), ({"algorithm.correction": "none"}, "none")):
        given = {"cluster.staleness": 1, "training.steps": 2, **asked}
        plan = session.plan(resume=tmp_path / "run", changes=given)
        assert plan.resumption is not None
        plan.resumption.lock.close()
        ready = prepare(plan.recipe, plan.source)
        assert ready.algorithm.choice("correction") == correction
        assert any("algorithm.correction" in hint for hint in ready.hints()), "it is said"


def test_samplers_that_die_cost_no_group(tmp_path: Path) -> None:
    """Two processes of `groupwise serve`, one of which is killed with requests under way: the other makes them again."""
    (tmp_path / "r.toml").write_text("")
    changes = {**SETTINGS, "training.steps": 14, "training.eval_every": 14, "cluster.samplers": 2, "cluster.staleness": 1}
    changes |= {"rollouts.max_tokens": 64, "rollouts.group_size": 16}
    plan = session.plan(tmp_path / "r.toml", out=tmp_path / "run", changes=changes)

    def kill() -> None:
        while lines(tmp_path / "run") < 2:
            time.sleep(0.01)
        children = psutil.Process().children(recursive=True)
        serving = [child for child in children if "serve" in child.cmdline() and "--port" in child.cmdline()]
        max(serving, key=lambda child: child.pid).kill()

    killing = threading.Thread(target=kill)
    killing.start()
    session.run(plan, Terminal(quiet=True), launch=launch_of(plan.recipe))
    killing.join()
    found = ledger(tmp_path / "run")
    assert check(found) == [] and len(found) == 14
    steps = [record for record in metrics(tmp_path / "run") if "reward/mean" in record]
    assert any(entry.attempts for entry in found) or not any(record["cluster/reissued"] for record in steps)
    assert any("cluster/idle/sampler_1" in record for record in steps)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert events, "it is said that one died"


# --- the ledger


def test_a_ledger_that_is_wrong_is_found_out() -> None:
    def entry(step: int, trained: list[int], begun: int, **more: Any) -> Entry:
        return Entry(step=step, trained=trained, begun=begun, **{"running": [], "finished": [], **more})

    good = [
        entry(1, [0, 2], 6, dropped={"failed": [1]}, running=[3, 5], finished=[4], attempts={2: 3}),
        entry(2, [3, 4], 7, running=[5, 6]),
    ]
    assert check(good) == [] and [Entry.read(one.line) for one in good] == good
    for change, problem in (
        ({"trained": [0, 4]}, "step 2: group 0 is trained on, and was used up before, or never begun"),
        ({"trained": [4, 5]}, "step 2: group 3 is lost"),
        ({"dropped": {"failed": [3]}}, "step 2: group 3 is dropped (failed), and was used up before, or never begun"),
        ({"running": [5]}, "step 2: group 6 is lost"),
        ({"finished": [0]}, "step 2: group 0 is under way again"),
        ({"finished": [5]}, "step 2: a group is listed twice among those under way"),
        ({"begun": 5, "running": [5]}, "step 2: 5 groups were begun, and 6 before it"),
        ({"step": 3}, "step 3 comes after step 1"),
    ):
        assert problem in check([good[0], dataclasses.replace(good[1], **change)])


def test_a_ledger_is_cut_where_a_run_goes_on(tmp_path: Path) -> None:
    trainer = in_process(ready_of(tmp_path), tmp_path / "run", stream=False)
    trainer.train()
    path = tmp_path / "run" / LEDGER
    content = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"step":5,"tra')
    assert trainer.run_directory.ledger.rewind(3) is None
    assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[:3])
    path.write_bytes(content.replace(b'"step":2', b'"step":"x"'))
    said = trainer.run_directory.ledger.rewind(3)
    assert said == f"{LEDGER} is damaged; it is kept as ledger.damaged-1.jsonl; 1 of steps 1 to 3 are lost"
    lost = "2 steps are recorded in metrics.jsonl alone, the first of them step 2"
    assert check_run(tmp_path / "run") == ["step 3 comes after step 1", lost]


# --- importance sampling


def test_stale_tokens_are_corrected_unless_the_recipe_says_otherwise(tmp_path: Path) -> None:
    default = stale(tmp_path, 1)
    assert default.algorithm.choice("correction") == "tis"
    assert default.hints() == [
        "cluster.staleness = 1: groups may be sampled with weights of earlier steps, so algorithm.correction = 'tis' weighs "
        'tokens; "none" leaves it out'
    ]
    none = stale(tmp_path, 1, **{"algorithm.correction": "none"})
    assert none.algorithm.choice("correction") == "none" and "as if the newest had sampled them" in none.hints()[0]
    own = stale(tmp_path, 1, **{"algorithm.correction": "icepop"})
    assert own.algorithm.choice("correction") == "icepop" and own.hints() == []
    sampler = stale(tmp_path, 1, **{"learner.old_logprobs": "sampler"})
    assert sampler.algorithm.choice("correction") == "none" and sampler.hints() == []
    assert ready_of(tmp_path).algorithm.choice("correction") == "none"
    with pytest.raises(UserError, match=r"rollouts.max_age.*: with cluster.staleness above 0 no selected group"):
        stale(tmp_path, 1, **{"algorithm.name": "dapo", "rollouts.max_age": 2})


def test_corrected_and_masked_stale_groups_give_the_gradient_that_the_formulas_say(tmp_path: Path) -> None:
    """The first update of a step on groups of older weights: sum of w A over unmasked tokens, w = min(pi_old/pi_rollout, 2)."""
    more = {
        "algorithm.mask": "off_policy",
        "algorithm.mask_divergence": 0.05,
        "learner.minibatches": 1,
        "learner.learning_rate": 1e-3,
    }
    trainer, _ = trainer_of(stale(tmp_path, 1, **more, **{"algorithm.beta": 0.0}), tmp_path / "run")
    trainer.train_step()
    update, seen = trainer.learner.update, []
    trainer.learner.update = lambda batch, record: (seen.append((batch, update(batch, record))), seen[-1][1])[1]  # type: ignore[method-assign]
    trainer.train_step()
    ((batch, done),) = seen
    mask_BT, advantages_BT = batch.mask_BT, batch.advantages_BT
    log_BT = torch.where(mask_BT, batch.old_logprobs_BT - batch.rollout_logprobs_BT, 0)
    weight_BT = log_BT.exp().clamp(max=2)
    moved_B = -log_BT.sum(1) / mask_BT.sum(1).clamp(min=1)
    keep_BT = ~((advantages_BT < 0) & (moved_B > 0.05)[:, None])
    run_BT = mask_BT & (advantages_BT != 0).any(1, keepdim=True)
    assert (weight_BT[mask_BT] != 1).any() and (~keep_BT & run_BT).any(), "there is something to correct and to mask"
    assert done.means["correction_mean"] == pytest.approx(float(weight_BT[run_BT].mean()), rel=1e-4)
    assert done.means["masked_fraction"] == pytest.approx(float((~keep_BT)[run_BT].float().mean()), rel=1e-4)
    tokens_BT = weight_BT * advantages_BT * keep_BT * mask_BT / mask_BT.sum(1, keepdim=True).clamp(min=1)
    assert done.step["loss"] == pytest.approx(-float(tokens_BT.sum() / mask_BT.any(1).sum()), rel=1e-3)
    trainer.collector.close()
