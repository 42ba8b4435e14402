"""Programs that a model wrote run in a box, and tests judge them; scorers that call eval run there too.

Nothing here would do harm if a box did not hold: a test looks at what a program may do, and does not try the damage.
"""

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from groupwise.config import Source
from groupwise.errors import UserError
from groupwise.rewards import boxes, sandbox
from groupwise.rewards.boxes import Limits, SandboxError
from groupwise.rewards.code import judge, parse_tests, program_of
from groupwise.rewards.sandbox import Box, why_not
from groupwise.tasks.base import build_task
from tests.conftest import said

HELD = [kind for kind in ("bubblewrap", "namespaces") if why_not(kind) is None]
BOXES = [*HELD, *(["processes"] if why_not("processes") is None else [])]
pytestmark = pytest.mark.skipif(not BOXES, reason="programs can be limited on Linux only")
every_box = pytest.mark.parametrize("kind", BOXES)
NONE = pytest.param("none", marks=pytest.mark.skip(reason="no namespaces here"))
every_real_box = pytest.mark.parametrize("kind", HELD or [NONE])


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
    outcome = Box(kind).run(program, limits=Limits(seconds=3.0, output=100_000))
    assert outcome.ending == ending and len(outcome.stdout) <= 100_000
    assert time.monotonic() - began < 10


@every_box
def test_a_program_has_no_privileges(kind: Any) -> None:
    status = Box(kind).run("print(open('/proc/self/status').read())").stdout
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert int(facts["CapEff"], 16) == int(facts["CapPrm"], 16) == int(facts["CapBnd"], 16) == 0
    assert facts["NoNewPrivs"] == "1"


@every_real_box
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


@every_real_box
def test_a_box_has_no_network_and_no_other_process(kind: Any) -> None:
    listed = "open('/proc/net/dev').read(), [p for p in os.listdir('/proc') if p.isdigit()]"
    devices, processes = json.loads(Box(kind).run(f"import json, os; print(json.dumps([{listed}]))").stdout)
    names = {line.partition(":")[0].strip() for line in devices.splitlines()[2:]}
    assert names <= {"lo", "sit0", "tunl0", "ip6tnl0"} and len(processes) <= 4


@every_real_box
def test_processes_are_counted_and_end_with_the_box(kind: Any) -> None:
    """A hundred sleepers at most, whether the limit holds or not."""
    if kind == "bubblewrap" and os.geteuid() == 0:
        pytest.skip("the kernel counts no processes of root, who is root in bubblewrap's box; `find_box` prefers the other one")
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
    assert 0 < int(outcome.stdout) < 20 and outcome.ending == "done"
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
        ([{"input": "x y", "output": "1", "type": "functional", "fn_name": "f"}], "one JSON value a line"),
    ],
)
def test_tests_of_no_known_form_are_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_tests(value)


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
