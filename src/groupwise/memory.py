"""How much memory a machine has, so that settings that mean a terabyte are refused before anything is allocated.

What is compared with it is always a lower bound, and the memory counted is all there is, not what is free at the moment: what
could run is never refused.
"""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

from groupwise.errors import UserError

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def total_memory(device: torch.device | None = None) -> int:
    """Bytes of memory: a GPU's own, else of this machine with its swap, or what this process is limited to if that is less."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    memory, swap = _host()
    limits = [limit for limit in (resource.getrlimit(resource.RLIMIT_AS)[0],) if limit != resource.RLIM_INFINITY]
    return min([memory + swap, *_of_container(swap), *limits])


def give_unused_back() -> None:
    """Give memory that PyTorch holds and does not use back to the GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _host() -> tuple[int, int]:
    """Bytes of memory and of swap."""
    if not _MEMINFO.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 0
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
    memory, swap = (int(lines[name].split()[0]) * 1024 if name in lines else 0 for name in ("MemTotal", "SwapTotal"))
    return memory, swap


def _of_container(swap: int) -> Iterator[int]:
    """Bytes of memory and swap to which control groups limit this process, of the first version and of the second.

    Limits of memory do not count swap, which has one of its own; memsw is that of both together.
    """
    both = _limit("memory/memory.memsw.limit_in_bytes")
    if both is not None:
        yield both
    for name, more in (("memory.max", "memory.swap.max"), ("memory/memory.limit_in_bytes", None)):
        limit, extra = _limit(name), None if more is None else _limit(more)
        if limit is not None:
            yield limit + (swap if extra is None else min(swap, extra))


def _limit(name: str) -> int | None:
    path = _CGROUP / name
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdecimal() else None


def size(count: float) -> str:
    """Bytes for a person: "5.1 TB"."""
    units = ["bytes", "kB", "MB", "GB", "TB", "PB"]
    while count >= 1000 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:,.3g} {units[0]}" if count < 1000 else f"{count:,.0f} {units[0]}"


def need(count: float, what: str, device: torch.device | None = None) -> None:
    """
    Raises:
        UserError: `what` would take so many bytes, and there are fewer.
    """
    here = total_memory(device)
    if count > here:
        raise UserError(f"{what} would take at least {size(count)}, and {size(here)} are here")
