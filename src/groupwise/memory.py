"""How much memory a machine has, so that settings that mean a terabyte are refused before anything is allocated.

What is compared with it is always a lower bound, and the memory counted is all there is, not what is free at the moment: what
could run is never refused.
"""

import os
import resource
from pathlib import Path

import torch

from groupwise.errors import UserError

_CGROUP = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_MEMINFO = Path("/proc/meminfo")


def total_memory(device: torch.device | None = None) -> int:
    """Bytes of memory: a GPU's own, else of this machine with its swap, or what this process is limited to if that is less."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if _MEMINFO.is_file():
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
        found = sum(int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal") if name in lines)
    else:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [int(text) for path in _CGROUP if path.is_file() and (text := path.read_text().strip()).isdecimal()]
    limits += [limit for limit in (resource.getrlimit(resource.RLIMIT_AS)[0],) if limit != resource.RLIM_INFINITY]
    return min([found, *limits])


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
