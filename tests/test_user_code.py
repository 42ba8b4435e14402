"""Code of the user's that misbehaves: what runs elsewhere is set aside with its cause; what runs in the trainer ends it with one
message that names the key, and changes nothing of the process."""

import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from groupwise.algorithms import named
from groupwise.algorithms.part import settings_of
from groupwise.errors import RunError, UserError
from groupwise.guard import STATE, guarded, user_code
from groupwise.rewards import answers
from groupwise.rewards.answers import answer_line, any_final, last_boxed, last_number, last_tagged
from groupwise.rewards.code import BLOCK, program_of
from groupwise.rewards.settings import RewardSettings
from groupwise.rollouts.base import Request, Sampling
from groupwise.rollouts.samplers import GuardedSampler
from groupwise.training.events import Warned
from groupwise.training.trackers import Guarded, Tracker, make_trackers
from tests.conftest import said
from tests.misbehaviour_matrix import KINDS, MARK, PROBLEM, Source, check_all, left, left_after, share, write
from tests.misbehaviour_runs import RUNS, wrong_with

SHARE = {"reward": 3, "async reward": 1, "reset": 1, "tool": 2, "async tool": 1, "task score": 1}
"""How many ways of each group are tried here. `python -m tests.misbehaviour_matrix` tries all."""


@pytest.mark.parametrize("kind", SHARE)
def test_what_misbehaves_is_set_aside_in_time_with_its_cause(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kind in KINDS
    monkeypatch.setenv(MARK, kind)
    write(tmp_path)
    pairs = [pair for pair in share(kind, SHARE[kind]) if pair[1] != "memory"]
    assert asyncio.run(check_all(pairs, tmp_path, 4 if "task" not in kind else 1)) == []


def test_scoring_leaves_no_descriptor_thread_or_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, "rounds")
    write(tmp_path)
    settings = RewardSettings(reward=["code.py:reward", "code.py:reward_async", "math"], reward_workers=2)
    settings.open_rewards(Source(tmp_path / "r.toml", ""), tmp_path, prompt_key="prompt", answer_key="answer")

    async def scored(times: int) -> None:
        for _ in range(times):
            await asyncio.gather(*(settings.score(PROBLEM, [said("fine"), said("leave")]) for _ in range(4)))

    def held() -> tuple[int, int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), len(left("rounds"))

    for _ in range(50):  # until each of five workers, and its keeper, was needed
        asyncio.run(scored(1))
        if len(left("rounds")) == 10:
            break
    before = held()
    assert before[2] == 10
    asyncio.run(scored(50))
    after = held()  # descriptors of an earlier test may have been closed meanwhile
    assert after[0] <= before[0] and after[1:] == before[1:]
    settings._rewards = None
    assert not left_after("rounds")


TRAINER = """
import asyncio, os, sys
from pathlib import Path
from groupwise.workers import Pool, Target
os.environ["GROUPWISE_TEST"] = "killed"
pool = Pool(1)
for name in ("daemon", "daemon_keeps_pipes", "sleeper_session"):
    asyncio.run(pool.call(Target.in_file(Path(sys.argv[1]), name), limit=20))
print("there", flush=True)
asyncio.run(pool.call(Target.in_file(Path(sys.argv[1]), "sleep"), limit=60))
"""


def test_daemons_end_with_a_trainer_that_is_killed(tmp_path: Path) -> None:
    write(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", TRAINER, str(tmp_path / "code.py")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "there\n"
    ends = time.monotonic() + 20
    while len(left("killed")) < 5:  # keeper, worker, and what was started
        assert time.monotonic() < ends
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not left_after("killed")


def test_a_reward_that_signals_its_parent_hits_the_keeper(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os\ndef reward(problem, completions):\n    if completions == ['a']:\n        os.kill(os.getppid(), 9)\n"
        "    return [1.0]\n"
    )
    settings = RewardSettings(reward="mine.py:reward", reward_timeout=5)
    settings.open_rewards(Source(tmp_path / "r.toml", ""), tmp_path, prompt_key="prompt", answer_key="answer")
    (score,) = asyncio.run(settings.score(PROBLEM, [said("a")]))
    assert score.failure in (None, "died")
    time.sleep(0.2)
    (score,) = asyncio.run(settings.score(PROBLEM, [said("b")]))
    assert score.reward == 1.0


def test_math_shares_no_process_with_the_users_code(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import sys, types\ndef reward(problem, completions):\n"
        "    for name in ('math_answers', 'groupwise_user_math_answers', 'math_verify'):\n"
        "        sys.modules[name] = types.ModuleType(name)\n    return [0.0] * len(completions)\n"
    )
    settings = RewardSettings(reward=["mine.py:reward", "math"], reward_workers=1)
    settings.open_rewards(Source(tmp_path / "r.toml", ""), tmp_path, prompt_key="prompt", answer_key="answer")
    for _ in range(2):
        (score,) = asyncio.run(settings.score(PROBLEM, [said("a")]))
        assert score.failure is None, score


LONG = 60_000
TEXTS = [
    "<answer>",
    "####" + " " * LONG,
    "```" + " " * LONG,
    "```",
    "\\boxed{",
    "}",
    "\\",
    "#",
    "Answer:",
    "-",
    "```python ",
    "<answer>x",
]


@pytest.mark.parametrize("unit", TEXTS, ids=lambda text: text[:9].strip())
def test_answers_are_found_in_a_time_in_proportion_to_the_text(unit: str) -> None:
    """In the process that trains: a pattern that goes back over a text again and again would hold it up for minutes."""
    text = (unit * (LONG // len(unit) + 1))[: max(LONG, len(unit))]
    for find in (last_number, last_boxed, answer_line, last_tagged, any_final, program_of):
        began = time.thread_time()
        find(text)
        assert time.thread_time() - began < 1


def test_the_last_answer_is_what_it_was() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices(["<answer>", "</answer>", "a", " ", "\n"], k=rng.randint(0, 12)))
        found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
        assert last_tagged(text) == (found[-1].strip() if found else None)
        text = "".join(rng.choices(["####", " ", "$", "-", "1", ",", "."], k=rng.randint(0, 12)))
        found = re.findall(r"####\s*\$?\s*(-?[0-9.,]+)", text)
        assert answers.NUMBER.findall(text) == found
        text = "".join(rng.choices(["```", "python", "py", " ", "\n", "x"], k=rng.randint(0, 12)))
        assert BLOCK.findall(text) == re.findall(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)```", text, re.DOTALL)


# --- in the trainer's own process


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A part of an algorithm that misbehaves."""

    doing: Callable[[], Any]
    scale: float = 2.0
    per_token = True

    def __call__(self, value: float) -> float:
        self.doing()
        return self.scale * value

    def remember(self) -> None:
        self.doing()


class Rude(BaseException):
    def __str__(self) -> str:
        raise RuntimeError


def raise_it(error: BaseException) -> Any:
    def act() -> None:
        raise error

    return act


RAISED: dict[str, tuple[Any, str]] = {
    "exit": (lambda: sys.exit(0), r"SystemExit: 0 \(test_user_code.py, line \d+\)"),
    "exit with a text": (lambda: sys.exit("all is well"), "SystemExit: all is well"),
    "interrupt": (raise_it(KeyboardInterrupt()), "KeyboardInterrupt"),
    "generator's exit": (raise_it(GeneratorExit()), "GeneratorExit"),
    "rude": (raise_it(Rude()), r"Rude: \(its text cannot be had: RuntimeError\)"),
    "long": (raise_it(ValueError("x" * 10**6)), "ValueError: x+"),
    "cancelled": (raise_it(asyncio.CancelledError()), "CancelledError"),
}
CHANGED: dict[str, tuple[Any, str]] = {
    "dtype": (lambda: torch.set_default_dtype(torch.float64), "torch's default dtype from torch.float32 to torch.float64"),
    "gradients": (lambda: torch.set_grad_enabled(False), "torch's gradient mode from True to False"),
    "threads": (lambda: torch.set_num_threads(torch.get_num_threads() + 1), "torch's number of threads from"),
    "deterministic": (lambda: torch.use_deterministic_algorithms(True), "torch's deterministic mode"),
    "directory": (lambda: os.chdir("/"), "the working directory from .* to /"),
    "standard output": (lambda: os.close(1), "descriptor 1, which is standard output"),
    "another file": (lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2), "descriptor 2, which is standard error"),
    "handler": (lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN), "the handler of SIGTERM"),
}


@pytest.fixture
def handled() -> Iterator[None]:
    """As in a run, signals have handlers."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def state() -> list[Any]:
    streams = [os.fstat(number)[:3] for number in (0, 1, 2)]
    return [*(read() for read, _ in STATE.values()), *streams, signal.getsignal(signal.SIGTERM)]


@pytest.mark.usefixtures("handled")
@pytest.mark.parametrize("name", [*RAISED, *CHANGED])
def test_a_part_in_the_trainer_ends_in_one_message_and_changes_nothing(name: str) -> None:
    doing, message = (RAISED | CHANGED)[name]
    part = guarded(Part(doing=doing), "algorithm.advantage = 'test_user_code.py:Part'")
    before, descriptors = state(), len(list(Path("/proc/self/fd").iterdir()))
    for call in (lambda: part(1.0), part.remember):
        with pytest.raises(RunError, match=f"^algorithm.advantage = 'test_user_code.py:Part'(:| changed) {message}") as caught:
            call()
        assert len(str(caught.value)) < 3000 and state() == before
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors + 2 * (name == "another file")


def test_a_guarded_part_is_what_it_was() -> None:
    part = Part(doing=lambda: None)
    other = guarded(part, "x")
    assert isinstance(other, Part) and other(3.0) == 6.0 and other.scale == 2.0 and other.per_token
    function = guarded(lambda x: x + 1, "x")
    assert function(1) == 2
    with pytest.raises(RunError, match="x: ZeroDivisionError"):
        guarded(lambda: 1 / 0, "x")()
    estimator = guarded(named("grpo").advantage, "x")
    assert settings_of(estimator) == settings_of(named("grpo").advantage) and estimator.compares_group


@pytest.mark.usefixtures("handled")
def test_ctrl_c_and_memory_that_runs_out_are_not_the_parts_fault() -> None:
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt), user_code("x"):
        time.sleep(20)
    with pytest.raises(MemoryError), user_code("x"):
        raise MemoryError


class Engine:
    """A sampler that misbehaves."""

    def __init__(self, doing: Callable[[], Any], answers: bool) -> None:
        """`answers`: what it does is the answer."""
        self.doing, self.answers = doing, answers

    async def generate(self, request: Request) -> Any:
        await asyncio.sleep(0)
        found = self.doing()
        return found if self.answers else (said("a"), said("b"))

    def load(self, weights: Any, version: int) -> None:
        self.doing()


ANSWERS: dict[str, tuple[Any, str]] = {
    "nothing": (lambda: None, r"returned NoneType; expected a tuple of 2"),
    "too few": (lambda: (said("a"),), "returned 1 completions for a request of 2"),
    "texts": (lambda: ["a", "b"], "expected a tuple of 2"),
}


@pytest.mark.parametrize("name", [*RAISED, *CHANGED, *ANSWERS])
@pytest.mark.usefixtures("handled")
def test_a_sampler_of_the_users_own(name: str) -> None:
    doing, message = (RAISED | CHANGED | ANSWERS)[name]
    sampler, before = GuardedSampler(Engine(doing, name in ANSWERS), "rollouts.sampler = 'test_user_code.py:Engine'"), state()
    request = Request(prompt=torch.tensor([1]), sampling=Sampling(max_tokens=1), seed=0, n=2)

    async def ask() -> None:
        await asyncio.gather(*(sampler.generate(request) for _ in range(1 if name == "standard output" else 3)))

    with pytest.raises(RunError, match=rf"^rollouts.sampler = .*: generate\(\).*{message}"):
        asyncio.run(ask())
    assert state() == before
    if name not in ANSWERS:
        with pytest.raises(RunError, match=rf"^rollouts.sampler = .*: load\(\).*{message}"):
            sampler.load(None, 0)  # type: ignore[arg-type]


def test_a_tracker_takes_back_nothing_that_the_main_thread_changes() -> None:
    begun, changed = threading.Event(), threading.Event()

    class Slow:
        def record(self, event: Any) -> None:
            begun.set()
            assert changed.wait(5)

    before, notes = state(), list[str]()
    tracker = Guarded("slow", Slow(), notes.append, patience=5)  # type: ignore[arg-type]
    torch.set_default_dtype(torch.bfloat16)  # as transformers does while it loads a model
    try:
        tracker.record(Warned(step=1, text="x"))
        assert begun.wait(5)
        torch.set_default_dtype(torch.float32)
        changed.set()
        tracker.close()
        assert not notes and state() == before
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", RAISED)
def test_a_tracker_of_the_users_own(name: str, tmp_path: Path) -> None:
    doing, message = (RAISED | CHANGED)[name]
    before, notes = state(), list[str]()

    class Log:
        def record(self, event: Any) -> None:
            doing()

    def make(run: Path, recipe: Any) -> Any:
        doing()

    tracker = Guarded("mine", Log(), notes.append, patience=5)  # type: ignore[arg-type]
    tracker.record(Warned(step=1, text="x"))
    tracker.close()
    pattern = message.split(r" \(test")[0]
    assert len(notes) == 1 and re.search(f"tracker mine: .*{pattern}", notes[0]), notes
    with pytest.raises(UserError, match=f"^trackers.names: mine.*{pattern}"):
        make_trackers([Tracker("mine", make)], tmp_path, {})
    assert state() == before


# --- whole runs


@pytest.mark.parametrize("name", ["a reward kills its parent", "a part forks", "a task leaves"])
def test_a_run_ends_with_one_message_or_goes_on(name: str, tmp_path: Path) -> None:
    """`python -m tests.misbehaviour_runs` tries more."""
    assert name in RUNS and wrong_with(name, tmp_path) == ""
