"""The process beside a run that sends it to one tracker: `python -m groupwise.trackers NAME RUN`, started by the run.

It ends, with everything sent, once its standard input is closed: when the run is over, or was killed.
"""

import os
import select
import sys
from pathlib import Path

from groupwise.trackers.replay import Replay, locked

PATIENCE = 1.0
"""Seconds between two looks at metrics.jsonl."""


def main(tracker: str, run: Path) -> None:
    os.nice(10)  # the run goes first
    parent = os.getppid()
    with locked(run, tracker, wait=True):
        replay = Replay(run, tracker)
        try:
            over = False
            while not over:
                closed = select.select([sys.stdin], [], [], PATIENCE)[0]
                over = bool(closed) or os.getppid() != parent  # found before looking, so that nothing is missed
                replay.send_new()
        finally:
            replay.finish()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
