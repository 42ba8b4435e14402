"""Programs that a model wrote run in a box, and tests judge them; scorers that call eval run there too.

Nothing here would do harm if a box did not hold: a test looks at what a program may do, and does not try the damage.
"""

import asyncio
import json
import os
import struct
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import groupwise
from groupwise.config import Source
from groupwise.errors import UserError
from groupwise.models import character_tokenizer, new_module
from groupwise.rewards import boxes, launcher, sandbox
from groupwise.rewards.boxes import Limits, SandboxError
from groupwise.rewards.code import judge, parse_tests, program_of
from groupwise.rewards.filters import has_seccomp, seccomp_filter
from groupwise.rewards.sandbox import Box, heard, tell, why_not
from groupwise.rewards.warm import AHEAD, WAITING, Waiting
from groupwise.tasks import reasoning_gym
from groupwise.tasks.base import build_task
from groupwise.tasks.reasoning_gym import Scorer
from tests.conftest import SIZES, said

OWN = [kind for kind in ("bubblewrap", "namespaces") if why_not(kind) is None]
"""Boxes with files and processes of their own."""
HELD = [*OWN, *(["landlock"] if why_not("landlock") is None else [])]
BOXES = [*HELD, *(["processes"] if why_not("processes") is None else [])]
pytestmark = pytest.mark.skipif(not BOXES, reason="programs can be limited on Linux only")
every_box = pytest.mark.parametrize("kind", BOXES)
NONE = pytest.param("none", marks=pytest.mark.skip(reason="no such box here"))
every_real_box = pytest.mark.parametrize("kind", HELD or [NONE])
every_own_box = pytest.mark.parametrize("kind", OWN or [NONE])


@pytest.fixture(autouse=True, scope="module")
def none_waits() -> Iterator[None]:
    yield
    WAITING.close()


def fenced(program: str) -> str:
    return f"Like this:\n```python\n{program}\n```"


@every_box
def test_a_program_reads_and_writes(kind: Any) -> None:
    outcome = Box(kind).run("import sys\nprint(sys.stdin.read().upper())\nprint('e', file=sys.stderr)", "äöü\n")
    assert (outcome.ending, outcome.stdout, outcome.stderr) == ("done", "ÄÖÜ\n\n", "e\n")


@every_box
@pytest.mark.parametrize(
    ("program", "ending"),
    [
        ("raise SystemExit(3)", "failed"),
        ("import os; os.kill(os.getpid(), 9)", "failed"),
        ("import os; os.abort()", "failed"),
        ("x = bytearray(2 << 30)", "failed"),
        ("import time; time.sleep(60)", "timeout"),
        ("while True: pass", "timeout"),
        ("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.pause()", "timeout"),
        ("while True: print('a' * 1000)", "output"),
    ],
)
def test_a_program_is_stopped_at_its_limits(kind: Any, program: str, ending: str) -> None:
    began = time.monotonic()
    outcome = Box(kind).run(program, limits=Limits(seconds=1.0 if ending == "timeout" else 8.0, output=100_000))
    assert outcome.ending == ending and len(outcome.stdout) <= 100_000
    assert time.monotonic() - began < 10


@every_box
def test_a_program_has_no_privileges(kind: Any) -> None:
    status = Box(kind).run("print(open('/proc/self/status').read())").stdout
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert int(facts["CapEff"], 16) == int(facts["CapPrm"], 16) == int(facts["CapAmb"], 16) == 0
    assert facts["NoNewPrivs"] == "1" and (kind == "processes" or int(facts["Seccomp"]) == 2 * has_seccomp())


@every_own_box
def test_a_box_shows_no_file_of_this_machine(kind: Any, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    paths = [str(tmp_path / "secret"), str(Path(__file__).resolve()), "/etc/passwd", "/home", f"/proc/{os.getpid()}/environ"]
    seen = json.loads(Box(kind).run(f"import json, os; print(json.dumps([os.path.exists(p) for p in {paths!r}]))").stdout)
    assert seen[:4] == [False] * 4
    places = "[p for p in ('/', '/usr', '/proc/sys', '/dev') if os.access(p, os.W_OK)]"
    program = f"import json, os; print(json.dumps([{places}, os.listdir('/tmp')]))"
    writable, listed = json.loads(Box(kind).run(program).stdout)
    assert set(writable) <= {"/", "/dev"}  # memory of its own
    assert set(listed) <= {Path(sys.executable).parts[2]}  # nothing, unless Python itself lies below /tmp


@every_own_box
def test_a_box_has_no_network_and_no_other_process(kind: Any) -> None:
    listed = "open('/proc/net/dev').read(), [p for p in os.listdir('/proc') if p.isdigit()]"
    devices, processes = json.loads(Box(kind).run(f"import json, os; print(json.dumps([{listed}]))").stdout)
    names = {line.partition(":")[0].strip() for line in devices.splitlines()[2:]}
    assert names <= {"lo", "sit0", "tunl0", "ip6tnl0"} and len(processes) <= 4


@every_real_box
def test_processes_are_counted_and_end_with_the_box(kind: Any) -> None:
    """A hundred sleepers at most, whether the limit holds or not."""
    program = """
import os, time
made = 0
try:
    for _ in range(100):
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        made += 1
except OSError:
    pass
print(made, flush=True)
"""
    began = time.monotonic()
    outcome = Box(kind).run(program, limits=Limits(processes=20))
    # The kernel counts no processes of root, who is root in bubblewrap's box; there the watch ends the box.
    assert outcome.ending == "processes" or (outcome.ending == "done" and 0 < int(outcome.stdout) < 20)
    assert time.monotonic() - began < 6  # and does not wait for those that sleep


def test_where_no_box_can_be_built_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"prompt": f"p{i}", "answer": "[]"}) + "\n" for i in range(4)))
    monkeypatch.setattr(sandbox, "why_not", lambda kind: None if kind == "processes" else "not here")
    sandbox.find_box.cache_clear()
    settings = {"name": "dataset", "path": "d.jsonl"}
    try:
        with pytest.raises(UserError, match=r"task.reward.*no sandbox.*not here.*reward = \"code-in-processes\""):
            build_task({**settings, "reward": "code"}, Source(tmp_path / "r.toml", ""))
        weaker = build_task({**settings, "reward": "code-in-processes"}, Source(tmp_path / "r.toml", ""))
        assert weaker.reward == "code-in-processes"
    finally:
        sandbox.find_box.cache_clear()


def test_a_box_that_breaks_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "LAUNCHER", Path("/nowhere/launcher.py"))
    with pytest.raises(SandboxError, match=r"processes: .*No such file"):
        Box("processes").run("print(1)")


def test_an_interpreter_that_others_may_not_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With root, whose programs run as another user: also the packages, and the directories above."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    packages = tmp_path / "closed" / "packages"
    packages.mkdir(parents=True)
    for mode, above, named in ((0o755, 0o700, packages.parent), (0o711, 0o711, packages)):
        packages.chmod(mode)
        packages.parent.chmod(above)
        with pytest.raises(OSError, match=f"may not read {named}: use a Python that all may run"):
            launcher.user_of_its_own([str(packages)])


def permitted(code: bytes, architecture: int, number: int, *arguments: int) -> int:
    """What a filter says of a system call, by a reading of its instructions that is not the kernel's."""
    data = struct.pack("<IIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    steps, held, place = list(struct.iter_unpack("<HBBI", code)), 0, 0
    while True:
        what, yes, no, value = steps[place]
        place += 1
        if what == 0x20:
            (held,) = struct.unpack_from("<I", data, value)
        elif what == 0x54:
            held &= value
        elif what == 0x06:
            return value
        else:
            place += yes if {0x15: held == value, 0x35: held >= value, 0x45: bool(held & value)}[what] else no


def test_the_filter_of_system_calls() -> None:
    """On both architectures."""
    allow, eperm, enosys, kill = 0x7FFF0000, 0x50001, 0x50026, 0x80000000
    machines = {
        "x86_64": (0xC000003E, [1, 56, 41, 53, 101, 16, 302, 62, 91, 72, 73]),
        "aarch64": (0xC00000B7, [64, 220, 198, 199, 117, 29, 261, 129, 52, 25, 32]),
    }
    for machine, (architecture, numbers) in machines.items():
        write, clone, socket, socketpair, ptrace, ioctl, prlimit, signal, fchmod, fcntl, flock = numbers
        code = seccomp_filter(machine, own_files=True, signals=True)
        shared = seccomp_filter(machine, own_files=False, signals=False)
        expected = {
            (write, 1): allow,
            (clone, 17): allow,  # SIGCHLD, as fork gives it
            (clone, 0x3D0F00): allow,  # a thread
            **{(clone, 17 | flag): eperm for flag in (1 << 17, 1 << 25, 1 << 26, 1 << 27, 1 << 28, 1 << 29, 1 << 30)},
            (435,): enosys,
            (457,): enosys,
            (0x40000000 + write,): enosys,
            (socket, 1): eperm,
            (socketpair, 1, 1): allow,
            (socketpair, 1, 1 | 0o2000000): allow,  # close-on-exec
            (socketpair, 1, 2): eperm,
            (socketpair, 16, 1): eperm,
            (ptrace, 0): eperm,
            (ioctl, 0, 0x5401): allow,
            (ioctl, 0, 0x5412): eperm,
            (prlimit, 0): allow,
            (prlimit, 1): eperm,
            (signal, 5): allow,
            (fchmod, 5): allow,
            (fcntl, 0, 3): allow,  # F_GETFL
            (fcntl, 0, 6): allow,  # F_SETLK
            **{(fcntl, 0, command): eperm for command in (8, 10, 15, 1024, 1026)},
            (flock, 0): eperm,
        }
        for call, result in expected.items():
            assert permitted(code, architecture, *call) == result, (machine, call)
        assert permitted(shared, architecture, signal, 5) == permitted(shared, architecture, fchmod, 5) == eperm
        assert all(permitted(shared, architecture, fcntl, 0, command) == eperm for command in (6, 7, 37, 38, 1024, 1026))
        assert permitted(code, 0x40000003, write) == kill  # 32-bit calls have other numbers
    with pytest.raises(KeyError, match="riscv64"):
        seccomp_filter("riscv64", own_files=True, signals=True)


def test_without_landlock_and_seccomp_the_box_is_weaker_or_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "landlock_abi", lambda: 0)
    monkeypatch.setattr(boxes, "has_seccomp", lambda: False)
    assert Box("namespaces").describe() == "namespaces with neither Landlock nor seccomp"
    for kind in OWN:
        assert Box(kind).run("print(open('/proc/self/status').read())").stdout.count("Seccomp:\t0") == 1
    with pytest.raises(SandboxError, match="landlock: the kernel has no Landlock here"):
        Box("landlock").run("print(1)")


@every_box
def test_boxes_that_wait_run_one_program_each(kind: Any) -> None:
    """What a program leaves in the interpreter, in /tmp or running is not there for the next; limits are those asked for."""
    waiting, box, limits = Waiting(), Box(kind), Limits(seconds=5.0)
    leave = """
import builtins, os, time
print(os.path.exists("left"), hasattr(builtins, "left"))
builtins.left = 1
try:
    open("left", "w").close()
except OSError:
    pass
if os.fork() == 0:
    time.sleep(30)
"""
    outcomes = [waiting.run(box, leave, "", limits) for _ in range(2)]
    with ThreadPoolExecutor(1) as thread:  # with which the box that it starts ahead must not end
        outcomes.append(thread.submit(waiting.run, box, leave, "", limits).result())
    outcomes.append(waiting.run(box, leave, "", limits))
    assert {(outcome.ending, outcome.stdout) for outcome in outcomes} == {("done", "False False\n")}
    assert waiting.run(box, "while True: pass", "", Limits(seconds=0.5)).ending == "timeout"
    assert 0 < len(waiting._ready) <= AHEAD and all(program.limits.seconds == 0.5 for program in waiting._ready)
    for program in waiting._ready:
        os.kill(program.process.pid, 9)  # as a machine short of memory does
        program.process.wait()
    assert waiting.run(box, "print(input())", "yes", Limits(seconds=5.0)).stdout == "yes\n"
    processes = [program.process for program in waiting._ready]
    waiting.close()
    assert not waiting._ready and all(process.returncode is not None for process in processes)


def test_threads_together_start_no_more_boxes_than_may_wait() -> None:
    waiting, box = Waiting(), Box(BOXES[-1])
    with ThreadPoolExecutor(2 * AHEAD + 1) as threads:
        outcomes = list(threads.map(lambda _: waiting.run(box, "print(1)", "", Limits()), range(4 * AHEAD)))
    assert {outcome.stdout for outcome in outcomes} == {"1\n"}
    assert 0 < len(waiting._ready) <= AHEAD and waiting._building == 0
    waiting.close()


def test_a_program_sees_a_module_of_its_own() -> None:
    """Not the launcher's: names that it forgot to import are missing, as when a file is run."""
    run = Box(BOXES[0]).run
    assert "NameError" in run("print(os.getcwd())").stderr and "NameError" in run("print(given)").stderr
    outcome = run("import sys, __main__\nprint(__name__, sys.argv, [name for name in vars(__main__) if name[0] != '_'])\nexit(3)")
    assert outcome.stdout == "__main__ ['program.py'] ['sys']\n"
    assert outcome.ending == "failed"


def test_a_model_learns_from_programs_in_the_box(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A token is a program; one of six passes the tests, a fresh model writes all alike, a trained one writes that one."""
    bodies = ["print(int(input()) + 1)", "print(input())", "raise SystemExit(1)", "import os; os.abort()", "print(3)", "1 / 0"]
    words = [f"```python\n{body}\n```" for body in bodies]
    tokenizer = character_tokenizer("abc", words)
    new_module({"model_type": "llama", **SIZES}, tokenizer, seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tests = json.dumps([{"input": "2\n", "output": "3\n"}, {"input": "5\n", "output": "6\n"}])
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"prompt": "abc"[i % 3] * (1 + i), "answer": tests}) + "\n" for i in range(20))
    )
    reward = "code" if HELD else "code-in-processes"
    run = groupwise.train(
        {
            "model": {"path": str(tmp_path / "model")},
            "task": {"name": "dataset", "path": str(tmp_path / "d.jsonl"), "reward": reward},
            "algorithm": {"name": "grpo"},
            "rollouts": {"group_size": 8, "prompts_per_step": 2, "max_tokens": 1},
            "learner": {"learning_rate": 0.03, "minibatches": 1},
            "training": {"steps": 8, "eval_every": 8, "eval_problems": 2},
        },
        out=tmp_path / "run",
    )
    assert "programs run in the sandbox" in "".join(capfd.readouterr())
    earned = run.values("reward/mean")
    assert earned[0] <= 0.5 and sum(earned[-3:]) / 3 >= 0.75, earned


STDIN = [{"input": "3\n4\n", "output": "7"}, {"input": "1\n1\n", "output": "2\n", "type": "stdin_stdout"}]
CALLS = {"inputs": [[[1, 2], 3], [[], 0]], "outputs": [[[1, 2, 3]], [[0]]], "fn_name": "append"}
ONE_CALL = [{"input": '[1, 2]\n"x"', "output": '[1, 2, "x"]', "testtype": "functional", "metadata": {"func_name": "append"}}]
ADD = "a = int(input())\nb = int(input())\nprint(a + b)"
APPEND = "def append(a, b):\n    print('noise')\n    return [*a, b]"
SOLUTION = "class Solution:\n    def append(self, a, b):\n        return (*a, b)"


@pytest.mark.parametrize(
    ("tests", "program", "verdict"),
    [
        (STDIN, ADD, "correct"),
        (STDIN, "print(7)", "wrong"),  # right for the first test only
        (STDIN, ADD + "\nraise SystemExit(1)", "wrong"),
        ({"inputs": ["3\n4"], "outputs": ["7 \n"]}, ADD, "correct"),
        (CALLS, APPEND, "correct"),
        (CALLS, SOLUTION, "correct"),
        (CALLS, APPEND.replace("[*a, b]", "[b]"), "wrong"),
        (CALLS, APPEND.replace("append", "other"), "wrong"),
        (ONE_CALL, APPEND, "correct"),
        (ONE_CALL, "def append(a, b):\n    return {1}", "wrong"),
        (ONE_CALL, "import os\nos.write(1, b'[1, 2, \"y\"]')\nos._exit(0)", "wrong"),
    ],
)
def test_code_by_hand(tests: Any, program: str, verdict: str) -> None:
    assert judge(json.dumps(tests), fenced(program), sandbox.find_box(weaker=not HELD)) == verdict


def test_the_reward_code_scores_through_a_task(tmp_path: Path) -> None:
    rows = [{"problem": f"Add {i}.", "tests": STDIN} for i in range(4)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"name": "dataset", "preset": "code", "path": "d.jsonl", **({} if HELD else {"reward": "code-in-processes"})}
    task = build_task(settings, Source(tmp_path / "r.toml", ""))
    scores = asyncio.run(task.score(task.problem(0, 0), [said(fenced(ADD)), said(fenced("print(7)")), said("no block")]))
    assert [score.verdict for score in scores] == ["correct", "wrong", "unparsed"]


def test_the_last_block_counts_and_none_is_unparsed() -> None:
    assert program_of(fenced("a") + fenced("b")) == "b\n"
    assert judge(json.dumps(STDIN), "no block", Box("processes")) == "unparsed"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "not JSON"),
        ([], "must be a list"),
        ({"inputs": [1], "outputs": []}, "1 inputs and 0 outputs"),
        ([{"input": "1"}], 'needs "input" and "output"'),
        ([{"input": "1", "output": "1", "type": "sdin"}], "no type of test 'sdin'"),
        ([{"input": "1", "output": "1", "type": "functional"}], "no fn_name"),
        ('{"inputs": ["' + "[" * 50_000 + '"], "outputs": ["1"], "fn_name": "f"}', "nested too deeply"),
        ([{"input": "[" * 50_000, "output": "1", "type": "functional", "fn_name": "f"}], "nested too deeply"),
        ([{"input": "x y", "output": "1", "type": "functional", "fn_name": "f"}], "one JSON value a line"),
    ],
)
def test_tests_of_no_known_form_are_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_tests(value)


def test_a_line_from_a_process_has_limits() -> None:
    """Of time and bytes, whatever the process writes; so have those written to it."""
    reads, writes = os.pipe()
    try:
        os.write(writes, b"half")
        with pytest.raises(TimeoutError, match="no answer within 0 s"):
            heard(reads, 0.1, 100)
        os.write(writes, b"one\ntwo")
        assert heard(reads, 5.0, 100) == b"one"
        os.write(writes, b"x" * 60_000)
        with pytest.raises(ValueError, match="more than 100 bytes"):
            heard(reads, 5.0, 100)
        with pytest.raises(TimeoutError, match="read nothing"):
            tell(writes, b"x" * 1_000_000, 0.1)
    finally:
        os.close(reads)
        os.close(writes)


SCORER = """
import os
class Dataset:
    def __getitem__(self, index): return index
    def score_answer(self, answer, entry): return eval(answer)
def create_dataset(name, seed, size): return Dataset()
"""


WRITE_ALL = """
import os
for pipe in [*range(64), *(f"/proc/{pid}/fd/{n}" for pid in (os.getppid(), 1, 2) for n in range(16))]:
    try:
        pipe = pipe if isinstance(pipe, int) else os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        for _ in range(COUNT):
            os.write(pipe, TEXT)
    except OSError:
        pass
"""
CPU = "'unlimited' in [line for line in open(f'/proc/{os.getppid()}/limits') if 'cpu time' in line][0]"


def test_what_a_scorer_evaluates_reaches_neither_the_trainer_nor_the_next_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the library whose scorer evaluates the answer, as some of the library's do."""
    (tmp_path / "reasoning_gym").mkdir()
    (tmp_path / "reasoning_gym" / "__init__.py").write_text(SCORER)
    place = SimpleNamespace(origin=str(tmp_path / "reasoning_gym" / "__init__.py"))
    monkeypatch.setattr(reasoning_gym, "find_spec", lambda _: place)
    scorer, began = Scorer(Box(OWN[0] if OWN else "processes")), time.monotonic()

    def scores(*answers: str) -> list[float | str]:
        return scorer.scores({"dataset": ["any", {}, 0, 1], "index": 0, "answers": answers})

    def writing(text: bytes, count: int) -> str:
        return f"exec({WRITE_ALL.replace('TEXT', repr(text)).replace('COUNT', str(count))!r}) or 0.5"

    assert scores("0.75", "1 / 0", "0.5") == [0.75, "ZeroDivisionError: division by zero", 0.5]
    assert scores(CPU, "float('nan')") == [1.0, "the scorer returned no number"]
    assert scores(writing(b"[0.25]\n", 1)) == [0.25]  # its own score, which nothing can keep it from
    assert scores("0.75") == [0.75]
    assert scores(writing(b"9" * 60_000, 100)) == ["the scorer ended early"]
    assert scores("0.75") == [0.75]
    assert scores("os.kill(os.getppid(), 9)")[0] == "the scorer was stopped: its process ended"
    assert scores("0.75") == [0.75] and time.monotonic() - began < 30
    scorer.close()


def test_reasoning_gym_is_scored_in_the_box(tmp_path: Path) -> None:
    """Positions are pure, held-out questions are not trained on, and scores are the library's own."""
    gym = pytest.importorskip("reasoning_gym")
    source = Source(tmp_path / "r.toml", "")
    settings = {"name": "reasoning-gym", "datasets": ["chain_sum", "countdown"], "config": {"chain_sum": {"max_terms": 3}}}
    if not HELD:
        settings["sandbox"] = "processes"
    task = build_task(settings, source)
    drawn = [task.problem(i, 0) for i in range(60)]
    assert [item.metadata["dataset"] for item in drawn[:4]] == ["chain_sum", "countdown"] * 2
    held = task.held_out(20)
    assert len({item.id for item in held}) == 20 and not {item.id for item in drawn} & {item.id for item in held}
    again = build_task(task.model_dump(), source)
    assert [again.problem(i, 0) for i in range(60)] == drawn and again.held_out(20) == held
    problem = drawn[1]
    entry = gym.create_dataset("countdown", seed=problem.metadata["seed"], size=10**6)[problem.metadata["index"]]
    texts = ["<answer>" + text + "</answer>" for text in (entry["metadata"]["expression"], "1", "__import__('os').getpid()")]
    scores = asyncio.run(task.score(problem, [said(text) for text in [*texts, "no tags"]]))
    expected = gym.create_dataset("countdown", seed=0, size=1)
    assert [score.correct for score in scores] == [True, False, False, False]
    assert scores[0].reward == 1.0 and scores[1].reward == expected.score_answer("1", entry) and scores[3].reward == 0.0
    with pytest.raises(UserError, match=r"no dataset 'chian_sum'; did you mean 'chain_sum'\?"):
        build_task({**settings, "datasets": ["chian_sum"]}, source)
    with pytest.raises(UserError, match=r"task.config.chain_sum: TypeError.*max_trems"):
        build_task({**settings, "config": {"chain_sum": {"max_trems": 3}}}, source)
