"""How many cores there are to work with."""

import contextlib
import math
import os
import re
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def available_cores() -> int:
    """Cores that this process may use: a container or taskset may grant fewer than the machine has.

    A quota, of which Linux keeps account by time, is rounded up.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _quota())))


def _quota() -> float:
    """The least of what Linux grants this process's control groups, in cores; inf where there is no limit."""
    groups = OWN_CGROUPS.read_text() if OWN_CGROUPS.is_file() else ""
    quotas = [math.inf]
    for controllers, group in re.findall(r"^\d+:([^:]*):(.*)$", groups, re.MULTILINE):
        top = CGROUPS / controllers if controllers else CGROUPS  # version 1 has a folder for each controller
        folder = top / group.strip("/")
        # Those above count as well. A container may see its own group at the top, under the name that it has outside.
        for level in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                quotas.append(_quota_of(level))
            if level == top:
                break
    return min(quotas)


def _quota_of(folder: Path) -> float:
    """In cores. Raises OSError, ValueError: this group states no quota."""
    if (folder / "cpu.max").is_file():
        quota, period = (folder / "cpu.max").read_text().split()  # "max" is no number
    else:
        quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    cores = int(quota) / int(period)
    if cores <= 0:
        raise ValueError(f"no quota: {quota}")
    return cores
