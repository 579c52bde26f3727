"""What this machine offers: processors and memory, as a container is allowed to use them."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")

LLAMA_CPP = {
    "OMP_WAIT_POLICY": "passive",  # spinning threads starve each other on busy cores
    "GGML_NO_BACKTRACE": "1",
}
"""Variables for its programs."""


def threads() -> int:
    """Threads that compute without being in each other's way: cores, not hyper-threads."""
    cores = psutil.cpu_count(logical=False) or 1
    return max(1, min(len(os.sched_getaffinity(0)), cores, _quota()))


def _quota() -> int:
    """Processors that the container's time amounts to; a great number where it has no limit."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            quota = (CGROUP / "cpu/cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (CGROUP / "cpu/cpu.cfs_period_us").read_text(encoding="ascii").strip()
        except OSError:
            return 1 << 16
    if quota in {"max", "-1"}:
        return 1 << 16
    return max(1, int(quota) // int(period))


def free_memory() -> int:
    """Bytes of memory that a process may still take."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = (CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = (CGROUP / "memory.current").read_text(encoding="ascii").strip()
    except OSError:
        return free
    return free if limit == "max" else max(0, min(free, int(limit) - int(used)))
