"""Who calls code that misbehaves, and what may come of it.

python -m tests.misbehaviour_matrix [KIND...]      runs all of it, and prints how much of it held
"""

import asyncio
import gc
import os
import random
import re
import resource
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

from groupwise.config import Source
from groupwise.environments.find import Found, kind_of
from groupwise.environments.hosting import Host
from groupwise.environments.instance import EnvironmentFailed
from groupwise.environments.kinds import Kind
from groupwise.errors import UserError
from groupwise.rewards.settings import RewardSettings
from groupwise.tasks.user import UserTask
from groupwise.types import Problem
from tests.conftest import said
from tests.misbehaviour import ACTIONS, CODE, ENDED, ENDLESS, HARMLESS, OTHERS, POISONED, RAISED, VALUES

MARK = "GROUPWISE_TEST"
"""In the environment of every process that a test starts, and of what these start."""
LIMIT = 1.0
PROBLEM = Problem(id="p", prompt="p", answer="a")
FAILURES = {"raised", "timeout", "died", "too large", "bad result", "wrong type", "wrong count", "not finite", "none"}
Outcome = tuple[str, str]
"""What came of it, a failure's cause or "value", and its text."""
Call = Callable[[str], Awaitable[Outcome]]
_environments: dict[Path, Kind] = {}


def write(home: Path) -> None:
    (home / "code.py").write_text(f"{CODE}\nNAMES = {['fine', *ACTIONS, *VALUES]!r}\n")


def rewarded(name: str) -> Callable[[Path], Call]:
    """Who calls a reward function."""

    def build(home: Path) -> Call:
        settings = RewardSettings(reward=f"code.py:{name}", reward_timeout=LIMIT, reward_workers=1)
        settings.open_rewards(Source(home / "r.toml", ""), home, prompt_key="prompt", answer_key="answer")

        async def call(doing: str) -> Outcome:
            first, *_ = await settings.score(PROBLEM, [said(doing), said("x")])
            return (first.failure, first.detail) if first.failure is not None else ("value", str(first.reward))

        return call

    return build


def in_environment(method: str) -> Callable[[Path], Call]:
    """Who calls a method of an environment."""

    def build(home: Path) -> Call:
        host = Host(LIMIT)
        if home not in _environments:
            _environments[home] = kind_of(Found.of("code.py:Environment", home), [])
        kind = _environments[home]

        async def call(doing: str) -> Outcome:
            async with host.instances(kind, 1) as (instance,):
                try:
                    await instance.reset({"doing": doing if method == "reset" else "fine"})
                    if method == "reset":
                        return "value", "None"
                    result = await instance.call(method, {"name": doing})
                except EnvironmentFailed as error:
                    return error.cause, error.detail
                return "raised" if result.error else "value", result.content

        return call

    return build


def in_task(method: str) -> Callable[[Path], Call]:
    """Who calls a method of a task."""

    def build(home: Path) -> Call:
        task = UserTask.build({"name": "code.py:Task", "reward_timeout": LIMIT}, Source(home / "r.toml", ""))

        async def call(doing: str) -> Outcome:
            if method == "score":
                (score,) = await task.score(PROBLEM, [said(doing)])
                return (score.failure, score.detail) if score.failure is not None else ("value", str(score.reward))
            try:
                position = ["fine", *ACTIONS, *VALUES].index(doing)
                return "value", (await asyncio.to_thread(task.problem, position, 0)).id
            except UserError as error:
                found = re.search(r"\): (\w[\w ]*): ", str(error))
                return found[1] if found and found[1] in FAILURES else "raised", str(error)

        return call

    return build


KINDS = {
    "reward": rewarded("reward"),
    "async reward": rewarded("reward_async"),
    "reset": in_environment("reset"),
    "tool": in_environment("tool"),
    "async tool": in_environment("asynchronous"),
    "task score": in_task("score"),
    "task problem": in_task("problem"),
}
_tasks: dict[tuple[str, Path], Call] = {}


def expected(kind: str, doing: str) -> set[str]:
    """What may come of it."""
    if doing in ENDLESS:
        return {"timeout", "died"}
    if doing in ENDED:
        return {"died", "timeout"}
    if doing in RAISED:
        return {"raised"}
    return {"value"} if doing in HARMLESS else {"value", *FAILURES}


async def check(kind: str, doing: str, home: Path) -> str:
    """What is wrong; nothing if it held."""
    if "task" in kind:  # whose process takes long to start
        call = _tasks.get((kind, home)) or _tasks.setdefault((kind, home), await asyncio.to_thread(KINDS[kind], home))
    else:
        call = await asyncio.to_thread(KINDS[kind], home)
    began = time.monotonic()
    outcome, text = await asyncio.wait_for(call(doing), 60)
    seconds = time.monotonic() - began
    if outcome not in expected(kind, doing):
        return f"{outcome}: {text:.200}"
    # An asynchronous call that holds up its process is repeated alone, after it was asked whether it still answers. A task's
    # process imports PyTorch when it is started again.
    if seconds > LIMIT + 5 + ("async" in kind) * (LIMIT + 3) + ("task" in kind) * 15:
        return f"it took {seconds:.1f} s"
    if len(text) > 5000:
        return f"a text of {len(text)} characters"
    after, text = await asyncio.wait_for(call("fine"), 60)
    if after != "value" and doing not in POISONED:
        return f"the next call: {after}: {text:.200}"
    return ""


async def check_all(
    pairs: Sequence[tuple[str, str]], home: Path, at_once: int, note: Callable[[str], None] = lambda _: None
) -> list[str]:
    """What is wrong, of each that did not hold."""
    room, wrong = asyncio.Semaphore(at_once), list[str]()

    async def one(kind: str, doing: str) -> None:
        async with room:
            try:
                problem = await check(kind, doing, home)
            except BaseException as error:  # whatever it is, it escaped
                problem = f"escaped: {type(error).__name__}: {error}"
            if problem:
                wrong.append(f"{kind}, {doing}: {problem}")
            note(f"{kind}, {doing}: {problem or 'held'}")

    await asyncio.gather(*(one(*pair) for pair in pairs))
    return wrong


def left(mark: str) -> list[int]:
    """Processes that live, but for this one, of those with the mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
                if alive and f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def left_after(mark: str, seconds: float = 10.0) -> list[int]:
    """Those that are left when some time has passed. Pools that nobody holds are closed."""
    gc.collect()
    deadline = time.monotonic() + seconds
    while (found := left(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def share(kind: str, count: int) -> list[tuple[str, str]]:
    """Some of the ways, a seeded choice of each group."""
    rng = random.Random(kind)
    groups = [ENDLESS, ENDED, RAISED, HARMLESS, OTHERS, VALUES]
    return [(kind, name) for group in groups for name in rng.sample(group, min(count, len(group)))]


def main(kinds: Sequence[str]) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # for `memory`
    os.environ[MARK] = str(os.getpid())
    total = held = 0
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        for kind in kinds or KINDS:
            # What problem() hangs in is ended after five minutes, and what it returns is no value of these.
            names = [*ACTIONS, *VALUES] if kind != "task problem" else [*ENDED, *RAISED, *HARMLESS]
            pairs = [(kind, name) for name in names]
            wrong = asyncio.run(check_all(pairs, Path(folder), 2 if "task" not in kind else 1))
            print(f"{kind}: held {len(pairs) - len(wrong)} of {len(pairs)}", *wrong, sep="\n  ", flush=True)
            total, held = total + len(pairs), held + len(pairs) - len(wrong)
            _tasks.clear()
    print(f"held {held} of {total}; processes left: {len(left_after(os.environ[MARK]))}")


if __name__ == "__main__":
    main(sys.argv[1:])
