"""The preloaded library that counts file operations: compiled, and told what to do."""

import ctypes
import errno
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ACTIONS = {"count": 0, "kill": 1, "fail": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens to a process at one of its file operations."""

    action: Literal["count", "kill", "fail"] = "count"
    at: int = 0
    """The number of the operation, from 0, before which the process is killed, or which fails."""
    half: bool = False
    """Where that operation is a write: do half of it first."""
    error: int = errno.ENOSPC
    """What the operation fails with, an errno."""
    lasting: bool = True
    """Later operations fail, too."""
    denied: str = ""
    """A file that cannot be opened, relative to the run's directory."""

    def __str__(self) -> str:
        half = ", half of it done" if self.half else ""
        texts = {
            "count": "undisturbed",
            "kill": f"killed before operation {self.at}{half}",
            "fail": f"{errno.errorcode[self.error]} at operation {self.at}{half}{'' if self.lasting else ' only'}",
        }
        return texts[self.action] if not self.denied else f"{self.denied} unreadable"


@dataclass(frozen=True, slots=True)
class Operation:
    """One that changes something in a run's directory."""

    name: str
    path: str
    """Relative to the directory."""
    target: str
    """Of a rename or link: the other name."""
    size: int
    """Bytes of a write."""

    @property
    def place(self) -> str:
        """The path that it changes in the end: of a rename what it leads to."""
        return self.target or self.path


def operations(log: Path) -> list[Operation]:
    """What the library logged, in order."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    fields = [line.split("\t") for line in lines]
    return [Operation(name, path, target, int(size)) for _, name, path, target, size in fields]


def compile_library(folder: Path) -> Path | None:
    """The library, compiled into `folder`; None where there is no C compiler or no LD_PRELOAD."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or os.uname().sysname != "Linux":
        return None
    library = folder / "preload.so"
    source = Path(__file__).parent / "preload.c"
    command = [compiler, "-O2", "-Wall", "-fPIC", "-shared", source, "-o", library, "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    return library


def arm(library: ctypes.CDLL, directory: Path, log: Path, fault: Fault) -> None:
    """Let the library, which this process was started with, count from now on in this process."""
    numbers = (ACTIONS[fault.action], ctypes.c_long(fault.at), int(fault.half), fault.error, int(fault.lasting))
    library.fault_arm(str(directory).encode(), str(log).encode(), *numbers, fault.denied.encode())


def environment(library: Path, directory: Path, log: Path, fault: Fault) -> dict[str, str]:
    """Environment variables with which a process of its own counts from its start, as in a shell: LD_PRELOAD=... FAULT_AT=..."""
    numbers = {"ACTION": ACTIONS[fault.action], "AT": fault.at, "HALF": int(fault.half), "ERROR": fault.error}
    numbers["LASTING"] = int(fault.lasting)
    texts = {"DIRECTORY": str(directory), "LOG": str(log), "DENIED": fault.denied}
    return {"LD_PRELOAD": str(library), **{f"FAULT_{name}": str(value) for name, value in {**numbers, **texts}.items()}}
