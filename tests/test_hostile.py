"""Programs that attack what runs them, in each kind of box that this machine can build: none gets out, each ends within its
limit, leaves no process, and this process's memory stays as it is.

GROUPWISE_HOSTILE=all tries each in each kind of box; otherwise those that take until they are stopped are tried in one kind each,
in turn.
"""

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from groupwise.rewards import boxes
from groupwise.rewards.boxes import Limits, SandboxError
from groupwise.rewards.code import judge
from groupwise.rewards.filters import has_seccomp, landlock_abi
from groupwise.rewards.sandbox import Box, why_not
from groupwise.rewards.warm import WAITING
from tests.hostile import REACHING, SEARCH, TAKING, Attack

PUBLIC = ("/usr/bin/python3", "/usr")
"""An interpreter and its prefix that every user can run, where the one that runs the tests lies below /root."""


def holds_with(executable: str, prefix: str) -> bool:
    """Whether Landlock's box can be built with an interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", executable)
        patch.setattr(sys, "base_prefix", prefix)
        try:
            return Box("landlock").run("print(6 * 7)").stdout == "42\n"
        except (SandboxError, OSError):
            return False


PYTHONS = [python for python in ((sys.executable, sys.base_prefix), PUBLIC) if sys.platform == "linux" and holds_with(*python)]
REAL = [
    *(kind for kind in ("bubblewrap", "namespaces") if why_not(kind) is None),
    *(["landlock"] if PYTHONS else []),
]
KINDS = [*REAL, *(["processes"] if why_not("processes") is None else [])]
pytestmark = pytest.mark.skipif(not KINDS, reason="programs can be limited on Linux only")
OWN_PYTHON = sys.executable
SECRET = "f0rty-tw0-is-exp3cted"


@pytest.fixture(scope="module")
def outside(tmp_path_factory: Any) -> Iterator[dict[str, Any]]:
    """What a program could reach if a box did not hold: a file, a process, and sockets."""
    home = tmp_path_factory.mktemp("home")
    home.chmod(0o755)
    canary = home / "canary"
    canary.write_text("canary")
    canary.chmod(0o666)
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        named = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        named.bind(str(home / "socket"))
        (home / "socket").chmod(0o777)
        named.setblocking(False)
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        abstract.bind(f"\0groupwise-{os.getpid()}")
        abstract.listen()
        victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env={"SECRET": SECRET})
        stack.callback(victim.wait)
        stack.callback(victim.kill)
        yield {
            "CANARY": str(canary),
            "TRAINER": os.getpid(),
            "VICTIM": victim.pid,
            "PORT": listening.getsockname()[1],
            "UNIX": str(home / "socket"),
            "ABSTRACT": f"groupwise-{os.getpid()}",
            "SECRET": SECRET[::-1],
        }
        assert victim.poll() is None and canary.read_text() == "canary"
        assert sorted(path.name for path in home.iterdir()) == ["canary", "socket"]
        with pytest.raises(BlockingIOError):
            named.recv(1)


@pytest.fixture(autouse=True)
def readable_python(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if PYTHONS and (parameters.get("kind") == "landlock" or "version" in parameters):
        monkeypatch.setattr(sys, "executable", PYTHONS[0][0])
        monkeypatch.setattr(sys, "base_prefix", PYTHONS[0][1])


def left() -> list[str]:
    """Processes of boxes."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes()
                if b"rewards/launcher.py" in line or b"31.337" in line:
                    found.append(f"{entry.name}: {line[:60]!r}")
    return found


def attack(kind: Any, case: Attack, outside: dict[str, Any]) -> None:
    given = "".join(f"{name} = {value!r}\n" for name, value in outside.items())
    program = given + case.program if case.says else case.program
    before, resident, began = set(left()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    outcome = Box(kind).run(program, limits=Limits(seconds=case.seconds))
    took = time.monotonic() - began
    assert "ESCAPED" not in outcome.stdout, outcome.stdout
    assert outcome.ending in case.endings and case.says in outcome.stdout, outcome
    assert took < case.seconds + 10  # the machine may be busy
    while set(left()) - before:
        assert time.monotonic() - began - took < 5
        time.sleep(0.05)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 32 << 10


def taking() -> list[tuple[str, str]]:
    found = []
    for turn, (name, case) in enumerate(TAKING.items()):
        kinds = KINDS if case.everywhere else REAL
        kinds = kinds if os.environ.get("GROUPWISE_HOSTILE") else [kinds[turn % len(kinds)]]
        found += [(kind, name) for kind in kinds]
    return found


@pytest.mark.parametrize(("kind", "name"), taking() if REAL else [])
def test_a_program_that_takes_too_much_is_stopped(kind: Any, name: str, outside: dict[str, Any]) -> None:
    attack(kind, TAKING[name], outside)


@pytest.mark.parametrize("name", REACHING)
@pytest.mark.parametrize("kind", REAL)
def test_a_program_reaches_nothing_outside(kind: Any, name: str, outside: dict[str, Any]) -> None:
    attack(kind, REACHING[name], outside)


@pytest.mark.parametrize("kind", REAL)
def test_what_is_expected_is_not_in_the_box(kind: Any) -> None:
    """A program that finds it in its memory, files or descriptors would be right; the program of the first line finds a decoy."""
    search = f"REVERSED = {SECRET[::-1]!r}\n{SEARCH}"
    assert Box(kind).run(search).stdout == "seen\n"
    assert Box(kind).run(f"decoy = {SECRET + '!'!r}\n{search}").stdout == SECRET + "!\n"
    tests = json.dumps([{"input": "1", "output": SECRET + "!"}])
    assert judge(tests, f"```python\n{search}\n```", Box(kind)) == "wrong"
    call = json.dumps([{"input": "1", "output": f'"{SECRET}!"', "type": "functional", "fn_name": "f"}])
    search += "\ndef f(x):\n    return needle.decode() + '!' if b'!' in after else ''"
    assert judge(call, f"```python\n{search}\n```", Box(kind)) == "wrong"


@pytest.mark.parametrize("kind", REAL)
def test_boxes_end_with_a_trainer_that_is_killed(kind: Any, tmp_path: Path) -> None:
    """Also daemons in them, and boxes that wait."""
    script = f"""
import sys
sys.executable, sys.base_prefix = {(sys.executable, sys.base_prefix)!r}
from groupwise.rewards import boxes
from groupwise.rewards.boxes import Limits, SandboxError
from groupwise.rewards.sandbox import Box
from groupwise.rewards.warm import WAITING
WAITING.run(Box({kind!r}), "1", "", Limits(seconds=60.0))
print("begins", flush=True)
WAITING.run(Box({kind!r}), {TAKING["daemons in their own sessions"].program + "time.sleep(60)"!r}, "", Limits(seconds=60.0))
"""
    before = set(left())
    trainer = subprocess.Popen([OWN_PYTHON, "-c", script], stdout=subprocess.PIPE)
    assert trainer.stdout is not None and trainer.stdout.readline() == b"begins\n"
    deadline = time.monotonic() + 20
    while len(set(left()) - before) < 12 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(set(left()) - before) >= 12
    trainer.kill()
    trainer.wait()
    while set(left()) - before:
        assert time.monotonic() < deadline + 10
        time.sleep(0.05)


@pytest.mark.skipif("landlock" not in REAL, reason="no Landlock here, or no interpreter that another user than root may run")
@pytest.mark.parametrize("version", range(1, 7))
def test_older_versions_of_landlock_confine_as_much(
    version: int, outside: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a version does not cover (truncating, TCP, devices, signals) the filter of system calls does."""
    if version >= landlock_abi():
        pytest.skip("this kernel's own, or newer")
    monkeypatch.setattr(boxes, "landlock_abi", lambda: version)
    for name in ("reading a file", "writing outside", "processes of others", "signals", "sockets"):
        attack("landlock", REACHING[name], outside)


@pytest.mark.parametrize("kind", [kind for kind in REAL if kind != "landlock"])
def test_namespaces_alone_hide_files_and_processes(kind: Any, outside: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a kernel without Landlock and seccomp."""
    monkeypatch.setattr(boxes, "landlock_abi", lambda: 0)
    monkeypatch.setattr(boxes, "has_seccomp", lambda: False)
    for name in ("reading a file", "reading by links", "environment", "signals", "more privileges"):
        attack(kind, REACHING[name], outside)


@pytest.mark.parametrize(("version", "filtered"), [(0, False), (0, True), (5, True)])
@pytest.mark.parametrize("own", [kind for kind in REAL if kind != "landlock"])
def test_the_watch_is_out_of_reach_on_older_kernels(
    own: Any, version: int, filtered: bool, outside: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if version > landlock_abi() or filtered > has_seccomp():
        pytest.skip("this kernel has less")
    monkeypatch.setattr(boxes, "landlock_abi", lambda: version)
    monkeypatch.setattr(boxes, "has_seccomp", lambda: filtered)
    attack(own, REACHING["the watch over the box"], outside)


@pytest.fixture(autouse=True, scope="module")
def none_waits() -> Iterator[None]:
    yield
    WAITING.close()
