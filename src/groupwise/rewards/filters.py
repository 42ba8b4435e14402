"""System calls that a program in a box may not make, as a seccomp filter: a list of what it has no need of.

The kernel checks the filter at each system call. What is refused gives EPERM, what is unknown here ENOSYS, after which C
libraries try the older call; the calls of another architecture (32-bit, x32) end the program.
"""

import ctypes
import os
import struct
from pathlib import Path

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
KILL, REFUSE, UNKNOWN, ALLOW = 0x80000000, 0x00050000 | 1, 0x00050000 | 38, 0x7FFF0000
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16
"""Offsets in the kernel's struct seccomp_data. Of an argument the lower half is read, which is all that these calls look at."""
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
FIRST_UNKNOWN = 457
"""From here on (statmount, Linux 6.8) numbers are refused as unknown; x32's lie above it too."""

# Of each call: its number on x86-64, then on aarch64 (None: there is none).
KERNEL: dict[str, tuple[int | None, int | None]] = {
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118),
    "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "syslog": (103, 116),
    "acct": (163, 89),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "clock_adjtime": (305, 266),
    "adjtimex": (159, 171),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "vhangup": (153, 58),
    "personality": (135, 92),
    "lookup_dcookie": (212, 18),
    "nfsservctl": (180, 42),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    "sysfs": (139, None),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "seccomp": (317, 277),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "semctl": (66, 191),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "mq_notify": (244, 184),
    "flock": (73, 32),
}
"""Refused in every box that has a filter: what changes or looks into the system or another process, what shares memory with
processes outside or locks files that they use, and the kernel's newest and most attacked parts."""
FILES: dict[str, tuple[int | None, int | None]] = {
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "truncate": (76, 45),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "getxattr": (191, 8),
    "lgetxattr": (192, 9),
    "listxattr": (194, 11),
    "llistxattr": (195, 12),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "inotify_add_watch": (254, 27),
}
"""Refused where the box shares this machine's file system, since Landlock does not cover them."""
SIGNALS: dict[str, tuple[int | None, int | None]] = {
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
}
"""Refused where the box shares this machine's processes and Landlock does not confine signals (before Linux 6.12)."""
CLONE, CLONE3, SOCKETPAIR, FCNTL, IOCTL, PRLIMIT = (56, 220), (435, 435), (53, 199), (72, 25), (16, 29), (302, 261)
NEW_NAMESPACES = 0x7E020000
AF_UNIX, SOCK_STREAM, SOCKET_TYPE = 1, 1, 0xF
SIGNAL_OWNER = (8, 10, 15)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: have the kernel signal another process
WATCHING = (1024, 1026)  # F_SETLEASE, F_NOTIFY: hold up or hear of what others do with a file
LOCKS = (6, 7, 37, 38)  # F_SETLK, F_SETLKW, F_OFD_SETLK, F_OFD_SETLKW: refused where no file is the program's own
TERMINAL = (0x5412, 0x541C, 0x5423, 0x8901, 0x8902)  # TIOCSTI, TIOCLINUX, TIOCSETD, FIOSETOWN, SIOCSPGRP


def seccomp_filter(machine: str, *, own_files: bool, signals: bool) -> bytes:
    """The filter as the kernel takes it, instructions of 8 bytes.

    Args:
        machine: the architecture, as `os.uname().machine`.
        own_files: whether the box has a file system of its own.
        signals: whether signals may be sent, because something else confines them.

    Raises:
        KeyError: there is no filter for this architecture.
    """
    which = list(ARCHITECTURES).index(machine) if machine in ARCHITECTURES else None
    if which is None:
        raise KeyError(f"no system calls are known of the architecture {machine}")
    refused = {**KERNEL, **({} if own_files else FILES), **({} if signals else SIGNALS)}
    code = [
        _step(LOAD, ARCHITECTURE),
        _step(EQUAL, ARCHITECTURES[machine], 1, 0),
        _step(RETURN, KILL),
        _step(LOAD, NUMBER),
        *_when(AT_LEAST, FIRST_UNKNOWN, UNKNOWN),
        *_when(EQUAL, CLONE3[which], UNKNOWN),  # its flags lie in memory, which a filter cannot read
    ]
    for numbers in refused.values():
        number = numbers[which]
        if number is not None:
            code += _when(EQUAL, number, REFUSE)
    code += _of_call(CLONE[which], 0, _when(ANY_BIT, NEW_NAMESPACES, REFUSE))
    code += _of_call(PRLIMIT[which], 0, [_step(EQUAL, 0, 1, 0), _step(RETURN, REFUSE)])  # of this process only
    commands = (*SIGNAL_OWNER, *WATCHING, *(() if own_files else LOCKS))
    code += _of_call(FCNTL[which], 1, [step for value in commands for step in _when(EQUAL, value, REFUSE)])
    code += _of_call(IOCTL[which], 1, [step for value in TERMINAL for step in _when(EQUAL, value, REFUSE)])
    # Stream sockets only, which reach nothing but each other: a datagram can be addressed to any socket in the file system.
    kind = [_step(LOAD, ARGUMENTS + 8), _step(0x54, SOCKET_TYPE), _step(EQUAL, SOCK_STREAM, 1, 0), _step(RETURN, REFUSE)]
    code += _of_call(SOCKETPAIR[which], 0, [_step(EQUAL, AF_UNIX, 1, 0), _step(RETURN, REFUSE), *kind])
    return b"".join([*code, _step(RETURN, ALLOW)])


def _step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("<HBBI", code, yes, no, value)


def _when(test: int, value: int, result: int) -> list[bytes]:
    return [_step(test, value, 0, 1), _step(RETURN, result)]


def _of_call(number: int, argument: int, steps: list[bytes]) -> list[bytes]:
    """Steps that are taken for one system call, with an argument loaded; what they let pass is allowed."""
    inner = [_step(LOAD, ARGUMENTS + 8 * argument), *steps, _step(RETURN, ALLOW)]
    return [_step(EQUAL, number, 0, len(inner)), *inner]


def landlock_abi() -> int:
    """The version of Landlock in this kernel; 0: none."""
    create, version = 444, 1
    found: int = ctypes.CDLL(None, use_errno=True).syscall(
        ctypes.c_long(create), None, ctypes.c_size_t(0), ctypes.c_uint(version)
    )
    return max(found, 0)


def has_seccomp() -> bool:
    """Whether there is a filter for this architecture, and the kernel takes filters."""
    return os.uname().machine in ARCHITECTURES and Path("/proc/sys/kernel/seccomp/actions_avail").exists()
