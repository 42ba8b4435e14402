"""metrics.jsonl: one JSON object for each step and each evaluation, each once, with a hash of all that was written."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from groupwise import files
from groupwise.errors import UserError
from groupwise.files import Digest

METRICS = "metrics.jsonl"
TRAINED = "reward/mean"
"""A metric that every training step has, and no evaluation."""


class MetricsFile:
    """The records of a run, on the disk and as a hash."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._set(b"", [])

    def _set(self, content: bytes, records: Sequence[Mapping[str, Any]]) -> None:
        self._hash, self._size = hashlib.sha256(content), len(content)
        self._known = {_kind(record) for record in records}
        self.evaluations = [dict(record) for record in records if TRAINED not in record]

    @property
    def digest(self) -> Digest:
        """Of all that was written."""
        return Digest(self._size, self._hash.hexdigest())

    def append(self, step: int, metrics: Mapping[str, float | list[float]]) -> None:
        """Add a record, unless the step's is there already: a resumed run repeats the last evaluation.

        Raises:
            DiskError: it cannot be written, and is as it was.
        """
        # JSON has no NaN.
        finite = {key: value if isinstance(value, list) or math.isfinite(value) else None for key, value in metrics.items()}
        record = {"step": step, **finite}
        if _kind(record) in self._known:
            return
        line = (json.dumps(record) + "\n").encode()
        append_line(self.path, line)
        self._hash.update(line)
        self._size += len(line)
        self._known.add(_kind(record))
        if TRAINED not in record:
            self.evaluations.append(record)

    def begins(self, digest: Digest) -> bool:
        """Whether this is what the file on the disk begins with."""
        return _begins(self.path.read_bytes(), digest)

    def sync(self) -> None:
        """Have all of it on the disk."""
        if self.path.exists():
            files.sync(self.path)

    def rewind(self, step: int, written: Sequence[Digest]) -> str | None:
        """Keep the records up to `step`; what comes after will be done again.

        Args:
            written: what the file held at that step, by any who knows; empty: nobody does.

        Returns:
            What is wrong with the file; None if nothing is. A damaged one is kept beside the one with what could be read of it.

        Raises:
            UserError: it is there, and the system refuses to read it.
        """
        content = read(self.path)
        problem = "is missing" if content is None else "is damaged"
        content = content or b""
        intact = not written or any(_begins(content, digest) for digest in written)
        kept: dict[tuple[int, bool], tuple[bytes, dict[str, Any]]] = {}
        for line in content.splitlines():
            record = parse(line)
            if record is not None and record["step"] <= step:
                kept.setdefault(_kind(record), (line + b"\n", record))
        said = None
        if not intact:
            lost = step - sum(TRAINED in record for _, record in kept.values())
            aside = set_aside(self.path, content) if content else None
            there = f"; it is kept as {aside.name}" if aside else ""
            said = f"{self.path.name} {problem}{there}; of steps 1 to {step}, {lost or 'none'} cannot be read"
        text = b"".join(line for line, _ in kept.values())
        if text != content or not self.path.exists():
            files.write_atomically(self.path, text)
        self._set(text, [record for _, record in kept.values()])
        return said


def _kind(record: Mapping[str, Any]) -> tuple[int, bool]:
    return record["step"], TRAINED in record


def _begins(content: bytes, digest: Digest) -> bool:
    return len(content) >= digest.bytes and hashlib.sha256(content[: digest.bytes]).hexdigest() == digest.sha256


def read(path: Path) -> bytes | None:
    """What a file of a run holds; None if there is none.

    Raises:
        UserError: the system refuses to read it; it might be whole, and must not be replaced.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; make it readable, or move it away") from error


def parse(line: bytes) -> dict[str, Any] | None:
    """The record in a line; None if it is none: cut short by a kill, or damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def set_aside(path: Path, content: bytes) -> Path:
    """Keep a damaged file as NAME.damaged-N.SUFFIX; one that is kept already is not kept twice."""
    number = 1
    while (aside := path.with_name(f"{path.stem}.damaged-{number}{path.suffix}")).exists():
        if aside.read_bytes() == content:
            return aside
        number += 1
    files.write_atomically(aside, content)
    return aside


def append_line(path: Path, line: bytes) -> None:
    """Add a line to a file, or nothing if there is no room for all of it. A line that a kill cut short is ended first.

    Raises:
        DiskError: it cannot be written, and is as it was.
    """
    with files.explained(path), path.open("a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            line = line if file.read(1) == b"\n" else b"\n" + line
        try:
            view = memoryview(line)
            while view:
                view = view[file.write(view) :]
        except OSError:
            file.truncate(end)
            raise
