"""Real signals to real runs, at each of the places where a run can be; and runs whose terminal goes away."""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from groupwise.training.interrupts import Interrupt, Interrupted, interruptible
from tests.launcher import Launcher, Running

SMALL = ["train", "grpo"]
for item in (
    *("training.steps=5000", "training.eval_every=5000", "training.eval_problems=4", "training.tokens_every=0"),
    *("rollouts.prompts_per_step=2", "rollouts.group_size=4", "rollouts.max_tokens=8"),
    *("learner.minibatches=1", "model.backend=torch"),  # no kernels, each of which takes half a second to compile
):
    SMALL += ["--set", item]
INT, TERM, HUP, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    made = Launcher()
    yield made
    made.close()


def begun(out: Path, step: int = 1) -> Path:
    """A file that exists when a step is done."""
    return out / "rollouts" / f"step-{step:06d}.txt"


def events(out: Path) -> list[dict[str, Any]]:
    path = out / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def check_stopped(process: Running, out: Path, code: int) -> None:
    """It ended with this code after a complete step, whose checkpoint it names."""
    assert process.ends() == code, process.text
    last = max(path.name for path in (out / "checkpoints").glob("step-*"))
    done = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert int(last.removeprefix("step-")) == done[-1] > 0
    assert f"to go on from {last}: groupwise train --resume {out}" in process.text
    assert "done again" not in process.text and "Traceback" not in process.text
    assert not list((out / "checkpoints").glob(".partial*"))


@pytest.mark.parametrize(("number", "code"), [(INT, 130), (TERM, 143), (HUP, 143)])
def test_the_first_signal_finishes_the_step_and_saves_it(launcher: Launcher, tmp_path: Path, number: int, code: int) -> None:
    out = tmp_path / "run"
    process = launcher.start([*SMALL, "--out", out], tmp_path / "log")
    process.wait_for(begun(out))
    process.send(number)
    check_stopped(process, out, code)


def test_sigusr1_saves_and_the_run_goes_on(launcher: Launcher, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = launcher.start([*SMALL, "--out", out], tmp_path / "log")
    process.wait_for(begun(out))
    process.send(USR1)
    process.wait_for(lambda: any(event["name"] == "saved_on_signal" for event in events(out)))
    saved = next(event for event in events(out) if event["name"] == "saved_on_signal")
    assert (out / "checkpoints" / f"step-{saved['step']:06d}").is_dir() and saved["kind"] == "note"
    process.wait_for(begun(out, saved["step"] + 2))
    process.send(TERM)
    check_stopped(process, out, 143)


DATASET = ["--set", "task.name=dataset", "--set", "task.path={here}/data.jsonl", "--set", "task.reward_timeout=1000"]
HANGS: dict[str, tuple[list[str], str]] = {
    "worker": (
        [*DATASET, "--set", "task.reward={here}/hangs.py:reward"],
        "def reward(completions, **_):\n    if late(): time.sleep(1000)\n    return [float(len(c)) for c in completions]\n",
    ),
    "async": (
        [*DATASET, "--set", "task.reward={here}/hangs.py:reward"],
        "import asyncio\nasync def reward(completions, **_):\n    if late(): await asyncio.sleep(1000)\n"
        "    return [float(len(c)) for c in completions]\n",
    ),
    "C++": (  # does not come back to Python, where handlers of signals run, for a minute
        ["--set", "algorithm.advantage={here}/hangs.py:advantage"],
        "import torch\nfrom groupwise.algorithms import Credit\ndef advantage(o):\n"
        "    if late(): a = torch.ones(9000, 9000); a @ a @ a\n    return Credit(advantages=o.rewards_B)\n",
    ),
}


@pytest.mark.parametrize(
    ("place", "numbers", "code"), [("worker", (INT, INT), 130), ("async", (TERM, INT), 130), ("C++", (INT, TERM), 143)]
)
def test_the_second_signal_stops_at_once(
    launcher: Launcher, tmp_path: Path, place: str, numbers: tuple[int, int], code: int
) -> None:
    """While a reward hangs in a worker, in the event loop of one, or the trainer's process in C++."""
    out, here = tmp_path / "run", tmp_path
    late = (
        f"import os, time\ndef late():\n    if os.path.exists('{begun(out, 2)}'):\n"
        f"        open('{here}/hangs', 'w').close()\n        return True\n"
    )
    settings, code_of_user = HANGS[place]
    (here / "hangs.py").write_text(late + code_of_user)
    (here / "data.jsonl").write_text("".join(f'{{"prompt": "{i}+1="}}\n' for i in range(40)))
    sets = [argument.format(here=here) for argument in settings]
    process = launcher.start([*SMALL, *sets, "--set", "training.checkpoint_every=1", "--out", out], tmp_path / "log")
    process.wait_for(here / "hangs")
    process.send(numbers[0])
    process.wait_for(lambda: "once more stops at once" in process.text, 30)
    time.sleep(0.3)
    assert process.code is None
    process.send(numbers[1])
    assert process.ends(30) == code, process.text
    assert f"stopped at once; to go on from step-000002: groupwise train --resume {out}" in process.text
    assert "Traceback" not in process.text and "Exception" not in process.text


PLACES = {
    "loading": "import groupwise.training.session as m\nm.prepare = hang",
    "first evaluation": "import groupwise.training.loop as m\nm.evaluate = hang",
    "export": "import groupwise.learner.local as m\nm.LocalLearner.export = hang",
}


@pytest.mark.parametrize("place", PLACES)
def test_outside_of_steps_the_first_signal_stops_at_once(launcher: Launcher, tmp_path: Path, place: str) -> None:
    out = tmp_path / "run"
    hang = f"import time\ndef hang(*_, **__):\n    open('{tmp_path}/hangs', 'w').close(); time.sleep(1000)\n"
    process = launcher.start([*SMALL, "--set", "training.steps=1", "--out", out], tmp_path / "log", before=hang + PLACES[place])
    process.wait_for(tmp_path / "hangs")
    process.send(USR1)  # asks for what there is no state for yet, or what is saved already
    time.sleep(0.2)
    process.send(TERM)
    assert process.ends(30) == 143
    assert "stopped at once" in process.text and "Traceback" not in process.text
    assert (f"groupwise train --resume {out}" in process.text) == (place != "loading")


@pytest.mark.parametrize("where", ["before", "after"])
def test_sigusr1_ends_no_command_before_or_after_it_is_heard(launcher: Launcher, tmp_path: Path, where: str) -> None:
    out, go_on = tmp_path / "run", tmp_path / "go"
    wait = (
        f"import os, time\ndef waits(before):\n    def f(*a, **k):\n        open('{tmp_path}/waits', 'w').close()\n"
        f"        while not os.path.exists('{go_on}'): time.sleep(0.02)\n        return before(*a, **k)\n    return f\n"
    )
    place = {
        "before": "import groupwise.training.session as m\nm.plan = waits(m.plan)",
        "after": "import groupwise.cli.train as m\nm._print_result = waits(m._print_result)",
    }
    arguments = [*SMALL, "--set", "training.steps=1", "--out", out]
    process = launcher.start(arguments, tmp_path / "log", before=wait + place[where])
    process.wait_for(tmp_path / "waits")
    process.send(USR1)
    time.sleep(0.1)
    go_on.touch()
    assert process.ends() == 0, process.text


def test_an_evaluation_between_steps_is_finished_and_the_step_saved(launcher: Launcher, tmp_path: Path) -> None:
    out = tmp_path / "run"
    slow = (
        "import os, time\nimport groupwise.training.loop as m\nbefore = m.evaluate\ndef slow(*a, **k):\n"
        f"    if os.path.exists('{begun(out)}'):\n        open('{tmp_path}/slow', 'w').close(); time.sleep(1)\n"
        "    return before(*a, **k)\nm.evaluate = slow"
    )
    process = launcher.start([*SMALL, "--set", "training.eval_every=1", "--out", out], tmp_path / "log", before=slow)
    process.wait_for(tmp_path / "slow")
    process.send(INT)
    check_stopped(process, out, 130)


# --- streams that go away


def complete(out: Path) -> bool:
    return (out / "model" / "model.safetensors").exists() and (out / "checkpoints" / "step-000003").is_dir()


def test_the_run_goes_on_without_its_standard_output(launcher: Launcher, tmp_path: Path) -> None:
    full = launcher.start([*SMALL, "--set", "training.steps=3", "--out", tmp_path / "full"], tmp_path / "log", stdout="/dev/full")
    command = [sys.executable, "-m", "groupwise", *SMALL, "--set", "training.steps=3", "--out", str(tmp_path / "head")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()  # as head -1 does
        complaints = process.stderr.read()
    assert process.returncode == 0 and complaints == "", complaints
    assert full.ends() == 0 and full.text == ""
    assert complete(tmp_path / "full") and complete(tmp_path / "head")


def test_a_terminal_that_is_closed_asks_the_run_to_stop(launcher: Launcher, tmp_path: Path) -> None:
    out = tmp_path / "run"
    master, slave = os.openpty()
    process = launcher.start([*SMALL, "--out", out], tmp_path / "log", stdout=os.ttyname(slave))
    process.wait_for(lambda: _drained(master) and begun(out, 2).exists())
    os.close(slave)
    os.close(master)  # the kernel sends SIGHUP, and every write fails from now on
    assert process.ends() == 143, process.text
    assert list((out / "checkpoints").glob("step-*")) and "Traceback" not in process.text


def _drained(terminal: int) -> bool:
    """Read what was written there, so that nobody waits for room."""
    while select.select([terminal], [], [], 0)[0]:
        os.read(terminal, 4096)
    return True


# --- handlers


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in (INT, TERM, HUP, USR1)]
    for end in (None, print):
        with interruptible(Interrupt(end)):
            assert signal.getsignal(INT) not in before
        assert [signal.getsignal(number) for number in (INT, TERM, HUP, USR1)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_in_python_the_second_signal_raises() -> None:
    interrupt = Interrupt()
    with interruptible(interrupt), interrupt.in_steps():
        os.kill(os.getpid(), USR1)
        os.kill(os.getpid(), TERM)
        assert interrupt.save and interrupt.stop == TERM and Interrupted(TERM).exit_code == 143
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), INT)
    assert isinstance(Interrupted(INT), KeyboardInterrupt)


def test_nohup_is_respected_and_forked_processes_hear_their_own_signals() -> None:
    before = signal.signal(HUP, signal.SIG_IGN)
    heard: list[int] = []
    try:
        with interruptible(Interrupt(heard.append)):
            os.kill(os.getpid(), HUP)
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
            time.sleep(0.1)
            os.kill(child, TERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -TERM
            time.sleep(0.1)
            assert heard == []
            os.kill(os.getpid(), TERM)
            time.sleep(0.2)
            assert heard == [TERM]
    finally:
        signal.signal(HUP, before)


@pytest.mark.parametrize("number", [INT, TERM, HUP])
def test_a_signal_that_is_ignored_stays_so(number: int) -> None:
    """As SIGINT is for what a shell's script runs in the background: a Ctrl-C is meant for others."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        interrupt = Interrupt()
        with interruptible(interrupt), interrupt.in_steps():
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) is signal.SIG_IGN and interrupt.stop is None
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_without_the_main_thread_nothing_is_installed() -> None:
    found = []

    def work() -> None:
        with interruptible(Interrupt()):
            found.append(signal.getsignal(INT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(INT)]
