"""Processes that tell each other that they run: one that stands still breaks no connection, so that waiting would not end."""

import math
import os
import sys
import threading
from collections import Counter
from contextlib import suppress

from torch.distributed.distributed_c10d import Store

LOOKS = 2.0
"""Seconds between two looks at the others, at most."""
GRACE = 10.0
"""Seconds in which a process ends by itself after the one that keeps the store."""
ALIVE = "groupwise/alive"
"""Where in the store each process counts its looks."""


def watch(store: Store, rank: int, size: int, limit: float) -> threading.Event:
    """Watch the other processes in a thread, until the event is set. When one has not said for `limit` seconds that it runs, this
    process ends with the code 1: its end breaks its connections, which the others see at once."""
    ended = threading.Event()
    own = store.clone()  # type: ignore[attr-defined]  # calls of one store wait for each other
    arguments = (own, rank, size, limit, ended)
    threading.Thread(target=_watch, args=arguments, name="watch of the other processes", daemon=True).start()
    return ended


def _watch(store: Store, rank: int, size: int, limit: float, ended: threading.Event) -> None:
    looks = min(LOOKS, limit / 10)
    # Looks are counted, and not seconds: while this process stands still itself, the others are not silent.
    seen, silent = dict[int, int](), Counter[int]()
    with suppress(RuntimeError):  # whoever keeps the store has ended, unseen by one that waits for a process that stands still
        while not ended.wait(looks):
            store.add(f"{ALIVE}/{rank}", 1)
            for other in {*range(size)} - {rank}:
                count = store.add(f"{ALIVE}/{other}", 0)
                silent[other] = 0 if seen.get(other) != count else silent[other] + 1
                seen[other] = count
                if silent[other] >= math.ceil(limit / looks) and not ended.is_set():
                    text = f"process {other} of the learner stands still: it has not answered process {rank} for {limit:g} s"
                    print(text, file=sys.stderr, flush=True)
                    os._exit(1)
    if not ended.wait(GRACE):
        os._exit(1)
