"""The cores of this job."""

import math
import os
from pathlib import Path


def usable_cores() -> int:
    """Number of cores that this process may keep busy: of its affinity and, in a container, its quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split())
        return max(1, min(cores, math.ceil(quota / period)))
    except (OSError, ValueError):  # no cgroups here, or "max": no quota
        return cores
