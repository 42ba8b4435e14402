"""`python -m groupwise.experiments.child PID ...`: `groupwise ...`, asked to stop when PID dies, the process that started it."""

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1
"""The kernel sends the signal when the thread dies that started this process, and again for each thread that is the parent then:
a run may stop at once, and not save its step."""


def main() -> None:
    parent = int(sys.argv.pop(1))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died before
        sys.exit(1)
    runpy.run_module("groupwise", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
