"""Programs that try to get out of a box, or to take more than they may.

Each says ESCAPED where it succeeded at what it must not do. What they try would do no harm if it worked: they look at files and
processes that the test made, send signal 0, and end by themselves after `FUSE` seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass

FUSE = 20
PRELUDE = f"""
import ctypes, errno, gc, json, mmap, os, resource, signal, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
signal.setitimer(signal.ITIMER_REAL, {FUSE})
def escaped(*what):
    os.write(1, f"ESCAPED {{what}}\\n".encode())
def attempt(what, call):
    try:
        result = call()
    except Exception:
        return
    if result is not False:
        escaped(what, repr(result)[:100])
def system(what, number, *arguments, allowed=()):
    ctypes.set_errno(0)
    if number is not None and libc.syscall(ctypes.c_long(number), *arguments) >= 0:
        escaped("system call", what)
X86 = os.uname().machine == "x86_64"
"""
MEANT_TO_END = frozenset({"done", "failed"})
STOPPED = frozenset({"timeout", "output", "memory", "processes", "failed"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    program: str
    endings: frozenset[str] = MEANT_TO_END
    everywhere: bool = True
    """Whether `processes` withstands it too, which limits neither the disk nor what a program reaches."""
    seconds: float = 10.0
    says: str = ""
    """What it must say besides, which shows that it ran."""


def limits(program: str, endings: frozenset[str] = STOPPED, seconds: float = 0.0, everywhere: bool = True) -> Attack:
    seconds = seconds or (1.0 if "timeout" in endings else 10.0)
    return Attack(program=PRELUDE + program, endings=endings, seconds=seconds, everywhere=everywhere)


def reaches(program: str) -> Attack:
    return Attack(program=PRELUDE + program + "\nprint('tried')", everywhere=False, says="tried")


TAKING: Mapping[str, Attack] = {
    "fork bomb": limits("""
while True:
    try:
        os.fork()
    except OSError:
        pass
"""),
    "fork bomb that gives up": limits("while True: os.fork()"),
    "chain of forks": limits(
        """
if os.fork() == 0:
    os.setsid()
    while True:
        if os.fork():
            os._exit(0)
time.sleep(0.3)
""",
        MEANT_TO_END,
    ),
    "bomb of threads": limits("""
while True:
    threading.Thread(target=time.sleep, args=(60,)).start()
"""),
    "zombies": limits(
        """
for i in range(1000):
    try:
        if os.fork() == 0:
            os._exit(0)
    except OSError:
        break
""",
        MEANT_TO_END | {"processes"},
    ),
    "memory of one process": limits("held = []\nwhile True: held.append(bytearray(64 << 20))"),
    "memory of many processes": limits(
        """
for i in range(12):
    if os.fork() == 0:
        break
held = bytearray(200 << 20)
for place in range(0, len(held), 4096):
    held[place] = 1
time.sleep(60)
""",
        frozenset({"memory"}),
        seconds=10.0,
    ),
    "shared memory of many processes": limits(
        """
held = []
for i in range(12):
    if os.fork() == 0:
        shared = mmap.mmap(-1, 200 << 20)
        for place in range(0, len(shared), 4096):
            shared[place] = 1
        break
time.sleep(60)
""",
        frozenset({"memory"}),
        seconds=10.0,
    ),
    "memory in files": limits(
        """
total = 0
try:
    for i in range(1000):
        with open(f"f{i}", "wb") as file:
            total += file.write(bytes(1 << 19))
except OSError as error:
    print(error)
if total > 100 << 20 and os.getcwd() == "/tmp":
    escaped(total)
""",
        MEANT_TO_END | {"memory"},
        everywhere=False,
    ),
    "memory in pipes": limits(
        """
import fcntl
for i in range(30):
    if os.fork() == 0:
        break
held = []
try:
    while True:
        held.append(os.pipe())
        try:
            fcntl.fcntl(held[-1][1], 1031, 1 << 20)
        except OSError:
            pass
        os.set_blocking(held[-1][1], False)
        try:
            while True:
                os.write(held[-1][1], bytes(1 << 16))
        except BlockingIOError:
            pass
except OSError:
    pass
time.sleep(1)
""",
        MEANT_TO_END,
        seconds=6.0,
    ),
    "many files": limits(
        """
made = 0
try:
    while made < 300_000:
        os.close(os.open(f"f{made}", os.O_CREAT | os.O_WRONLY))
        made += 1
except OSError:
    pass
if made == 300_000 and os.getcwd() == "/tmp":
    escaped(made)
""",
        MEANT_TO_END | {"memory", "timeout"},
        everywhere=False,
    ),
    "endless loop": limits("while True: pass"),
    "endless loop in C": limits("sum(iter(int, 1))"),
    "endless output": limits("while True: print('a' * 1000)"),
    "endless complaint": limits("while True: os.write(2, b'a' * 1000)"),
    "huge sparse file": limits("os.ftruncate(1, 1 << 40)", frozenset({"failed"})),
    "output far away": limits("os.pwrite(1, b'a', 1 << 40)", frozenset({"failed"})),
    "sleep that hears nothing": limits("""
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
signal.setitimer(signal.ITIMER_REAL, 0)
while True: time.sleep(60)
"""),
    "stops itself": limits("os.kill(os.getpid(), signal.SIGSTOP)"),
    "never ends its threads": limits("threading.Thread(target=lambda: time.sleep(60)).start()"),
    "loops as it ends": limits("import atexit\natexit.register(lambda: time.sleep(60))"),
    "exit without words": limits("os._exit(0)", frozenset({"done"})),
    "exit": limits("raise SystemExit('enough')", frozenset({"failed"})),
    "exit by the builtin": limits("exit(0)", frozenset({"done"})),
    "kills itself": limits("os.kill(os.getpid(), signal.SIGKILL)", frozenset({"failed"})),
    "segmentation fault": limits("ctypes.string_at(0)", frozenset({"failed"})),
    "abort": limits("os.abort()", frozenset({"failed"})),
    "endless recursion": limits("def f(): return f()\nf()", frozenset({"failed"})),
    "recursion without a limit": limits(
        "sys.setrecursionlimit(1 << 30)\ndef f(): return f()\nf()", frozenset({"failed", "timeout"})
    ),
    "file descriptors": limits("held = []\nwhile True: held.append(os.dup(0))", frozenset({"failed"})),
    "huge file names": limits("open('a' * 100_000, 'w')", frozenset({"failed"})),
    "deep directories": limits(
        """
try:
    for i in range(100_000):
        os.mkdir("d" * 200)
        os.chdir("d" * 200)
except OSError:
    pass
""",
        STOPPED | {"done"},
        everywhere=False,
    ),
    "long integer": limits("print(10 ** 10 ** 8)", STOPPED),
    "text that is not UTF-8": limits("os.write(1, bytes(range(256)) * 100)", frozenset({"done"})),
    "closes everything": limits("os.closerange(0, 1024)", MEANT_TO_END),
    "speaks to every descriptor": limits(
        """
for descriptor in range(3, 1024):
    for text in (b"ready\\n", b"error broken\\n", b"memory\\n"):
        try:
            os.write(descriptor, text)
        except OSError:
            continue
        escaped(descriptor)
""",
        frozenset({"done"}),
    ),
    "daemon": limits(
        """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.execv("/bin/sleep", ["sleep", "31.337"])
    os._exit(0)
time.sleep(0.3)
""",
        frozenset({"done"}),
    ),
    "daemons in their own sessions": limits(
        """
for i in range(10):
    if os.fork() == 0:
        os.setsid()
        time.sleep(31)
""",
        frozenset({"done"}),
    ),
    "lower priority of others": limits("for i in range(8):\n    if os.fork() == 0:\n        break\nwhile True: pass"),
    "a program of NUL bytes": Attack(program="print(1)\0\0\0", endings=frozenset({"failed"})),
    "a program of lone surrogates": Attack(program="print('\ud800')", endings=MEANT_TO_END),
    "a program of a megabyte": Attack(program="x = 1\n" * 170_000 + "print(x)", endings=frozenset({"done"}), seconds=20.0),
    "a program nested deeply": Attack(program="x = " + "(" * 100_000 + ")" * 100_000, endings=frozenset({"failed"})),
    "a program that takes forever to compile": Attack(
        program="x = " + "-" * 90_000 + "1", endings=frozenset({"failed", "timeout"}), seconds=5.0
    ),
}

REACHING: Mapping[str, Attack] = {
    "reading a file": reaches("""
paths = [CANARY, f"/proc/{TRAINER}/root{CANARY}", f"/proc/1/root{CANARY}", f"/proc/self/root{CANARY}", f"/proc/{TRAINER}/cwd/x"]
paths += ["/../../../../" + CANARY, "/etc/passwd", "/etc/shadow", "/root/.bash_history", "/dev/mem", "/dev/kmsg", "/dev/vda"]
paths += ["/proc/kcore", "/proc/kmsg"]
for path in paths:
    attempt(path, lambda: open(path, "rb"))
attempt("listing", lambda: os.listdir(os.path.dirname(CANARY)))
attempt("listing home", lambda: bool(set(os.listdir("/root")) - set(sys.base_prefix.split("/"))))
attempt("running", lambda: __import__("subprocess").run(["/bin/cat", CANARY], capture_output=True).stdout or False)
os.chdir("/")
attempt("relative", lambda: open(CANARY.lstrip("/")))
"""),
    "reading by links": reaches("""
os.chdir("/tmp")
for make in (os.symlink, os.link):
    attempt(make.__name__, lambda: (make(CANARY, "link"), open("link").read())[1])
attempt("directory", lambda: (os.symlink(os.path.dirname(CANARY), "there"), os.listdir("there"))[1])
"""),
    "writing outside": reaches("""
home = os.path.dirname(CANARY)
for path in (CANARY, home + "/new", "/etc/new", "/usr/new", "/var/tmp/new", "/dev/shm/new", "/new", sys.base_prefix + "/new"):
    attempt(path, lambda: open(path, "ab") and os.path.exists(home))
attempt("truncate", lambda: os.truncate(CANARY, 0))
attempt("unlink", lambda: os.unlink(CANARY))
attempt("rename", lambda: os.rename(CANARY, CANARY + "2"))
attempt("mkdir", lambda: os.mkdir(home + "/d"))
attempt("chmod", lambda: os.chmod(CANARY, 0))
attempt("chown", lambda: os.chown(CANARY, os.getuid(), os.getgid()))
attempt("utime", lambda: os.utime(CANARY, (0, 0)))
attempt("setxattr", lambda: os.setxattr(CANARY, "user.x", b"x"))
attempt("mknod", lambda: os.mknod("/tmp/device", 0o60600, os.makedev(254, 0)))
attempt("interpreter", lambda: open(os.__file__, "r+"))
"""),
    "environment": reaches("""
if set(os.environ) - {"PATH", "HOME", "LANG", "OMP_NUM_THREADS", "PWD", "LC_CTYPE"}:
    escaped(dict(os.environ))
for pid in {TRAINER, VICTIM, os.getppid(), 1} - {os.getpid()}:
    attempt(pid, lambda: SECRET.encode()[::-1] in open(f"/proc/{pid}/environ", "rb").read())
"""),
    "processes of others": reaches("""
for pid in (TRAINER, VICTIM):
    for name in ("environ", "maps", "mem", "cmdline", "stat", "status", "fd", "cwd/x", "root/etc/passwd", "auxv"):
        attempt((pid, name), lambda: os.listdir(f"/proc/{pid}/fd") if name == "fd" else open(f"/proc/{pid}/{name}"))
    attempt((pid, "exe"), lambda: os.readlink(f"/proc/{pid}/exe"))
    attempt((pid, "trace"), lambda: libc.ptrace(16, pid, 0, 0) == 0)
    local, remote = (ctypes.c_void_p * 2)(ctypes.addressof(ctypes.create_string_buffer(8)), 8), (ctypes.c_void_p * 2)(4096, 8)
    attempt((pid, "read"), lambda: libc.process_vm_readv(pid, local, 1, remote, 1, 0) >= 0)
    attempt((pid, "limits"), lambda: resource.prlimit(pid, resource.RLIMIT_CPU))
    attempt((pid, "affinity"), lambda: os.sched_setaffinity(pid, {0}))
    attempt((pid, "priority"), lambda: os.setpriority(os.PRIO_PROCESS, pid, 19))
    system("pidfd_getfd", 438, os.pidfd_open(os.getpid()), 0, 0)
    system("kcmp", 312 if X86 else 272, os.getpid(), pid, 0, 0, 0)
"""),
    "signals": reaches("""
for pid in (TRAINER, VICTIM, -VICTIM, -TRAINER):
    attempt(pid, lambda: os.kill(pid, 0))
for pid in (TRAINER, VICTIM):
    attempt((pid, "tgkill"), lambda: libc.syscall(ctypes.c_long(234 if X86 else 131), pid, pid, 0) == 0)
    attempt((pid, "sigqueue"), lambda: libc.sigqueue(pid, 0, 0) == 0)
    attempt((pid, "pidfd"), lambda: signal.pidfd_send_signal(os.pidfd_open(pid), 0))
    import fcntl
    attempt((pid, "owner"), lambda: fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, pid))
"""),
    "kills all that it may": Attack(
        program=PRELUDE + "os.kill(-1, signal.SIGKILL)\ntime.sleep(60)",
        endings=frozenset({"failed", "done", "timeout"}),
        everywhere=False,
        seconds=2.0,
    ),
    "kills its parent": Attack(
        program=PRELUDE + "os.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(60)",
        endings=frozenset({"failed", "timeout"}),
        everywhere=False,
        seconds=2.0,
    ),
    "stops its siblings": Attack(
        program=PRELUDE + "os.kill(-1, signal.SIGSTOP)\nos.kill(os.getppid(), signal.SIGSTOP)\ntime.sleep(60)",
        endings=frozenset({"failed", "timeout"}),
        everywhere=False,
        seconds=2.0,
    ),
    "sockets": reaches("""
for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, socket.AF_PACKET, 40, 38, 16, 21, 29, 31):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
        attempt(("socket", family, kind), lambda: socket.socket(family, kind))
attempt("tcp", lambda: socket.create_connection(("127.0.0.1", PORT), timeout=1))
attempt("udp", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", PORT)))
attempt("datagrams", lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b"x", UNIX))
attempt("stream", lambda: socket.socketpair()[0].sendto(b"x", UNIX))
attempt("bound", lambda: socket.socketpair()[0].bind("\\0abstract"))
attempt("abstract", lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)[0].connect("\\0" + ABSTRACT))
one, other = socket.socketpair()
one.send(b"x")
if other.recv(1) != b"x":
    raise SystemExit("a pair of its own must work")
"""),
    "system calls": reaches("""
numbers = {
    "mount": (165, 40), "umount": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268),
    "open_tree": (428, 428), "fsopen": (430, 430), "ptrace": (101, 117), "bpf": (321, 280), "perf": (298, 241),
    "add_key": (248, 217), "keyctl": (250, 219), "request_key": (249, 218), "userfaultfd": (323, 282), "io_uring": (425, 425),
    "handles": (303, 264), "init_module": (175, 105), "kexec": (246, 104), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "syslog": (103, 116), "acct": (163, 89), "personality": (135, 92), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "adjtimex": (159, 171), "hostname": (170, 161), "domain": (171, 162), "seccomp": (317, 277),
    "memfd": (319, 279), "secret": (447, 447), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186),
    "mq_open": (240, 180),
    "quota": (179, 60), "fanotify": (300, 262), "clone3": (435, 435), "statmount": (457, 457), "future": (500, 500),
    "ioprio": (251, 30), "scheduler": (144, 119), "vhangup": (153, 58), "lookup": (212, 18),
}
nothing = ctypes.create_string_buffer(4096)
for name, both in numbers.items():
    system(name, both[not X86], 0, nothing, 0, 0, 0, 0)
    system(name, both[not X86], nothing, nothing, nothing, 0, nothing, 0)
for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
    system(("unshare", flag), 272 if X86 else 97, flag)
    child = libc.syscall(ctypes.c_long(56 if X86 else 220), ctypes.c_ulong(flag | 17), 0, 0, 0, 0)
    if child == 0:
        os._exit(0)
    if child > 0:
        escaped("clone", flag)
system("x32", 0x40000000 + 39 if X86 else None)
"""),
    "more privileges": reaches("""
for number in (0, 1):
    number != os.getuid() and attempt(("setuid", number), lambda: os.setuid(number))
for name in ("su", "passwd", "mount", "sudo", "ping"):
    for place in ("/usr/bin/", "/bin/"):
        if os.path.exists(place + name) and os.stat(place + name).st_mode & 0o6000:
            attempt(name, lambda: __import__("subprocess").run([place + name, "--version"], capture_output=True).returncode < 0)
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
if int(status["CapEff"], 16) or int(status["CapPrm"], 16) or status["NoNewPrivs"] != "1":
    escaped(status)
system("capset", 126 if X86 else 91, struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0xffffffff] * 6))
"""),
    "kernel settings": reaches("""
for path in ("/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sys/vm/drop_caches",
             "/proc/sys/user/max_user_namespaces", "/sys/kernel/mm/ksm/run", "/proc/self/oom_score_adj", "/proc/self/uid_map",
             "/proc/1/oom_score_adj", f"/proc/{TRAINER}/oom_score_adj", "/sys/fs/cgroup/cgroup.procs", "/dev/kmsg", "/dev/tty"):
    attempt(path, lambda: open(path, "w"))
resource.setrlimit(resource.RLIMIT_CORE, resource.getrlimit(resource.RLIMIT_CORE))
for name in ("CORE", "NOFILE", "CPU", "AS", "FSIZE"):
    kind = getattr(resource, "RLIMIT_" + name)
    attempt(name, lambda: resource.setrlimit(kind, (resource.getrlimit(kind)[1] + 1,) * 2))
attempt("nice", lambda: os.nice(-5))
attempt("real time", lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)))
attempt("clock", lambda: time.clock_settime(time.CLOCK_REALTIME, 0))
import fcntl, termios
for descriptor in range(3):
    attempt("terminal", lambda: fcntl.ioctl(descriptor, termios.TIOCSTI, b"x"))
"""),
    "watching files": reaches("""
if not os.path.exists(CANARY):
    print("none there")
else:
    system("inotify", 294 if X86 else 26, 0)
import fcntl
for path in (CANARY, os.__file__):  # the interpreter's files lie in every box, read-only
    if os.path.exists(path) and os.access(path, os.R_OK):
        file, folder = os.open(path, os.O_RDONLY), os.open(os.path.dirname(path), os.O_RDONLY)
        attempt("lock", lambda: fcntl.flock(file, fcntl.LOCK_EX) is None)
        attempt("lease", lambda: fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK) == 0)
        attempt("notices", lambda: fcntl.fcntl(folder, fcntl.F_NOTIFY, 1) == 0)
"""),
    "the watch over the box": Attack(
        program=PRELUDE
        + """
watch = os.getppid()
for number in (signal.SIGSTOP, signal.SIGKILL, signal.SIGSEGV):
    attempt("signals without effect are no harm", lambda: bool(os.kill(watch, number)))
attempt("memory", lambda: open(f"/proc/{watch}/mem", "r+b"))
for descriptor in range(64):
    attempt("descriptors", lambda: os.open(f"/proc/{watch}/fd/{descriptor}", os.O_RDWR | os.O_NONBLOCK))
attempt("trace", lambda: libc.ptrace(16, watch, 0, 0) == 0)
for i in range(6):
    if os.fork() == 0:
        break
held = bytearray(b"x") * (200 << 20)
time.sleep(60)
""",
        endings=frozenset({"memory"}),
        everywhere=False,
    ),
    "machine code of another architecture": reaches("""
if X86 and os.fork() == 0:
    code = mmap.mmap(-1, 4096, prot=7)
    code.write(b"\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3")  # mov eax, 20 (getpid); int 0x80; ret
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    escaped(ctypes.CFUNCTYPE(ctypes.c_int)(address)())
    os._exit(0)
if X86 and os.waitstatus_to_exitcode(os.wait()[1]) != -signal.SIGSYS:
    escaped("not killed")
"""),
    "patching the checker": Attack(
        program=PRELUDE
        + """
import builtins
class Equal(str):
    __eq__ = lambda self, other: True
    __hash__ = str.__hash__
json.dumps = json.loads = lambda *a, **k: Equal("anything")
builtins.print = sys.stdout.write
sys.modules["groupwise"] = sys
sys.stdout.write("wrong")
""",
        endings=frozenset({"done"}),
        everywhere=False,
        says="wrong",
    ),
}

SEARCH = (
    PRELUDE
    + """
needle = bytes(reversed(REVERSED.encode()))
seen, after = 0, set()
def look(data):
    global seen
    place = data.find(needle)
    while place >= 0:
        seen += 1
        after.add(data[place + len(needle) : place + len(needle) + 1])
        place = data.find(needle, place + 1)
with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
    for line in maps.read().splitlines():
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        if line.split()[1].startswith("r") and "[v" not in line:
            try:
                memory.seek(first)
                look(memory.read(last - first))
            except (OSError, OverflowError):
                pass
for item in gc.get_objects():
    if isinstance(item, dict):
        for value in list(item.values()):
            if isinstance(value, str):
                look(value.encode(errors="replace"))
for place in ("/proc/self/cmdline", "/proc/self/environ", *(f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))):
    try:
        look(open(place, "rb").read(1 << 20))
    except OSError:
        pass
if seen and b"!" in after:
    print(needle.decode() + "!")
else:
    print("seen" if seen else "the search does not work")
"""
)
"""Searches all that it can read for a text followed by "!", and gives it as the answer."""
