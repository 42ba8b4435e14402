"""A user's code runs in processes: whatever it does, the caller gets a result or one clear reason, and nothing is left behind."""

import asyncio
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from groupwise.workers import Other, Pool, Target, WorkerError
from groupwise.workers.child import LARGEST

CODE = """
import asyncio, os, signal, subprocess, sys, time
import beside

class Rude(Exception):
    def __str__(self):
        raise RuntimeError("no text")

def echo(*args, **kwargs): return [list(args), kwargs]
def folder(): return beside.HERE
def pid(): return os.getpid()
def niceness(): return os.nice(0)
def fail(text="no"): raise ValueError(text)
def rude(): raise Rude
def leave(): raise SystemExit(3)
def interrupt(): raise KeyboardInterrupt
def end(): os._exit(7)
def shoot(): os.kill(os.getpid(), signal.SIGSEGV)
def realtime(go):
    if go: os.kill(os.getpid(), 37)
def forge(go):
    if not go: return
    reply = b'{"id": 1e999}'
    for descriptor in range(3, 32):
        try: os.write(descriptor, len(reply).to_bytes(8, 'big') + reply)
        except OSError: continue
    time.sleep(60)
def colours_and_end():
    os.write(2, b"a" * 65535 + "\\u00e4\\x1b[31m\\tred\\u202e\\n".encode())
    os._exit(7)
def hang(): time.sleep(60)
def compute(): return 9 ** 9 ** 9 ** 9
def spin():
    while True: pass
def talk():
    print("said" * 1000)
    os.write(1, b"raw output")
    return 1
def large(): return "x" * 10**8
def endless():
    while True: yield 1.0
def deep():
    value = []
    for _ in range(100): value = [value]
    return value
def plain_coroutine(): return slow(0.01, "done")
def coroutines(): return [slow(0.01, "never"), 1.0]
def runs_a_loop(): return asyncio.run(slow(0.01, "ran"))
def alarm():
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("mine")))
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    time.sleep(5)
def child():
    return subprocess.Popen(["sleep", "600"]).pid
def child_then_hang(path):
    open(path, "w").write(str(child()))
    time.sleep(600)
async def slow(seconds, value):
    await asyncio.sleep(seconds)
    return value
async def block(seconds):
    time.sleep(seconds)
    return "blocked"
async def end_softly():
    await asyncio.sleep(0.1)
    os._exit(5)
def logs(values, log_extra, log_metric):
    log_extra("length", [len(value) for value in values])
    log_metric("mean", 0.5)
    return [1.0 for _ in values]
def numbers():
    import numpy, torch, decimal, fractions
    return [numpy.float32(0.5), torch.tensor(2.0), decimal.Decimal("0.25"), fractions.Fraction(1, 2), True, None, 10**400,
            float("nan"), float("inf"), numpy.array([1.0, 2.0]), {"a": (1, 2)}, object(), "\\ud800", b"x"]
class Counter:
    def __init__(self, start=0): self.value = start
    def add(self, by): self.value += by; return self.value
    async def later(self, seconds): await asyncio.sleep(seconds); return self.value
    def pair(self): return (1, 2)
    def hang(self): time.sleep(60)
def total(environments, scale): return [scale * item.value for item in environments]
"""


@pytest.fixture
def at(tmp_path: Path) -> Callable[[str], Target]:
    (tmp_path / "code.py").write_text(CODE)
    (tmp_path / "beside.py").write_text("HERE = 'beside'\n")
    return lambda name: Target.in_file(tmp_path / "code.py", name)


def value(pool: Pool, target: Target, *args: Any, limit: float = 20, **options: Any) -> Any:
    return asyncio.run(pool.call(target, *args, limit=limit, **options)).value


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


At = Callable[[str], Target]


def test_calls_and_values(at: At) -> None:
    pool = Pool(1)
    assert value(pool, at("echo"), 1, "b", kwargs={"c": [None]}) == [[1, "b"], {"c": [None]}]
    assert value(pool, at("folder")) == "beside"
    assert value(pool, at("niceness")) >= 10
    first = value(pool, at("pid"))
    assert value(pool, at("talk")) == 1 and value(pool, at("pid")) == first != os.getpid()
    assert value(pool, at("plain_coroutine")) == "done" and value(pool, at("runs_a_loop")) == "ran"
    half, two, quarter, other_half, true, none, huge, nan, inf, array, mapping, thing, text, data = value(pool, at("numbers"))
    assert [half, two, quarter, other_half, true, none] == [0.5, 2.0, 0.25, 0.5, True, None]
    assert huge == Other("int") and math.isnan(nan) and inf == math.inf and array == [1.0, 2.0]
    assert mapping == {"a": [1, 2]} and thing == Other("object") and text == "?" and data == Other("bytes")
    assert value(pool, at("coroutines")) == [Other("coroutine"), 1.0]
    reply = asyncio.run(pool.call(at("logs"), ["a", "bcd"], limit=5, logs=True))
    assert (reply.value, reply.extra, reply.metrics) == ([1.0, 1.0], {"length": [1, 3]}, {"mean": [0.5]})


@pytest.mark.parametrize(
    ("name", "kind", "detail"),
    [
        ("fail", "raised", r"ValueError: no \(code.py, line 13\)"),
        ("rude", "raised", r"Rude: \(its text cannot be had: RuntimeError\)"),
        ("leave", "raised", r"SystemExit: 3"),
        ("interrupt", "raised", r"KeyboardInterrupt"),
        ("alarm", "raised", r"TimeoutError: mine"),
        ("end", "died", r"ended with exit code 7"),
        ("shoot", "died", r"ended by SIGSEGV"),
        ("hang", "timeout", r"no result within 0.7 s"),
        ("compute", "timeout", r"no result within 0.7 s"),
        ("large", "too large", f"more than {LARGEST} characters"),
        ("endless", "too large", "more than"),
        ("deep", "too large", "nested"),
        ("missing", "raised", "there is no function 'missing'"),
    ],
)
def test_what_goes_wrong_is_told_and_the_next_call_is_as_ever(at: At, name: str, kind: str, detail: str) -> None:
    pool = Pool(1)
    assert value(pool, at("echo")) == [[], {}]
    with pytest.raises(WorkerError, match=detail) as caught:
        value(pool, at(name), limit=5 if kind == "too large" else 0.7)
    assert caught.value.kind == kind
    assert value(pool, at("echo")) == [[], {}]


@pytest.mark.parametrize(("name", "detail"), [("realtime", "ended by signal 37"), ("forge", "replies cannot be read")])
def test_calls_that_wait_for_a_worker_that_ends_in_an_odd_way_end_too(at: At, name: str, detail: str) -> None:
    async def both() -> list[Any]:
        async with Pool(1).lease() as lease:
            for target, arguments in ((at("echo"), ()), (at(name), (False,))):
                await lease.call(target, *arguments, limit=20)  # so that both are loaded
            calls = (lease.call(at(name), True, limit=30), lease.call(at("echo"), limit=30))
            return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 20)

    first, second = asyncio.run(both())
    assert isinstance(first, WorkerError) and isinstance(second, WorkerError)
    assert first.kind == second.kind == "died" and re.search(detail, first.detail)


def test_what_user_code_prints_cannot_steer_the_terminal(at: At, capsys: pytest.CaptureFixture[str]) -> None:
    pool = Pool(1)
    with pytest.raises(WorkerError):
        value(pool, at("colours_and_end"))
    assert capsys.readouterr().err == "a" * 65535 + "ä\\x1b[31m\tred\\u202e\n"


def test_a_file_that_does_not_run_or_has_no_such_function(at: At, tmp_path: Path) -> None:
    with pytest.raises(WorkerError) as caught:
        asyncio.run(Pool(1).describe(at("folde")))
    assert "folder" in (caught.value.known or [])
    (tmp_path / "broken.py").write_text("import os\n1 / 0\n")
    with pytest.raises(WorkerError, match=r"ZeroDivisionError: division by zero \(broken.py, line 2\)"):
        asyncio.run(Pool(1).describe(Target.in_file(tmp_path / "broken.py", "f")))


def test_a_limit_on_computing_spares_who_waits(at: At) -> None:
    pool = Pool(1)
    started = time.monotonic()
    with pytest.raises(WorkerError, match="computed for longer") as caught:
        value(pool, at("spin"), limit=60, cpu_limit=0.3)
    assert caught.value.kind == "timeout" and time.monotonic() - started < 30
    assert value(pool, at("plain_coroutine"), cpu_limit=0.3) == "done"


def test_functions_are_described(at: At) -> None:
    pool = Pool(1)
    described = asyncio.run(pool.describe(at("slow")))
    assert described["awaited"] and [item["name"] for item in described["parameters"]] == ["seconds", "value"]
    assert not asyncio.run(pool.describe(at("echo")))["awaited"] and not asyncio.run(pool.describe(at("Counter")))["awaited"]


def test_calls_run_at_once_up_to_the_size_and_asynchronous_ones_without_limit(at: At, tmp_path: Path) -> None:
    (tmp_path / "naps.py").write_text("import time, os\ndef nap():\n    time.sleep(0.3)\n    return os.getpid()\n")
    pool, nap = Pool(2), Target.in_file(tmp_path / "naps.py", "nap")

    async def many(count: int, call: Callable[[], Any]) -> tuple[list[Any], float]:
        started = time.monotonic()
        found = await asyncio.gather(*(call() for _ in range(count)))
        return [reply.value for reply in found], time.monotonic() - started

    asyncio.run(many(2, lambda: pool.call(nap, limit=9)))
    pids, seconds = asyncio.run(many(6, lambda: pool.call(nap, limit=9)))
    assert len(set(pids)) == 2 and 0.85 < seconds < 2
    values, seconds = asyncio.run(many(100, lambda: pool.call(at("slow"), 0.5, "x", limit=9, shared=True)))
    assert values == ["x"] * 100 and seconds < 2


def test_one_that_blocks_the_shared_loop_or_ends_its_process_fails_alone(at: At) -> None:
    pool = Pool(2)

    async def mixed(bad: str, *args: Any) -> list[Any]:
        calls = [pool.call(at("slow"), 1.0, i, limit=1.5, shared=True) for i in range(3)]
        calls.insert(1, pool.call(at(bad), *args, limit=1.5, shared=True))
        return await asyncio.gather(*calls, return_exceptions=True)

    first, bad, *others = asyncio.run(mixed("block", 30))
    assert isinstance(bad, WorkerError) and bad.kind == "timeout"
    assert [reply.value for reply in (first, *others)] == [0, 1, 2]
    first, bad, *others = asyncio.run(mixed("end_softly"))
    assert isinstance(bad, WorkerError) and bad.kind == "died"
    assert [reply.value for reply in (first, *others)] == [0, 1, 2]


def test_one_that_waits_for_ever_is_given_up_without_disturbing_others(at: At) -> None:
    pool = Pool(1)

    async def mixed() -> list[Any]:
        slow = pool.call(at("slow"), 60, "never", limit=0.4, shared=True)
        return await asyncio.gather(slow, pool.call(at("slow"), 0.8, "x", limit=5, shared=True), return_exceptions=True)

    late, other = asyncio.run(mixed())
    assert isinstance(late, WorkerError) and late.kind == "timeout" and other.value == "x"


def test_calls_that_hold_the_shared_loop_for_a_while_are_not_late(at: At) -> None:
    """The limit of each begins when the loop comes to it."""
    pool = Pool(1)

    async def many() -> list[Any]:
        return await asyncio.gather(*(pool.call(at("block"), 0.4, limit=1.0, shared=True) for _ in range(5)))

    assert [reply.value for reply in asyncio.run(many())] == ["blocked"] * 5


def test_objects_by_value() -> None:
    by = 3

    class Scaled:
        def __call__(self, x: float) -> float:
            return by * x

    pool = Pool(1)
    assert value(pool, Target.of(Scaled()), 2.0) == 6.0 and value(pool, Target.of(lambda x: x + by), 2.0) == 5.0
    with pytest.raises(ValueError, match="cannot be pickled"):
        Target.of(threading.Lock().acquire)


def test_a_lease_keeps_instances(at: At) -> None:
    pool = Pool(1)

    async def play() -> None:
        async with pool.lease() as lease:
            one, two = await asyncio.gather(*(lease.new(at("Counter"), start, limit=5) for start in (1, 2)))
            assert await lease.method(one, "add", 10, limit=5) == 11
            assert await lease.method(two, "pair", limit=5, text=True) == "(1, 2)"
            started = time.monotonic()
            assert await asyncio.gather(*(lease.method(i, "later", 0.4, limit=5) for i in (one, two))) == [11, 2]
            assert time.monotonic() - started < 0.75
            reply = await lease.call(at("total"), kwargs={"scale": 2}, handles={"environments": [two, one]}, limit=5)
            assert reply.value == [4, 22]
            with pytest.raises(WorkerError, match=r"within 0.2 s"):
                await lease.method(one, "later", 9, limit=0.2)
            assert await lease.method(two, "add", 0, limit=5) == 2
            await lease.drop(one)
            with pytest.raises(WorkerError, match="KeyError"):
                await lease.method(one, "add", 1, limit=5)
            with pytest.raises(WorkerError) as caught:
                await lease.method(two, "hang", limit=0.3)
            assert caught.value.kind == "timeout" and not lease.alive
            with pytest.raises(WorkerError) as caught:
                await lease.method(two, "add", 0, limit=5)
            assert caught.value.kind == "died"

    asyncio.run(play())
    assert value(pool, at("echo")) == [[], {}]


def test_processes_end_with_their_pool_and_those_they_started_with_them(at: At, tmp_path: Path) -> None:
    pool = Pool(1)
    worker, grandchild = value(pool, at("pid")), value(pool, at("child"))
    assert alive(worker) and alive(grandchild)
    del pool
    assert wait_until_gone(worker) and wait_until_gone(grandchild)
    pool = Pool(1)
    with pytest.raises(WorkerError, match="within"):
        value(pool, at("child_then_hang"), str(tmp_path / "pid"), limit=0.7)
    assert wait_until_gone(int((tmp_path / "pid").read_text()))


def test_a_keeper_that_stands_still_is_not_waited_for_while_others_hold_its_pipes(at: At, tmp_path: Path) -> None:
    """It is killed, and cannot end what the worker has started."""
    pool, path = Pool(1), tmp_path / "pid"
    process = value(pool, at("pid"))

    async def call() -> None:
        task = asyncio.create_task(pool.call(at("child_then_hang"), str(path), limit=60))
        while not path.is_file() or not path.read_text():
            await asyncio.sleep(0.02)
        (worker,) = pool.workers
        os.kill(worker.process.pid, signal.SIGSTOP)
        os.kill(process, signal.SIGKILL)
        with pytest.raises(WorkerError, match="died"):
            await asyncio.wait_for(task, 20)

    try:
        asyncio.run(call())
        assert alive(int(path.read_text()))
    finally:
        os.kill(int(path.read_text()), signal.SIGKILL)


def test_a_caller_that_gives_up_leaves_no_process_computing(at: At, tmp_path: Path) -> None:
    pool = Pool(1)

    async def give_up() -> None:
        task = asyncio.create_task(pool.call(at("child_then_hang"), str(tmp_path / "pid"), limit=60))
        while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
            await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.wait({task})

    asyncio.run(give_up())
    assert wait_until_gone(int((tmp_path / "pid").read_text()))
    assert value(pool, at("echo")) == [[], {}]


SCRIPT = """
import asyncio, os, sys, signal, threading, time
from pathlib import Path
from groupwise.workers import Pool, Target
print("begin", flush=True)
pool = Pool(1)
target = lambda name: Target.in_file(Path(sys.argv[1]), name)
print(asyncio.run(pool.call(target("pid"), limit=20)).value, flush=True)
if sys.argv[2] == "hang":
    asyncio.run(pool.call(target("spin"), limit=60))
if sys.argv[2] == "raise":
    raise ValueError
async def lease():
    async with pool.lease() as lease:
        calls = [asyncio.create_task(lease.call(target("hang"), limit=60)) for _ in range(3)]
        await asyncio.sleep(0.3)
        raise ValueError
if sys.argv[2] == "give up":
    try:
        asyncio.run(lease())
    except ValueError:
        pass
"""


@pytest.mark.parametrize(
    ("how", "sent"), [("end", None), ("raise", None), ("give up", None), ("hang", signal.SIGINT), ("hang", signal.SIGKILL)]
)
def test_nothing_is_left_of_a_script_without_a_main_guard(at: At, tmp_path: Path, how: str, sent: signal.Signals | None) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), at("pid").file, how]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "begin\n"
    worker = int(process.stdout.readline())
    if sent is not None:
        time.sleep(0.3)
        process.send_signal(sent)
    process.wait(timeout=20)
    assert wait_until_gone(worker)
    errors = process.stderr.read()
    assert process.stdout.read() == "" and "Exception ignored" not in errors and "was destroyed" not in errors, errors
    if how in ("end", "give up"):
        assert errors == ""
