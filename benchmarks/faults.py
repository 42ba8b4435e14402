"""Kill runs, damage their directories, fill their disks: does each come back exactly, or say what is wrong?

    python benchmarks/faults.py [--trials 500] [--seed 0] [--only kills damage foreign disks] [--recipes GRPO PPO] [--every]

Six small recipes. kills: SIGKILL before chosen file operations of a run, of its checkpoints and of its resume (--every: each of
them in turn, thousands), and at random instants; then resumed to the end: weights bit-identical, each step once with equal
values.
damage, foreign, disks: --trials each, drawn with the seed from all that there are; --every: all. Prints each failure with
what reproduces it, and a table in Markdown. Needs Linux and a C compiler.
"""

import argparse
import math
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fault_injection import damage, disks, kills
from fault_injection.checks import Reference, make_reference, unflushed
from fault_injection.preload import compile_library
from fault_injection.recipes import RECIPES, write_recipes
from fault_injection.server import Server
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

CAMPAIGNS = ("kills", "damage", "foreign", "disks")
Trial = tuple[str, str, Callable[[], tuple[str, list[str]]]]
"""Its kind, what it is, and what carries it out and returns what came of it and what is wrong with that."""


class Tally:
    """Recipe x kind: how many trials passed. A failure is printed at once."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.counts: dict[str, dict[str, list[bool]]] = {}
        self.failed = 0

    def add(self, recipe: str, kind: str, trial: str, outcome: str, problems: Sequence[str]) -> None:
        self.outcomes[kind, outcome] += 1
        self.counts.setdefault(recipe, {}).setdefault(kind, []).append(not problems)
        if problems:
            self.failed += 1
            print(f"- {recipe}, {kind}, {trial}, {outcome}: {'; '.join(problems)}", flush=True)

    def table(self) -> str:
        """In Markdown: how many passed of how many."""
        lines: list[str] = []
        kinds = dict.fromkeys(kind for row in self.counts.values() for kind in row)
        lines += ["| | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
        every = {kind: [one for row in self.counts.values() for one in row.get(kind, [])] for kind in kinds}
        for name, row in {**self.counts, "all": every}.items():
            cells = (f"{sum(row[kind])} of {len(row[kind])}" if row.get(kind) else "" for kind in kinds)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        passed = [one for row in self.counts.values() for found in row.values() for one in found]
        return "\n".join([*lines, "", f"{sum(passed)} of {len(passed)}", "", *self.ways()])

    def ways(self) -> list[str]:
        """For each kind what came of the trials, and how often."""
        kinds = dict.fromkeys(kind for kind, _ in self.outcomes)
        found = {kind: [f"{outcome} {count}" for (of, outcome), count in self.outcomes.items() if of == kind] for kind in kinds}
        return [f"{kind}: {', '.join(outcomes)}" for kind, outcomes in found.items()]


def trials(
    server: Server, reference: Reference, folder: Path, only: Sequence[str], count: int, rng: random.Random, *, every: bool
) -> Iterator[Trial]:
    """About `count` of each campaign for one recipe."""
    run = folder / "run"

    def some(found: list[Any]) -> list[Any]:
        return found if every else rng.sample(found, min(count, len(found)))

    if "kills" in only:
        yield "flushed", "in order", lambda: ("compared", unflushed(reference.operations) + unflushed(reference.resuming))
        for kill in kills.every(reference) if every else kills.plan(reference, count, rng):
            yield f"kill: {kill.kind}", str(kill), lambda kill=kill: ("resumed", kills.carry_out(server, reference, kill, run))
    if "damage" in only:
        for one in some(damage.plan(reference, rng)):
            yield f"file {one.kind}", str(one), lambda one=one: damage.carry_out(server, reference, one, run)
    if "foreign" in only:
        for name in some(list(damage.FOREIGN)):
            yield "foreign", name, lambda name=name: damage.add_foreign(server, reference, name, run)
    if "disks" in only:
        for disk in some(disks.plan(reference, rng)):
            yield f"disk {disk.kind}", str(disk), lambda disk=disk: disks.carry_out(server, reference, disk, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500, help="of each campaign, over all recipes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=CAMPAIGNS, default=CAMPAIGNS)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--every", action="store_true")
    options = parser.parse_args()
    console = Console(stderr=True)
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="faults-") as home:
        folder = Path(home).resolve()
        library = compile_library(folder)
        if library is None:
            sys.exit("needs Linux and a C compiler")
        paths = {name: path for name, path in write_recipes(folder / "recipes").items() if name in options.recipes}
        columns = (
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[failed]}"),
        )
        with Server(library, list(paths.values()), folder / "server") as server, Progress(*columns, console=console) as progress:
            for number, (name, path) in enumerate(paths.items()):
                reference = make_reference(server, name, path, folder / path.stem)
                share = options.trials // len(paths) + (number < options.trials % len(paths))
                rng = random.Random(f"{options.seed}/{name}")
                todo = list(trials(server, reference, folder, options.only, share, rng, every=options.every))
                bar = progress.add_task(name, total=len(todo), failed="")
                for done, (kind, what, carry_out) in enumerate(todo, start=1):
                    tally.add(name, kind, what, *carry_out())
                    if not console.is_terminal and (done % 50 == 0 or done == len(todo)):
                        progress.print(f"{name}: {done} of {len(todo)}")
                    progress.update(bar, advance=1, failed=f"{tally.failed} failed" if tally.failed else "")
            if "disks" in options.only and disks.may_mount():
                held = sum(path.stat().st_size for path in reference.halfway.rglob("*") if path.is_file()) / 2**20
                for mebibytes in {math.ceil(held * share) for share in (0.05, 0.3, 0.6, 0.9)}:
                    problems = disks.really_full(library, reference, folder / f"{mebibytes}-MiB", mebibytes)
                    tally.add(name, "tmpfs", f"of {mebibytes} MiB", "resumed", problems)
    print(tally.table())
    sys.exit(tally.failed > 0)


if __name__ == "__main__":
    main()
