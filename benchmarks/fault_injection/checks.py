"""What a run left, as values that two runs can be compared by."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fault_injection.preload import Fault, Operation
from fault_injection.server import Outcome, Server
from groupwise.errors import UserError
from groupwise.evidence.runs import open_run

OF_THE_CLOCK = ("seconds/", "memory/", "tokens_per_second")
"""Metrics that differ between two runs of the same bits."""
WRITES = ("write", "writev", "pwrite", "sendfile", "copy_file_range")
JOURNALS = ("segments.jsonl", "events.jsonl", "metrics.jsonl", "manifest.json", ".lock")
"""Files that hold times, or tell how often a run was resumed: not compared by their bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """An undisturbed run of a recipe, and states of it that others begin from."""

    name: str
    recipe: Path
    files: dict[str, str]
    """Path -> SHA-256 of what it left."""
    metrics: list[str]
    seconds: float
    operations: list[Operation]
    halfway: Path
    """A copy of the run's directory as a kill before the checkpoint of step 6 left it: two checkpoints, and steps beyond them."""
    resuming: list[Operation]
    """Of a resume from `halfway` to the end; empty where there is no such state."""


def files_of(run: Path) -> dict[str, str]:
    """Path -> SHA-256, of all files but journals."""
    found = {path.relative_to(run): path for path in sorted(run.rglob("*")) if path.is_file() and path.name not in JOURNALS}
    return {str(name): hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}


def tree_of(run: Path) -> dict[str, str]:
    """All that lies in a directory: path -> SHA-256, or "directory"; without the lock."""
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        for path in sorted(run.rglob("*"))
        if path.name != ".lock"
    }


def metrics_of(run: Path) -> list[str]:
    """The lines of metrics.jsonl, without what the clock decides."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    trees = [json.loads(line) for line in lines]
    return [json.dumps({key: value for key, value in tree.items() if not key.startswith(OF_THE_CLOCK)}) for tree in trees]


def differences(run: Path, reference: Reference) -> dict[str, str]:
    """How a run that ended differs from the undisturbed one: path -> what is wrong with it; empty: nothing."""
    found = files_of(run)
    names = sorted(found.keys() | reference.files.keys())
    problems = {
        name: f"{name} {'is missing' if name not in found else 'is left over' if name not in reference.files else 'differs'}"
        for name in names
        if found.get(name) != reference.files.get(name)
    }
    for path in run.rglob(".*"):
        if path.name != ".lock":
            problems[str(path.relative_to(run))] = f"{path.relative_to(run)} is left over"
    for name, problem in (("metrics.jsonl", _metrics_problem(run, reference)), ("segments.jsonl", _segments_problem(run))):
        if problem:
            problems[name] = f"{name}: {problem}"
    return problems


def _metrics_problem(run: Path, reference: Reference) -> str:
    try:
        if (metrics := metrics_of(run)) != reference.metrics:
            steps = [[json.loads(line)["step"] for line in lines] for lines in (metrics, reference.metrics)]
            return f"has steps {steps[0]}, and undisturbed {steps[1]}" if steps[0] != steps[1] else "has other values"
        steps = [record["step"] for record in open_run(run).steps]
    except (OSError, ValueError, UserError) as error:
        return f"cannot be read: {error}"
    return "" if steps == list(range(1, len(steps) + 1)) else f"a report reads steps {steps}"


def _segments_problem(run: Path) -> str:
    """Segments are counted from 0, and begin at steps that ascend from 1."""
    path = run / "segments.jsonl"
    if not path.is_file():
        return "is missing"
    try:
        segments = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        numbers, first = [one["segment"] for one in segments], [one["first_step"] for one in segments]
    except (ValueError, KeyError, TypeError) as error:
        return f"cannot be read: {type(error).__name__} {error}"
    right = numbers == list(range(len(numbers))) and first == sorted(first) and first[:1] == [1]
    return "" if right else f"segments {numbers} begin at steps {first}"


def said_once(outcome: Outcome) -> list[str]:
    """What is wrong with how a command that failed said so."""
    problems = []
    if "Traceback (most recent call last)" in outcome.output:
        problems.append("a traceback")
    if outcome.code not in (0, 1, 2):
        problems.append(f"exit code {outcome.code}")
    messages = [line for line in outcome.output.splitlines() if line.startswith(("error: ", "the run failed: "))]
    if outcome.code in (1, 2) and len(messages) != 1:
        problems.append(f"{len(messages)} messages")
    return problems + unclean(outcome)


def unclean(outcome: Outcome) -> list[str]:
    """Time limit and processes left."""
    late = ["it hung"] if outcome.late else []
    return late + [f"a process was left: {name}" for name in outcome.left]


def complete_checkpoints(done: Sequence[Operation]) -> list[str]:
    """Names of the checkpoints that were whole at some time during these operations."""
    names = [Path(one.target) for one in done if one.name in ("rename", "exchange")]
    return sorted({path.name for path in names if path.parent.name == "checkpoints" and path.name.startswith("step-")})


def lost(run: Path, before: Path | None, done: Sequence[Operation]) -> list[str]:
    """Whether the newest checkpoint is gone, of those that were there in the state `before` and that were written since."""
    old = [path.name for path in (before / "checkpoints").glob("step-*")] if before else []
    written = sorted({*complete_checkpoints(done), *old})
    names = [path.name.removeprefix(".replaced-") for path in (run / "checkpoints").glob("*step-*")]  # killed between two renames
    there = sorted(name for name in names if name.startswith("step-"))
    return [f"{written[-1]} was written and is gone"] if written and (not there or there[-1] < written[-1]) else []


def make_reference(server: Server, name: str, recipe: Path, folder: Path, *, halfway: bool = True) -> Reference:
    """Run a recipe undisturbed and, for trials that begin halfway, up to the checkpoint of step 6 and from there to its end."""
    folder.mkdir(parents=True)
    run = folder / "run"
    train = ["train", recipe, "--out", run]
    whole = server.run(train, run)
    assert whole.code == 0, whole.output
    files, metrics = files_of(run), metrics_of(run)
    shutil.rmtree(run)
    resuming: list[Operation] = []
    if halfway:
        server.run(train, run, Fault(action="kill", at=_begin_of_checkpoint(whole.operations, 6)))
        shutil.copytree(run, folder / "halfway")
        resumed = server.run(["train", "--resume", run], run)
        assert resumed.code == 0, resumed.output
        resuming = resumed.operations
        shutil.rmtree(run)
    return Reference(
        name=name,
        recipe=recipe,
        files=files,
        metrics=metrics,
        seconds=whole.seconds,
        operations=whole.operations,
        halfway=folder / "halfway",
        resuming=resuming,
    )


def _begin_of_checkpoint(done: Sequence[Operation], step: int) -> int:
    recorded = next(i for i, one in enumerate(done) if one.place.startswith(f"rollouts/step-{step:06d}"))
    return next(i for i, one in enumerate(done) if i > recorded and one.place.startswith("checkpoints/"))


def unflushed(done: Sequence[Operation]) -> list[str]:
    """Where a power cut, after which only what was flushed is there, would leave a name without its data.

    A checkpoint, or a file that a resume reads, must be flushed before it gets its name, and the directory of that name before
    anything that it replaces is removed.
    """
    problems: list[str] = []
    dirty: set[str] = set()
    known: set[str] = set()
    waiting: dict[str, str] = {}
    for one in done:
        if one.name in ("open", "open-truncate", "mkdir"):
            known.add(one.path)
        if one.name in (*WRITES, "ftruncate", "open-truncate") or (one.name == "close" and one.path not in known):
            dirty.add(one.path)  # closed under a name that it was not opened by: renamed by a system call that is not seen
        elif one.name == "fsync":
            dirty.discard(one.path)
            waiting.pop(one.path, None)
        elif one.name == "rename":
            inside = [path for path in dirty if path == one.path or path.startswith(one.path + "/")]
            seen = [path for path in inside if not Path(path).name.startswith(".tmp")]
            moved = {path: one.target + path[len(one.path) :] for path in inside}
            dirty = {moved.get(path, path) for path in dirty}
            known |= {one.target + path[len(one.path) :] for path in known if path.startswith(one.path)}
            if _is_read_by_a_resume(one.target):
                problems += [f"{path} gets the name {one.target} before it is flushed" for path in sorted(seen)]
                parent = str(Path(one.target).parent)
                waiting["" if parent == "." else parent] = one.target
        elif one.name in ("unlink", "rmdir") and one.path.startswith("checkpoints/step-") and "checkpoints" in waiting:
            problems.append(f"{one.path} is removed before the name {waiting['checkpoints']} is flushed")
    return problems + [f"the name {name} is never flushed" for name in waiting.values()]


def _is_read_by_a_resume(name: str) -> bool:
    others = ("recipe.toml", "metrics.jsonl", "segments.jsonl", "model")
    return name.startswith(("checkpoints/step-", "checkpoints/best")) or name in others
