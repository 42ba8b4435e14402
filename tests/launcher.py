"""Starts `groupwise` many times in processes of their own, for tests that send real signals: what takes seconds to import is
imported once, and each process is forked from there before anything else has happened.

As a script it is that first process. It reads one JSON object a line, starts what it says, and answers with the process id; when
that process has ended, another line says its exit status.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def serve() -> None:
    import transformers  # noqa: F401

    import groupwise.cli
    import groupwise.training.session

    lock = threading.Lock()

    def say(answer: dict[str, Any]) -> None:
        with lock:
            print(json.dumps(answer), flush=True)

    say({"ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            for number, path in enumerate((os.devnull, order["stdout"], order["stderr"])):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), number)
            if os.isatty(1):
                import fcntl
                import termios

                fcntl.ioctl(1, termios.TIOCSCTTY, 0)
            sys.argv = ["groupwise", *order["arguments"]]
            exec(order["before"], {})
            groupwise.cli.main()
            return
        say({"pid": pid})
        threading.Thread(target=lambda pid=pid: say({"ended": pid, "status": os.waitpid(pid, 0)[1]})).start()


class Running:
    """A process that was started."""

    def __init__(self, launcher: "Launcher", pid: int, output: Path) -> None:
        self.launcher, self.pid, self.output = launcher, pid, output

    def send(self, *numbers: int) -> None:
        for number in numbers:
            os.kill(self.pid, number)

    def wait_for(self, what: Path | Callable[[], bool], seconds: float = 240.0) -> None:
        """Until a file exists, or something is true."""
        deadline = time.monotonic() + seconds
        while not (what.exists() if isinstance(what, Path) else what()):
            assert self.code is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.02)

    @property
    def code(self) -> int | None:
        status = self.launcher.ended.get(self.pid)
        return None if status is None else os.waitstatus_to_exitcode(status)

    def ends(self, seconds: float = 240.0) -> int:
        """Its exit code, as `subprocess` has it."""
        deadline = time.monotonic() + seconds
        while self.code is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if self.code is None:
            os.kill(self.pid, 9)
            raise AssertionError(f"still running after {seconds} s: {self.text}")
        return self.code

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""


class Launcher:
    """The first process."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "COLUMNS": "200"},
        )
        self.ended: dict[int, int] = {}
        self._pids: list[int] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            answer = json.loads(line)
            if "pid" in answer:
                self._pids.append(answer["pid"])
            elif "ended" in answer:
                self.ended[answer["ended"]] = answer["status"]

    def start(self, arguments: Sequence[object], output: Path, *, stdout: str | None = None, before: str = "") -> Running:
        """`output`: takes standard error, and standard output too where no other file is given. `before`: Python that the process
        runs first."""
        assert self.process.stdin is not None
        count = len(self._pids)
        order = {
            "arguments": [str(argument) for argument in arguments],
            "stdout": stdout or str(output),
            "stderr": str(output),
            "before": before,
        }
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        while len(self._pids) == count:
            assert self.process.poll() is None
            time.sleep(0.01)
        return Running(self, self._pids[-1], output)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


if __name__ == "__main__":
    serve()
