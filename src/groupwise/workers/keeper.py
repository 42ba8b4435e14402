"""The program beside a worker process: it starts the worker, and ends all that the user's code has started with it.

    the process that trains ── keeper ── worker ── whatever the user's code starts

On Linux everything below stays below: what a worker starts, and lets go of as a daemon does, becomes the keeper's child, and is
killed when the worker ends, when the keeper is told to end (SIGTERM), or when the process that trains has ended, however that
came about. The keeper runs no code of the user's and holds none of the worker's pipes. It imports the standard library only.

With COMMAND for a program, the worker is any command: a sampler or a learner of a run of several processes.
"""

import contextlib
import ctypes
import math
import os
import runpy
import signal
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
WAITED_FOR = {signal.SIGTERM, signal.SIGQUIT, signal.SIGCHLD}
COMMAND = "--command"
"""In place of a Python program: the arguments after the parent's process id are the seconds that a command has to end by itself
once it is told to (SIGTERM; SIGQUIT gives it none), and the command."""
LOOKS = 0.5
"""Seconds between two looks whether the parent is still there. The kernel's own signal would come as soon as the thread that
started the keeper ends, and a command may have been started by any thread."""


def prctl(option: int, value: int) -> None:
    """Linux's call of that name; elsewhere nothing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value)


def keep(worker: int, parent: int, grace: float = 0.0) -> int:
    """Wait for the worker, to be told to end, or for the parent's end; then end everything. Returns the worker's wait status.

    Args:
        grace: seconds that the worker has to end by itself.
    """
    status, deadline = None, math.inf
    while status is None and time.monotonic() < deadline:
        number = heard()
        if number == signal.SIGCHLD:
            status = reap(worker)
        elif number == signal.SIGQUIT:
            break
        elif deadline == math.inf and (number == signal.SIGTERM or os.getppid() != parent):
            deadline = time.monotonic() + grace
            if grace:
                os.kill(worker, signal.SIGTERM)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker, signal.SIGKILL)
    while True:
        for child in children():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGKILL)
        try:
            pid, ended = os.waitpid(-1, 0)
        except ChildProcessError:  # none is left
            return status or 0
        status = ended if pid == worker else status


def heard() -> int | None:
    """The next signal, or None where none has come for a moment."""
    if not hasattr(signal, "sigtimedwait"):  # macOS, where the end of the parent is not noticed
        return signal.sigwait(WAITED_FOR)
    found = signal.sigtimedwait(WAITED_FOR, LOOKS)
    return None if found is None else found.si_signo


def reap(worker: int) -> int | None:
    """Take note of every child that has ended; returns the worker's wait status if it is among them."""
    status = None
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            status = found[1] if found[0] == worker else status
    return status


def children() -> list[int]:
    """This process's children, those that have ended included."""
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():  # noqa: PTH112, PTH208 pathlib is slow to import
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
                if int(file.read().rpartition(b")")[2].split()[1]) == os.getpid():
                    found.append(int(name))
    return found


def end_like(status: int) -> None:
    """End this process as the worker ended."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


def limit_worker() -> None:
    """In the worker: end with the keeper, leave no dump of memory, and be the first to go where memory runs out."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with contextlib.suppress(OSError, ValueError, ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
        file.write("1000")


def run(program: str) -> None:
    """The worker's own work."""
    if program != COMMAND:
        runpy.run_path(program, run_name="__main__")
        return
    try:
        os.execvp(sys.argv[1], sys.argv[1:])
    except OSError as error:
        print(f"{sys.argv[1]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)


def main() -> None:
    program, parent = sys.argv[1], int(sys.argv[2])
    del sys.argv[1:3]
    grace = float(sys.argv.pop(1)) if program == COMMAND else 0.0
    signal.pthread_sigmask(signal.SIG_BLOCK, WAITED_FOR)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    if program != COMMAND:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it has ended before the line above
        os._exit(0)
    keeper = os.getpid()
    worker = os.fork()
    if worker == 0:
        os.setsid()
        limit_worker()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WAITED_FOR)
        if os.getppid() == keeper:
            run(program)
        os._exit(0)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    end_like(keep(worker, parent, grace))


if __name__ == "__main__":
    main()
