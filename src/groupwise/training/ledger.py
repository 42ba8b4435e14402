"""What became of every group: ledger.jsonl, one line for each step of the run as it stands.

Groups have positions, 0, 1, 2, … in the order in which they were begun, and their random numbers follow from them. Each is used
up exactly once: trained on, or dropped for a reason. A step that is done again, after a resume, has the line of the last time.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from groupwise import files
from groupwise.training.collect import Collected, in_order, positions
from groupwise.training.metrics_file import METRICS, TRAINED, append_line, parse, read, set_aside

LEDGER = "ledger.jsonl"
MOST_PROBLEMS = 20
"""That `check` lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The groups that a step used up, and those under way when it began."""

    step: int
    """Counted from 1."""
    trained: list[int]
    """Positions of the groups that were trained on, ascending."""
    dropped: Mapping[str, list[int]] = field(default_factory=dict)
    """Of those that never will be, by reason."""
    attempts: Mapping[int, int] = field(default_factory=dict)
    """How often groups were asked for, by position, where a sampler was lost or silent and it was more than once."""
    begun: int
    """Groups begun so far."""
    running: list[int]
    """Positions of those being made, ascending."""
    finished: list[int]
    """Of those that are finished and wait for a later step, ascending."""

    @classmethod
    def of(cls, step: int, collected: Collected) -> "Entry":
        used = in_order([*collected.groups, *collected.never_trained])
        dropped = {reason: positions(groups) for reason, groups in collected.dropped.items()}
        dropped["too old"] = positions(collected.expired)
        frontier = collected.frontier
        return cls(
            step=step,
            trained=positions(collected.groups),
            dropped={reason: found for reason, found in dropped.items() if found},
            attempts={group.position: group.attempts for group in used if group.attempts > 1 and group.position is not None},
            begun=frontier.begun,
            running=list(frontier.running),
            finished=list(frontier.finished),
        )

    @property
    def line(self) -> bytes:
        """As it stands in the file."""
        record: dict[str, Any] = {"step": self.step, "trained": self.trained, "dropped": dict(self.dropped)}
        if self.attempts:
            record["attempts"] = {str(position): count for position, count in self.attempts.items()}
        record |= {"begun": self.begun, "running": self.running, "finished": self.finished}
        return (json.dumps(record, separators=(",", ":")) + "\n").encode()

    @classmethod
    def read(cls, line: bytes) -> "Entry | None":
        """The entry in a line; None if it is none: cut short by a kill, or damaged."""
        record = parse(line)
        try:
            return None if record is None else cls(
                step=record["step"],
                trained=[int(position) for position in record["trained"]],
                dropped={str(reason): [int(position) for position in found] for reason, found in record["dropped"].items()},
                attempts={int(position): int(count) for position, count in record.get("attempts", {}).items()},
                begun=int(record["begun"]),
                running=[int(position) for position in record["running"]],
                finished=[int(position) for position in record["finished"]],
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError):
            return None


class Ledger:
    """The file of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._done = 0
        """The last step that it has a line of."""

    def append(self, entry: Entry) -> None:
        """Add a step's entry, unless it is there already.

        Raises:
            DiskError: it cannot be written, and is as it was.
        """
        if entry.step > self._done:
            append_line(self.path, entry.line)
            self._done = entry.step

    def sync(self) -> None:
        """Have all of it on the disk."""
        if self.path.exists():
            files.sync(self.path)

    def clear(self) -> None:
        """Begin again."""
        if self.path.exists():
            files.write_atomically(self.path, b"")
        self._done = 0

    def rewind(self, step: int) -> str | None:
        """Keep the entries up to `step`; what comes after will be done again.

        Returns:
            What is wrong with the file; None if nothing is. A damaged one is kept beside the one with what could be read of it.

        Raises:
            UserError: it is there, and the system refuses to read it.
        """
        content = read(self.path)
        self._done = step
        if content is None:  # removed, or the run is older than ledgers
            return f"{self.path.name} is missing; what became of the groups of steps 1 to {step} is not known" if step else None
        kept = {entry.step: entry for entry in entries(content) if entry.step <= step}
        text = b"".join(entry.line for _, entry in sorted(kept.items()))
        first = min(kept, default=step + 1)
        lost = [number for number in range(first, step + 1) if number not in kept]
        said = None
        if lost:
            aside = set_aside(self.path, content)
            said = f"{self.path.name} is damaged; it is kept as {aside.name}; {len(lost)} of steps {first} to {step} are lost"
        if text != content:
            files.write_atomically(self.path, text)
        return said


def entries(content: bytes) -> Iterator[Entry]:
    """Those that can be read."""
    return (entry for line in content.splitlines() if (entry := Entry.read(line)) is not None)


def read_entries(run: Path) -> list[Entry] | None:
    """Those of a run, as far as they can be read; None if it has no ledger.

    Raises:
        UserError: the system refuses to read it.
    """
    content = read(run / LEDGER)
    return None if content is None else list(entries(content))


def describe(found: Sequence[Entry]) -> list[str]:
    """For a person to read: how many groups were used up how, and how many are under way."""
    if not found:
        return ["no step is recorded"]
    dropped: Counter[str] = Counter()
    for entry in found:
        dropped.update({reason: len(of) for reason, of in entry.dropped.items()})
    again = [count for entry in found for count in entry.attempts.values()]
    trained, last = sum(len(entry.trained) for entry in found), found[-1]
    why = f" ({', '.join(f'{count:,} {reason}' for reason, count in sorted(dropped.items()))})" if dropped else ""
    lines = [
        f"{len(found):,} steps, {last.begun:,} groups begun: {trained:,} trained on, {dropped.total():,} dropped{why}",
        f"under way when step {last.step} began: {len(last.running):,} being made, {len(last.finished):,} finished",
    ]
    if again:
        lines.append(f"{len(again):,} groups were asked for more than once, one of them {max(again)} times")
    return lines


def check_run(run: Path) -> list[str]:
    """What is wrong with the ledger of a run, as `check` says, or with its steps beside those of metrics.jsonl.

    Raises:
        UserError: the system refuses to read them.
    """
    found = read_entries(run)
    if found is None:
        return ["the run has no ledger"]
    known = {entry.step for entry in found}
    records = [parse(line) for line in (read(run / METRICS) or b"").splitlines()]
    alone = [record["step"] for record in records if record and TRAINED in record and record["step"] not in known]
    return check(found) + (
        [f"{len(alone)} steps are recorded in {METRICS} alone, the first of them step {alone[0]}"] if alone else []
    )


def check(found: Iterable[Entry]) -> list[str]:
    """What contradicts that each group is used up exactly once: [] if nothing does.

    After each step, the positions of groups begun are those of groups used up, running and finished, each in one of these.

    Args:
        found: entries in the order of the steps.
    """
    problems: list[str] = []
    unused, begun, last = set[int](), 0, 0
    """Positions of groups begun and not used up; how many were begun; the step before."""
    for entry in found:
        where = f"step {entry.step}"
        if entry.step != last + 1:  # what came between is not known: count from here
            problems.append(f"{where} comes after step {last}")
            last, begun, unused = entry.step, entry.begun, {*entry.running, *entry.finished}
            continue
        last = entry.step
        if entry.begun < begun:
            problems.append(f"{where}: {entry.begun} groups were begun, and {begun} before it")
        unused |= set(range(begun, entry.begun))
        begun = max(begun, entry.begun)
        fates = {"trained on": entry.trained, **{f"dropped ({reason})": of for reason, of in entry.dropped.items()}}
        for fate, of_fate in fates.items():
            for position in of_fate:
                if position in unused:
                    unused.remove(position)
                else:
                    problems.append(f"{where}: group {position} is {fate}, and was used up before, or never begun")
        waiting = [*entry.running, *entry.finished]
        problems += [f"{where}: group {position} is lost" for position in sorted(unused - set(waiting))]
        problems += [f"{where}: group {position} is under way again" for position in sorted(set(waiting) - unused)]
        if len(waiting) != len(set(waiting)):
            problems.append(f"{where}: a group is listed twice among those under way")
        unused = set(waiting)
        if len(problems) >= MOST_PROBLEMS:
            return problems[:MOST_PROBLEMS]
    return problems
