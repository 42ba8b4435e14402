"""What is served: the page's data, kept up to date while somebody looks at it, and its changes for each who does."""

import asyncio
import hashlib
import os
import re
import secrets
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from groupwise.errors import UserError, first_line
from groupwise.evidence.document import document
from groupwise.evidence.following import Followed, Following, addable
from groupwise.evidence.live.patches import patches
from groupwise.evidence.naming import run_id
from groupwise.evidence.runs import Run
from groupwise.evidence.shapes import Document
from groupwise.evidence.status import status
from groupwise.text import json_line, visible

QUICKEST, USUAL = 0.5, 1.3
"""Seconds between two looks at the runs: at least, and at most where looking is cheap."""
AIM, LIMIT = 0.01, 0.1
"""Which share of a core looking should take, for which it may wait up to `USUAL`; and the share for which it may wait up to
`LONGEST`."""
LONGEST, MEASURED = 5.0, 5
"""Seconds between two looks at most; and the last looks over which their cost is measured: one that is dear delays no other."""
NEW_RUNS, SCANNING = 5.0, 0.01
"""Seconds between two looks for new runs, at least; and the share of a core that they may take, as in a directory of thousands."""
STATES = 2.0
"""Seconds between two looks whether runs still go on, where they write nothing."""
HEARTBEAT = 10.0
"""Seconds after which something is sent even if nothing changed, so that the page knows that the server lives."""
KEPT = 50
"""How many of the last changes are kept for a page that was away."""
LARGEST = 2**22
"""Bytes of those."""


EMPTY: Document = {
    "title": "",
    "measure": {"en": "", "zh": ""},
    "settings": [],
    "runs": [],
    "tiles": [],
    "summary": [],
    "differences": {"keys": [], "rows": []},
    "comparisons": [],
    "findings": [],
    "events": [],
    "segments": [],
    "left_out": [],
    "marks": [],
    "figures": [],
}
"""Of no runs."""


class Hub:
    """The data of all pages of one server."""

    def __init__(self, following: Following, make: Callable[[Sequence[Run]], Document] = document) -> None:
        self.following, self.make = following, make
        self.instance = secrets.token_hex(4)
        self.version = 0
        self.data: Document | None = None
        self.extra: dict[str, Any] = {}
        """What the page shows beside the document: which paths have no run yet, and how many runs are being read."""
        self.history: deque[tuple[int, bytes]] = deque()
        self.watchers = 0
        self.interval = QUICKEST
        self.closing = False
        self._changed, self._reading = asyncio.Condition(), asyncio.Lock()
        self._wake = asyncio.Event()
        self._next_scan, self._states_seen = 0.0, -STATES
        self._costs: deque[float] = deque(maxlen=MEASURED)
        """Processor seconds of the last looks that found something, without those that read a run from its beginning."""

    # --- keeping it up to date

    async def keep(self) -> None:
        """Look at the runs for as long as the server lives, but only while somebody looks at the page."""
        while not self.closing:
            self._wake.clear()
            if self.watchers:
                await self.refresh()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self.interval if self.watchers else None)

    async def refresh(self) -> None:
        """Look at the runs now, and find out when to look again."""
        async with self._reading:
            first, others = self.data is None, await asyncio.to_thread(self._scan)
            unread = sum(not one.seen for one in self.following)
            if unread and self.data is not None:
                await self._send((self.data, {**self.extra, "reading": unread}))
            found, cost = await asyncio.to_thread(self._read, others)
            if found is not None:
                started = time.thread_time()
                await self._send(found)
                cost += time.thread_time() - started
                if not first and not unread and not any(one.anew for one in self.following if one.run is not None):
                    self._costs.append(cost)
        usual = statistics.median(self._costs) if self._costs else 0.0
        self.interval = wait_after(min(cost, usual))

    async def _send(self, found: tuple[Document, dict[str, Any]]) -> None:
        self._take(found)
        async with self._changed:
            self._changed.notify_all()

    def _scan(self) -> bool:
        """Look for new runs when it is time to; returns whether there are others."""
        now, started = time.monotonic(), time.thread_time()
        if now < self._next_scan:
            return False
        self._next_scan = now + NEW_RUNS
        changed = self.following.look()
        cost = time.thread_time() - started
        if self._next_scan:  # nobody has asked for another look meanwhile
            self._next_scan = now + max(NEW_RUNS, cost / SCANNING)
        return changed

    def _read(self, others: bool) -> tuple[tuple[Document, dict[str, Any]] | None, float]:
        """The data and what is beside it, None if nothing changed, and the processor seconds of finding out."""
        started, found = time.thread_time(), None
        try:
            if self._has_changed() or others or self.data is None:
                found = self._document(), self._beside()
        except Exception as error:  # a run can hold what nobody foresaw; the page then shows what it had, and says so
            found = self.data or EMPTY, self._beside(f"{type(error).__name__}: {first_line(error)}")
        return found, time.thread_time() - started

    def _has_changed(self) -> bool:
        changed, now = self.following.poll(), time.monotonic()
        if not changed and now - self._states_seen >= STATES:  # a run that ends, or is killed, need not write anything
            self._states_seen, known = now, {run["id"]: run["status"]["state"] for run in (self.data or EMPTY)["runs"]}
            changed = any(status(run, time.time())["state"] != known.get(run_id(run)) for run in self.following.runs)
        return changed

    def _document(self) -> Document:
        return self.make(self.following.runs) if self.following.runs else EMPTY

    def _beside(self, problem: str = "") -> dict[str, Any]:
        waiting = [
            [waiting_id(one), visible(str(one.path)), visible(one.reason), one.waits] for one in self.following if one.run is None
        ]
        return {"waiting": waiting, "problem": visible(problem), "reading": 0}

    def _take(self, found: tuple[Document, dict[str, Any]]) -> None:
        (data, extra), before = found, self.data
        patch = patches(before, data) if before is not None else {}
        if extra != self.extra:
            patch["extra"] = extra
        self.data, self.extra = data, extra
        if before is not None and not patch:
            return
        self.version += 1
        if before is not None:
            self.history.append((self.version, _line({"version": self.version, "patch": patch})))
        while len(self.history) > KEPT or sum(len(line) for _, line in self.history) > LARGEST:
            self.history.popleft()

    # --- serving it

    async def messages(self, since: str) -> AsyncIterator[bytes]:
        """Lines of JSON for one page, without end: all data, or what changed since "INSTANCE-VERSION", then every change."""
        self.watchers += 1
        try:
            self._wake.set()
            if self.data is None:
                async with self._changed:
                    await self._changed.wait_for(lambda: self.data is not None or self.closing)
            instance, _, number = since.partition("-")
            version = int(number) if instance == self.instance and re.fullmatch(r"\d{1,12}", number, re.ASCII) else -1
            while True:
                for line in self._news(version):
                    yield line
                version = self.version
                if self.closing:
                    break
                yield _line({"alive": self.interval})
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._news_after(version), HEARTBEAT)
            yield _line({"ended": True})
        finally:
            self.watchers -= 1

    async def _news_after(self, version: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.version != version or self.closing)

    def _news(self, version: int) -> list[bytes]:
        """What a page with the data of this version lacks."""
        if version == self.version:
            return []
        missing = [line for number, line in self.history if number > version]
        if version < 0 or len(missing) != self.version - version:
            return [_line({"instance": self.instance, "version": self.version, "document": self.data, "extra": self.extra})]
        return missing

    async def close(self) -> None:
        """Send what is new a last time, and end."""
        if self.watchers and self.data is not None:
            self._next_scan = 0.0
            await self.refresh()
        self.closing = True
        self._wake.set()
        async with self._changed:
            self._changed.notify_all()

    # --- what a page asks for

    async def add(self, path: Path) -> dict[str, int]:
        """Follow another path; says how many runs are there. What is read meanwhile does not hold it up.

        Raises:
            UserError: there is no run at it, or there are too many.
        """
        found = await asyncio.to_thread(addable, path)
        self.following.add(path, found)
        self._now()
        return {"found": len(found)}

    async def remove(self, wanted: str) -> None:
        """Follow a run no longer. `wanted`: its id in the document, or while it has none that of what is waited for.

        Raises:
            UserError: it is not followed.
        """
        names = {run_id(one.run) if one.run is not None else waiting_id(one): key for key, one in self.following.followed.items()}
        if wanted not in names:
            raise UserError("it is not followed any more")
        self.following.remove(names[wanted])
        self._now()

    def run(self, wanted: str) -> Run | None:
        """The run with an id."""
        return next((one.run for one in self.following if one.run is not None and run_id(one.run) == wanted), None)

    def _now(self) -> None:
        self._next_scan = 0.0
        self._wake.set()


def wait_after(cost: float) -> float:
    """Seconds to the next look after one that took so many processor seconds."""
    return max(QUICKEST, min(cost / AIM, USUAL), min(cost / LIMIT, LONGEST))


def waiting_id(one: Followed) -> str:
    """Of a path at which there is no run (yet)."""
    return "w" + hashlib.blake2b(os.fsencode(one.path), digest_size=5).hexdigest()


def _line(value: dict[str, Any]) -> bytes:
    return (json_line(value, (",", ":")) + "\n").encode()
