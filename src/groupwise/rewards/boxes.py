"""The command that builds a box of each kind, and what of the kernel confines a program in it."""

import marshal
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from groupwise.rewards.filters import has_seccomp, landlock_abi, seccomp_filter

Kind = Literal["bubblewrap", "namespaces", "landlock", "processes"]
Ending = Literal["done", "failed", "timeout", "output", "memory", "processes"]
LAUNCHER = Path(__file__).with_name("launcher.py")
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
"""All environment variables of a program."""
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache")
"""What of the system an interpreter needs."""


class SandboxError(RuntimeError):
    """The box could not be built, so that nothing is known of the program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    seconds: float = 6.0
    """By the wall clock from when the program is given, and of CPU time of each process; infinite: no limit."""
    memory: int = 1 << 30
    """Bytes of address space of each process, and resident of all together."""
    processes: int = 32
    """At once."""
    output: int = 1 << 20
    """Bytes of output, and of any file."""
    disk: int = 64 << 20
    """Bytes in the box's /tmp, which lies in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a program ended."""

    ending: Ending
    """"done": with exit code 0. "failed": with another, or by a signal. Others: over that limit, of all processes together."""
    stdout: str
    stderr: str


def command(
    kind: Kind,
    interpreter: str,
    descriptors: Mapping[str, int],
    limits: Limits,
    packages: list[str],
    readable: Sequence[str] = (),
) -> list[str]:
    """The command that builds a box and runs a program in it.

    Args:
        kind: of box.
        interpreter: the path of Python.
        descriptors: file descriptors: `program` holds it, a byte from `go` lets it start, and to `report` the launcher writes.
        limits: of the program.
        packages: directories that Python imports from, besides the standard library's.
        readable: further paths that the program may read.
    """
    own = kind in ("bubblewrap", "namespaces")
    wanted = [*SYSTEM, sys.base_prefix, interpreter, *packages, *readable]
    shown = _outermost(
        [
            *wanted,
            *(os.path.realpath(path) for path in wanted),
            *([str(LAUNCHER)] if kind == "bubblewrap" else []),
        ]
    )
    counts = {
        **({"CPU": int(limits.seconds) + 1} if limits.seconds < math.inf else {}),
        "AS": limits.memory,
        "FSIZE": limits.output,
        "NOFILE": 64,
        "NPROC": limits.processes,
        "CORE": 0,
        "MSGQUEUE": 0,
    }
    specification = {
        "namespaces": kind == "namespaces",
        "own_processes": own,
        "own_files": own,
        "root": "/sys",  # a directory that every Linux has, and no interpreter lies in
        "readable": shown,
        "disk": limits.disk,
        "memory": limits.memory,
        "processes": limits.processes,
        "limits": counts,
        **confinement(kind),
        "packages": packages,
        **descriptors,
    }
    launch = [interpreter, "-I", "-S", str(LAUNCHER), marshal.dumps(specification).hex()]
    return [*_bubblewrap(shown, limits), *launch] if kind == "bubblewrap" else launch


def _bubblewrap(shown: Sequence[str], limits: Limits) -> list[str]:
    options = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--dev", "/dev", "--proc", "/proc"]
    options += ["--as-pid-1"]  # the watch, to which no process of its namespace can send a signal that it does not expect
    options += ["--size", str(limits.disk), "--tmpfs", "/tmp"]  # before what may lie in it
    for path in shown:
        link = Path(path).is_symlink()
        options += ["--symlink", str(Path(path).readlink()), path] if link else ["--ro-bind", path, path]
    options += ["--remount-ro", "/dev", "--remount-ro", "/"]  # memory without a limit
    return [shutil.which("bwrap") or "bwrap", *options, "--chdir", "/tmp", "--"]


def confinement(kind: Kind) -> dict[str, Any]:
    """Landlock's version and the filter of system calls, where the kernel has them.

    Raises:
        SandboxError: this kind needs what the kernel does not have.
    """
    if kind == "processes":
        return {"landlock": 0, "filter": b""}
    own, abi, filtered = kind != "landlock", landlock_abi(), has_seccomp()
    if not own and not (abi and filtered):
        raise SandboxError(f"{kind}: the kernel has no {'filter of system calls' if abi else 'Landlock'} here")
    code = seccomp_filter(os.uname().machine, own_files=own, signals=own or abi >= 6) if filtered else b""
    return {"landlock": abi, "filter": code}


def _outermost(paths: list[str]) -> list[str]:
    """The paths that exist and lie in no other one of them."""
    there = sorted({path for path in paths if Path(path).exists()})
    return [path for path in there if not any(path.startswith(other.rstrip("/") + "/") for other in there)]
