"""Builds a box around this process and runs a program in it: python -I -S launcher.py <specification>.

The specification is a mapping (`groupwise.rewards.boxes.command`), by marshal, in hexadecimal digits. It runs as a script of its
own and imports little, since every program waits for it to start. Lines are written to the file descriptor `report`, which the
program does not have and which is closed when the box has ended: "ready" when the program can start, "error" and what went wrong
before, "memory" or "processes" when it is ended for taking too many.
"""

import _signal as signal  # type: ignore[import-not-found]  # the module signal takes as long to import as all the others
import ctypes
import marshal
import os
import resource
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
NEW_NAMESPACES = 0x7E020000  # of mounts, cgroups, host names, IPC, users, processes, network
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
READ, WRITE, MAKE_DEVICE = 0b1101, 0b10, 1 << 6 | 1 << 11
"""Rights of Landlock: to execute, read and list; to write; to make devices."""
OF_A_FILE = 0b111 | 1 << 14 | 1 << 15
"""The rights that a file can have: the others are of directories."""
HEARD = {signal.SIGCHLD, signal.SIGTERM}
INTERVAL = 0.02
"""Seconds between two looks at how much a box takes."""
PAGE = os.sysconf("SC_PAGE_SIZE")
NOBODY = 65534
SYSTEM_CALLS = {"pivot_root": 155, "capset": 126} if os.uname().machine == "x86_64" else {"pivot_root": 41, "capset": 91}
"""Numbers of those that the C library has no function for; all machines but x86 share theirs."""


def call(name: str, *arguments: "Any") -> None:
    """A function of the C library, or OSError with what it was for."""
    if getattr(LIBC, name)(*arguments) != 0:
        error = ctypes.get_errno()
        shown = ", ".join(str(item) for item in arguments[:3])
        raise OSError(error, f"{name}({shown}): {os.strerror(error)}")


def read(path: "str | int") -> str:
    with open(path) as file:
        return file.read()


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


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
                write(f"/proc/{pid}/{name}", text)
        except OSError:
            os._exit(1)
        os._exit(0)
    try:
        call("unshare", NEW_NAMESPACES)
    finally:
        os.write(entered, b"x")
        _, status = os.waitpid(writer, 0)
    if status != 0:
        raise OSError("the user namespace could not be given a user")


def build_root(specification: "dict[str, Any]") -> None:
    """A root of its own: an empty one in memory, with the interpreter and its libraries read-only, and /tmp."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    root = specification["root"]
    mount("box", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={specification['disk']},nr_inodes=4096,mode=755")
    for path in specification["readable"]:
        if os.path.islink(path):
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            os.symlink(os.readlink(path), root + path)
        else:
            bind(path, root + path)
    for device in ("null", "zero", "urandom", "random"):
        bind(f"/dev/{device}", f"{root}/dev/{device}")
    for name in ("tmp", "proc"):
        os.makedirs(f"{root}/{name}", 0o755, exist_ok=True)  # it is there where the interpreter lies below /tmp
    os.chmod(f"{root}/tmp", 0o1777)
    mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    os.chdir(root)
    call("syscall", ctypes.c_long(SYSTEM_CALLS["pivot_root"]), b".", b".")
    call("umount2", b".", MNT_DETACH)  # what was the root before
    os.chdir("/tmp")


def bind(path: str, place: str) -> None:
    """Show a file or directory read-only at `place`."""
    directory = os.path.isdir(path)
    os.makedirs(place if directory else os.path.dirname(place), exist_ok=True)
    if not directory:
        write(place, "")
    mount(path, place, None, MS_BIND)
    kept = os.statvfs(place).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)  # which the kernel lets no one take off here
    relatime = os.statvfs(place).f_flag & (1024 | 2048 | 4096)
    atime = {1024: 1 << 10, 2048: 1 << 11, 4096: 1 << 21}
    flags = sum(atime[bit] for bit in atime if relatime & bit)
    device = 0 if path.startswith("/dev/") else MS_NODEV
    mount(None, place, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | device | kept | flags)


def drop_privileges(user: int | None) -> None:
    """No capabilities, none to be had again; `user`: become this one first."""
    for capability in range(64):
        LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    if user:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    header, none = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0)), ctypes.create_string_buffer(24)
    call("syscall", ctypes.c_long(SYSTEM_CALLS["capset"]), header, none)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # which a change of user takes back, as
    LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # the right to read its own /proc/self
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def user_of_its_own(paths: "list[str]") -> int | None:
    """For root in a box that shares this machine's processes: a user that runs nothing else, so that processes are counted.
    It must be able to read these paths."""
    if os.geteuid() != 0:
        return None
    for path in paths:
        needed, place = 0o005 if os.path.isdir(path) else 0o004, path
        while os.stat(place).st_mode & needed == needed and place != "/":
            needed, place = 0o001, os.path.dirname(place)
        if place != "/":
            raise OSError(f"programs run as another user than root, who may not read {place}: use a Python that all may run")
    first, _, count = map(int, read("/proc/self/uid_map").split()[:3])
    top = min(first + count, 1 << 30)
    return top - 1 - int.from_bytes(os.urandom(4), "little") % max(1, min(1 << 20, top // 2))


def limit(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def threads_of(user: int) -> int:
    """How many threads a user runs, which its limit of processes counts."""
    found = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                found += entry.stat().st_uid == user and os.stat(f"{entry.path}/task").st_nlink - 2
            except OSError:  # it has ended
                continue
    return found


def landlock(abi: int, readable: list[str], writable: list[str]) -> None:
    """Confine this process by Landlock: files that it may read and write; no TCP; no signal or abstract socket to outside."""
    files = (1 << 13 if abi < 2 else 1 << 14 if abi < 3 else 1 << 15 if abi < 5 else 1 << 16) - 1
    confined = struct.pack("QQQ", files, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    rules = LIBC.syscall(ctypes.c_long(444), confined, ctypes.c_size_t(len(confined)), ctypes.c_uint(0))
    if rules < 0:
        raise OSError(ctypes.get_errno(), f"landlock_create_ruleset: {os.strerror(ctypes.get_errno())}")
    allowed = [*((path, READ) for path in readable), *((path, files & ~MAKE_DEVICE) for path in writable)]
    devices = [("/dev/null", READ | WRITE), *((f"/dev/{name}", READ) for name in ("zero", "urandom", "random"))]
    for path, rights in [*allowed, *devices]:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        given = rights if os.path.isdir(path) else rights & OF_A_FILE
        call("syscall", ctypes.c_long(445), rules, 1, struct.pack("=Qi", given, place), ctypes.c_uint(0))
        os.close(place)
    call("syscall", ctypes.c_long(446), rules, ctypes.c_uint(0))
    os.close(rules)


def refuse_system_calls(code: bytes) -> None:
    held = ctypes.create_string_buffer(code)
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(held)))
    call("prctl", PR_SET_SECCOMP, 2, program, 0, 0)


class Watch:
    """The first process of a box: waits for the program, and ends the box when it ends or takes too much."""

    def __init__(self, specification: "dict[str, Any]") -> None:
        self.report, self.own_processes = specification["report"], specification["own_processes"]
        self.memory, self.processes = specification["memory"], specification["processes"]

    def until_the_end_of(self, child: int) -> None:
        try:  # before any number of other processes, where this user may
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        except OSError:
            pass
        status = None
        while status is None:
            heard = signal.sigtimedwait(HEARD, INTERVAL)
            status = self.collect(child)
            if status is None and heard is not None and heard.si_signo == signal.SIGTERM:
                break
            if status is None and (excess := self.excess()):
                os.write(self.report, f"{excess}\n".encode())
                break
        self.end()
        code = 1 if status is None else os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)

    def collect(self, child: int) -> int | None:
        """The program's status if it has ended; orphans are collected too."""
        found = None
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == child:
                    found = ended[1]
        except ChildProcessError:
            pass
        return found

    def excess(self) -> str | None:
        """Which limit of all processes together is exceeded."""
        there = self.others()
        if len(there) > self.processes:
            return "processes"
        resident = sum(resident_bytes(pid) for pid in there)
        if resident <= self.memory:
            return None
        # What processes share is counted once; but looking closer takes long, which a program can make longer.
        return "memory" if resident > 2 * self.memory or sum(map(own_bytes, there)) > self.memory else None

    def others(self) -> list[int]:
        """All processes of the box but this."""
        if self.own_processes:
            return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) not in (1, os.getpid())]
        found, parents = [], [os.getpid()]
        while parents:
            under = [pid for parent in parents for pid in children_of(parent)]
            found += under
            parents = under
        return found

    def end(self) -> None:
        """Kill every process of the box. Those of a namespace die with its first process; otherwise all are stopped, so that none
        can fork on, and then killed; orphans come to this process, so none is left when it has no children."""
        if self.own_processes:
            return
        while True:
            stopped: set[int] = set()
            while more := set(self.others()) - stopped:
                for pid in more:
                    send(pid, signal.SIGSTOP)
                stopped |= more
            for pid in stopped:
                send(pid, signal.SIGKILL)
            try:
                while os.waitpid(-1, 0):
                    pass
            except ChildProcessError:
                return


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except OSError:  # it has ended
        return


def children_of(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += map(int, read(f"/proc/{pid}/task/{thread}/children").split())
    except OSError:  # it has ended
        return found
    return found


def resident_bytes(pid: int) -> int:
    try:
        return int(read(f"/proc/{pid}/statm").split()[1]) * PAGE
    except (OSError, IndexError):  # it has ended
        return 0


def own_bytes(pid: int) -> int:
    """Resident memory, of pages that processes share a share."""
    try:
        lines = read(f"/proc/{pid}/smaps_rollup").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):  # it may not be looked into, or has ended
        return resident_bytes(pid)


def wait(child: int) -> None:
    """End as the child ends."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


def confine(specification: "dict[str, Any]") -> None:
    """What only the program is held by, not the process that watches it."""
    readable = specification["readable"] + (["/proc"] if specification["own_processes"] else [f"/proc/{os.getpid()}"])
    if specification["landlock"]:
        landlock(specification["landlock"], readable, ["/tmp"] if specification["own_files"] else [])
    if specification["filter"]:
        refuse_system_calls(specification["filter"])


def run(specification: "dict[str, Any]") -> "dict[str, Any]":
    """Build the box; returns in the process of the program, with what the program is run by."""
    own, limits = specification["own_processes"], specification["limits"]
    user = None
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL if own else signal.SIGTERM, 0, 0, 0)
    if specification["namespaces"]:
        uid, gid = os.geteuid(), os.getegid()
        enter(uid, gid)
        child = os.fork()  # the first process of the new namespace
        if child:
            wait(child)
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        build_root(specification)
        write("/proc/sys/user/max_user_namespaces", "0")
        user = 1 if uid == 0 else None
    elif not own:
        paths = [sys.executable, os.path.realpath(sys.executable), *specification["readable"]]
        user = user_of_its_own(paths) if specification["landlock"] else None
        if user is None:
            limits["NPROC"] += threads_of(os.getuid())
    if own:
        drop_privileges(user)
    call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
    LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # the program, the same user, may not open the watch's memory or files
    child = os.fork()  # the kernel spares the first process of a namespace signals that must end a program
    if child:
        Watch(specification).until_the_end_of(child)
    LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if not own:
        os.setpgid(0, 0)  # a signal to its process group reaches no one else
        drop_privileges(user)
    limit(limits)
    confine(specification)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)
    return scope_of(specification)


def scope_of(specification: "dict[str, Any]") -> "dict[str, Any]":
    """A module of its own for the program, as if the interpreter had been started for it."""
    import site  # which has not looked for packages, since the interpreter was started with -S

    site.setquit()
    sys.path += specification["packages"]
    sys.argv = ["program.py"]
    sys.modules["__main__"] = module = type(sys)("__main__")
    module.__dict__["__builtins__"] = __builtins__
    return module.__dict__


if __name__ == "__main__":
    given = marshal.loads(bytes.fromhex(sys.argv[1]))
    try:
        os.umask(0o022)
        scope = run(given)
        os.write(given["report"], b"ready\n")
    except (OSError, KeyError, ValueError) as failure:
        os.write(given["report"], f"error {failure}\n".encode())
        os._exit(1)
    os.close(given["report"])
    if not os.read(given["go"], 1):  # the process that started this one has ended
        os._exit(1)
    source = read(given["program"])
    os.closerange(3, 1 << 20)
    exec(compile(source, "program.py", "exec"), scope)
