"""Builds a box of Linux namespaces around this process and runs a program in it: python -I launcher.py <specification>.

The specification is JSON; see `groupwise.rewards.sandbox.Box`. It runs as a script of its own, with the standard library only.
"ready", or what went wrong before the program could start, is written to the file descriptor `report`, which the program does not
inherit.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x00020000,
    0x02000000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38
NOBODY = 65534
SYSTEM_CALLS = {"pivot_root": 155, "capset": 126} if os.uname().machine == "x86_64" else {"pivot_root": 41, "capset": 91}
"""Numbers of those that the C library has no function for; all machines but x86 share theirs."""


def call(name: str, *arguments: Any) -> None:
    """A function of the C library, or OSError with what it was for."""
    if getattr(LIBC, name)(*arguments) != 0:
        error = ctypes.get_errno()
        shown = ", ".join(str(item) for item in arguments[:3])
        raise OSError(error, f"{name}({shown}): {os.strerror(error)}")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    encoded = [None if item is None else item.encode() for item in (source, target, kind)]
    call("mount", *encoded, ctypes.c_ulong(flags), data.encode())


def enter(uid: int, gid: int) -> None:
    """Go into new namespaces, as their root. Where this user is root, user 1 there is nobody here."""
    maps = {"uid_map": f"0 {uid} 1\n", "setgroups": "deny", "gid_map": f"0 {gid} 1\n"}
    if uid == 0:
        maps = {"uid_map": f"0 0 1\n1 {NOBODY} 1\n", "gid_map": f"0 {gid} 1\n1 {NOBODY} 1\n"}
    ready, entered = os.pipe()
    pid = os.getpid()
    writer = os.fork()  # only a process outside may map more than one user
    if writer == 0:
        os.close(entered)
        os.read(ready, 1)
        try:
            for name, text in maps.items():
                Path(f"/proc/{pid}/{name}").write_text(text)
        except OSError:
            os._exit(1)
        os._exit(0)
    flags = NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS | NEWCGROUP
    try:
        call("unshare", flags)
    finally:
        os.write(entered, b"x")
        _, status = os.waitpid(writer, 0)
    if status != 0:
        raise OSError("the user namespace could not be given a user")


def build_root(specification: dict[str, Any]) -> None:
    """A root of its own: an empty one in memory, with the interpreter and its libraries read-only, and /tmp."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    root = specification["root"]
    mount("box", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={specification['disk']},nr_inodes=4096,mode=755")
    for path in specification["readable"]:
        place = Path(root + path)
        if Path(path).is_symlink():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(Path(path).readlink())
            continue
        bind(path, place)
    for device in ("null", "zero", "urandom", "random"):
        bind(f"/dev/{device}", Path(f"{root}/dev/{device}"))
    for name in ("tmp", "proc"):
        Path(root, name).mkdir(mode=0o755, exist_ok=True)  # it is there where the interpreter lies below /tmp
    Path(root, "tmp").chmod(0o1777)
    mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.chdir(root)
    call("syscall", ctypes.c_long(SYSTEM_CALLS["pivot_root"]), b".", b".")
    call("umount2", b".", MNT_DETACH)  # what was the root before
    os.chdir("/tmp")


def bind(path: str, place: Path) -> None:
    """Show a file or directory read-only at `place`."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if Path(path).is_dir():
        place.mkdir(exist_ok=True)
    else:
        place.touch()
    mount(path, str(place), None, MS_BIND)
    kept = os.statvfs(place).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)  # which the kernel lets no one take off here
    relatime = os.statvfs(place).f_flag & (1024 | 2048 | 4096)
    atime = {1024: 1 << 10, 2048: 1 << 11, 4096: 1 << 21}
    flags = sum(atime[bit] for bit in atime if relatime & bit)
    device = 0 if path.startswith("/dev/") else MS_NODEV
    mount(None, str(place), None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | device | kept | flags)


def drop_privileges(user: int | None) -> None:
    """No capabilities, none to be had again, and within a box of namespaces no further ones."""
    if user is not None:
        Path("/proc/sys/user/max_user_namespaces").write_text("0")
    for capability in range(64):
        LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    if user:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    call("syscall", ctypes.c_long(SYSTEM_CALLS["capset"]), header, ctypes.create_string_buffer(24))
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # which a change of user takes back
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def limit(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def wait(child: int) -> None:
    """End as the child ends."""
    while True:
        pid, status = os.wait()  # as the first process of its namespace it also collects orphans
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def fork() -> None:
    """Go on in a child, which dies with this process; this process ends as the child does."""
    child = os.fork()
    if child:
        wait(child)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def run(specification: dict[str, Any]) -> None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    user = None
    if specification["namespaces"]:
        uid, gid = os.geteuid(), os.getegid()
        enter(uid, gid)
        fork()  # the first process of the new namespace
        build_root(specification)
        user = 1 if uid == 0 else 0
    drop_privileges(user)
    limit(specification["limits"])
    if specification["namespaces"]:
        fork()  # the kernel spares the first process of a namespace signals that must end a program
    command = specification["command"]
    os.write(specification["report"], b"ready")
    os.execve(command[0], command, specification["environment"])


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    try:
        os.umask(0o022)
        os.set_inheritable(given["report"], False)
        run(given)
    except (OSError, KeyError, ValueError) as failure:
        os.write(given["report"], str(failure).encode())
        os._exit(1)
