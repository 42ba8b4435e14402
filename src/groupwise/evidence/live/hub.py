"""What is served: the page's data, kept up to date while somebody looks at it, and its changes for each who does."""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from groupwise.errors import UserError, first_line
from groupwise.evidence.document import document
from groupwise.evidence.following import Following
from groupwise.evidence.live.patches import patches
from groupwise.evidence.naming import run_id
from groupwise.evidence.runs import Run
from groupwise.evidence.shapes import Document
from groupwise.text import json_line

QUICKEST, USUAL = 0.5, 1.0
"""Seconds between two looks at the runs: at least, and at most where looking is cheap."""
AIM, LIMIT = 0.02, 0.1
"""Which share of a core looking should take, for which it may wait up to `USUAL`; and the share that it never exceeds."""
NEW_RUNS = 5.0
"""Seconds between two looks for new runs."""
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
        """What the page shows beside the document: which paths have no run yet."""
        self.history: deque[tuple[int, bytes]] = deque()
        self.watchers = 0
        self.interval = QUICKEST
        self.closing = False
        self._changed, self._reading = asyncio.Condition(), asyncio.Lock()
        self._wake = asyncio.Event()
        self._looked = -NEW_RUNS

    # --- keeping it up to date

    async def keep(self) -> None:
        """Look at the runs for as long as the server lives, but only while somebody looks at the page."""
        while not self.closing:
            self._wake.clear()
            if self.watchers:
                first, cost = self.data is None, await self.refresh()
                if not first:  # which reads everything there is, and loads what reads it
                    self.interval = max(QUICKEST, min(cost / AIM, USUAL), cost / LIMIT)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self.interval if self.watchers else None)

    async def refresh(self) -> float:
        """Look at the runs now; returns the processor seconds that it took."""
        async with self._reading:
            found, cost = await asyncio.to_thread(self._read)
            if found is not None:
                started = time.thread_time()
                self._take(found)
                async with self._changed:
                    self._changed.notify_all()
                cost += time.thread_time() - started
        return cost

    def _read(self) -> tuple[tuple[Document, dict[str, Any]] | None, float]:
        """The data and what is beside it, None if nothing changed, and the processor seconds of finding out."""
        started, changed = time.thread_time(), False
        if time.monotonic() - self._looked >= NEW_RUNS:
            changed, self._looked = self.following.look(), time.monotonic()
        changed = self.following.poll() or changed or self.data is None
        found = self._document() if changed else None
        return found, time.thread_time() - started

    def _document(self) -> tuple[Document, dict[str, Any]]:
        waiting = [[str(one.path), one.reason] for one in self.following if one.run is None]
        runs = [one.run for one in self.following if one.run is not None]
        try:
            return self.make(runs) if runs else EMPTY, {"waiting": waiting, "problem": ""}
        except Exception as error:  # a run can hold what nobody foresaw, and the page then shows what it had, and says so
            return self.data or EMPTY, {"waiting": waiting, "problem": f"{type(error).__name__}: {first_line(error)}"}

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
            version = int(number) if instance == self.instance and number.isascii() and number.isdecimal() else -1
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
            self._looked = -NEW_RUNS
            await self.refresh()
        self.closing = True
        self._wake.set()
        async with self._changed:
            self._changed.notify_all()

    # --- what a page asks for

    async def add(self, path: Path) -> None:
        """Follow another path.

        Raises:
            UserError: there is no run at it.
        """
        async with self._reading:
            await asyncio.to_thread(self.following.add, path)
        self._now()

    async def remove(self, wanted: str) -> None:
        """Follow a run no longer. `wanted`: its id in the document, or its path while it has none.

        Raises:
            UserError: it is not followed.
        """
        async with self._reading:
            names = {
                run_id(one.run) if one.run is not None else str(one.path): key for key, one in self.following.followed.items()
            }
            if wanted not in names:
                raise UserError("it is not followed any more")
            self.following.remove(names[wanted])
        self._now()

    def run(self, wanted: str) -> Run | None:
        """The run with an id."""
        return next((one.run for one in self.following if one.run is not None and run_id(one.run) == wanted), None)

    def _now(self) -> None:
        self._looked = -NEW_RUNS
        self._wake.set()


def _line(value: dict[str, Any]) -> bytes:
    return (json_line(value, (",", ":")) + "\n").encode()
