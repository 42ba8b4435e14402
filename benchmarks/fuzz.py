"""Thousands of damaged and absurd inputs through the real commands: none may give a traceback, or take long or much memory.

    python benchmarks/fuzz.py [--count 5000] [--kind recipes] [--first 0]

A case holds when the command ends by itself with exit code 0 or 2 (or 1 where it trains or scores, which may fail on its way)
within 20 seconds of computing, raises nothing unexpected, prints no traceback, and the process has grown by less than 4 GiB.
Nothing is trained: `sft` stops where its first update would begin, `ablate` where its first run would. A case is made from its
kind and number alone; --first N --count 1 repeats one.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["GROUPWISE_TRACEBACK"] = "1"  # what nobody expected is raised, and not made a message

import fuzz_cases as cases
import typer
from typer.testing import CliRunner

import groupwise.experiments.ladder as ladders
from groupwise.cli import app
from groupwise.models import LanguageModel
from groupwise.training import sft

LIMIT_S = 20
LIMIT_GIB = 4.0
"""A new model of transformers' default sizes, which a recipe may well ask for, takes 3.4."""
HEADROOM_GIB = 8
"""Data above what the process has; an allocation beyond it fails, so that no case can take the machine's memory."""
KINDS = ("recipes", "ladders", "sft", "data", "runs")
MAY_FAIL = ("sft", "eval", "ablate", "track")
"""Commands that begin something which can fail on its way, with exit code 1; of the others' input nothing may be left to fail."""
BLOCK = 250
"""Cases in a process."""


class TooLong(BaseException):
    """A case is over its time; no `except Exception` stops it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a case."""

    kind: str
    number: int
    arguments: list[str]
    code: int | None
    seconds: float
    grown_gib: float
    fault: str
    """Why it does not hold; empty: it does."""
    output: str


def made(kind: str, number: int, home: Path) -> cases.Case:
    """The arguments of a case; its files are written below `home`."""
    rng = random.Random(f"{kind}/{number}")
    match kind:
        case "recipes":
            return cases.recipe(rng, home)
        case "ladders":
            return cases.ladder(rng, home)
        case "sft":
            return cases.sft(rng, home)
        case "data":
            return cases.data(rng, home)
    return cases.runs(rng, home, sound_run())


@cache
def sound_run() -> Path:
    """A run of two steps, trained once."""
    path = Path(tempfile.gettempdir()) / f"groupwise-fuzz-run-{os.getuid()}"
    if not (path / "model" / "config.json").is_file():
        shutil.rmtree(path, ignore_errors=True)
        sets = ["training.steps=2", "training.eval_problems=4", "training.eval_every=1", "rollouts.prompts_per_step=4"]
        command = [sys.executable, "-m", "groupwise", "train", "quick", *(f"--set={pair}" for pair in sets), "--out", str(path)]
        subprocess.run(command, check=True, capture_output=True)
    return path


def _over(signum: int, frame: FrameType | None) -> None:
    raise TooLong("".join(traceback.format_stack(frame)[-8:]))


@contextlib.contextmanager
def nothing_trained() -> Iterator[None]:
    """Within: what trains stops where it would begin, and the shipped model is read once."""

    def begin(*_: Any, **named: Any) -> Any:
        raise typer.Exit

    def nothing_to_run(*_: Any) -> list[Any]:
        return []

    load, loaded = LanguageModel.load, dict[str, Any]()

    def load_once(path: str, **settings: Any) -> Any:
        key = f"{path} {sorted(settings.items(), key=lambda item: item[0])}"
        if settings.get("lora") is not None:
            return load(path, **settings)
        if key not in loaded:
            loaded[key] = load(path, **settings)
        return loaded[key]

    before = sft.train_step, ladders.run_all
    sft.train_step, ladders.run_all = begin, nothing_to_run  # type: ignore[assignment]
    LanguageModel.load = load_once  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        sft.train_step, ladders.run_all = before
        LanguageModel.load = load  # type: ignore[method-assign]


def attempt(kind: str, number: int) -> Outcome:
    """Run a case in this process."""
    home, here = Path(tempfile.mkdtemp(prefix="fuzz-")), Path.cwd()
    arguments: cases.Case = []
    fault, code, output = "", None, ""
    try:
        arguments = made(kind, number, home)
        os.chdir(home)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here
        memory, started = _peak_gib(), time.perf_counter()
        for number_of_signal in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number_of_signal, _over)
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)  # of computing; a machine that others share takes longer
        signal.alarm(6 * LIMIT_S)
        try:
            result = CliRunner().invoke(app, arguments)
            code, output = result.exit_code, result.output
            error = result.exception
            if error is not None and not isinstance(error, SystemExit):
                fault = f"{type(error).__name__}: {str(error)[:200]}"
        except TooLong as error:
            fault, output = f"longer than {LIMIT_S} s", str(error)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
        seconds, grown = time.perf_counter() - started, _peak_gib() - memory
    finally:
        os.chdir(here)
        shutil.rmtree(home, ignore_errors=True)
    if not fault and "Traceback (most recent call last)" in output:
        fault = "a traceback is printed"
    if not fault and code not in ((0, 1, 2) if arguments[0] in MAY_FAIL else (0, 2)):
        fault = f"exit code {code}"
    if not fault and grown > LIMIT_GIB:
        fault = f"{grown:.1f} GiB"
    if not fault and len(output) > 200_000:
        fault = f"{len(output):,} characters of output"
    return Outcome(
        kind=kind,
        number=number,
        arguments=arguments,
        code=code,
        seconds=seconds,
        grown_gib=grown,
        fault=fault,
        output=output[-2000:],
    )


def _peak_gib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def bound_memory() -> None:
    """An allocation far beyond what a case may take fails in this process."""
    size = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (size + HEADROOM_GIB * 2**30, resource.RLIM_INFINITY))


def block(kind: str, first: int, count: int) -> None:
    """Cases in this process, one line of JSON each."""
    bound_memory()
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="backslashreplace")
    with nothing_trained():
        for number in range(first, first + count):
            lines.write(json.dumps({"begun": number}) + "\n")
            lines.flush()
            lines.write(json.dumps(asdict(attempt(kind, number))) + "\n")
            lines.flush()


def campaign(kind: str, first: int, count: int) -> list[Outcome]:
    """Cases of a kind, in processes of `BLOCK` each; one that dies is a case that fails."""
    found: list[Outcome] = []
    at = first
    while at < first + count:
        size = min(BLOCK, first + count - at)
        command = [sys.executable, __file__, "--kind", kind, "--first", str(at), "--count", str(size), "--block"]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
        outcomes = [Outcome(**record) for record in records if "begun" not in record]
        found += outcomes
        for outcome in outcomes:
            if outcome.fault:
                print(f"{kind} {outcome.number}: {outcome.fault}   {outcome.arguments[:4]}\n{outcome.output[-600:]}", flush=True)
        begun = [record["begun"] for record in records if "begun" in record]
        at = (begun[-1] if begun else at + size - 1) + 1
        if len(outcomes) < len(begun) or not begun:
            fault = f"the process ended with {done.returncode}: {done.stderr[-300:]}"
            found.append(
                Outcome(kind=kind, number=at - 1, arguments=[], code=None, seconds=0, grown_gib=0, fault=fault, output="")
            )
        _show(kind, found, first + count - at)
    return found


def _show(kind: str, found: list[Outcome], left: int) -> None:
    held = sum(not outcome.fault for outcome in found)
    print(f"{kind}: {held:,} of {len(found):,} hold, {left:,} to go", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--block", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.block:
        block(options.kind[0], options.first, options.count)
        return
    sound_run()
    failed = []
    for kind in options.kind or KINDS:
        found = campaign(kind, options.first, options.count)
        faults = [outcome for outcome in found if outcome.fault]
        codes = {code: sum(outcome.code == code for outcome in found) for code in (0, 1, 2)}
        slowest = max(found, key=lambda outcome: outcome.seconds)
        print(
            f"{kind}: {len(found) - len(faults):,} of {len(found):,} hold; exit codes {codes}; slowest {slowest.seconds:.1f} s "
            f"(case {slowest.number}), most memory {max(outcome.grown_gib for outcome in found):.2f} GiB"
        )
        for outcome in faults:
            print(f"  {kind} {outcome.number}: {outcome.fault}   {outcome.arguments[:4]}")
        failed += faults
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
