"""Child processes: start, watch, stop with the whole group, and leave none behind."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress

import psutil

log = logging.getLogger(__name__)


class Child:
    """A program in a process group of its own; its output goes where ours goes."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self._command = command
        self._environment = environment
        self._process: asyncio.subprocess.Process | None = None

    async def run(self) -> int:
        """Start it and wait for its end; returns the exit code, negative for a signal."""
        self._process = await asyncio.create_subprocess_exec(
            *self._command, env=dict(self._environment), start_new_session=True
        )
        return await self._process.wait()

    async def keep_running(self) -> None:
        """Start it again whenever it ends, after 1 s and then up to 30 s; never returns."""
        loop = asyncio.get_running_loop()
        pause = 1.0
        while True:
            begin = loop.time()
            code = await self.run()
            if loop.time() - begin > 60:
                pause = 1.0
            log.warning("%s ended with code %d; starting it again in %g s", self.name, code, pause)
            await asyncio.sleep(pause)
            pause = min(pause * 2, 30)

    async def stop(self, grace: float) -> None:
        """SIGTERM to the program, after `grace` seconds SIGKILL to its whole group."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), grace)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def stop_signals() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set from now on."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    return stopped


def end_descendants(grace: float = 3.0) -> None:
    """End every process below this one: SIGTERM, after `grace` seconds SIGKILL.

    Python's resource tracker ignores SIGTERM; it cleans up and ends by itself once we are gone.
    """
    _adopt_orphans()
    family = _descendants()
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    psutil.wait_procs(family, timeout=grace)
    while family := _descendants():  # those too that a child started before it ended
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family)


def _descendants() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if not any("multiprocessing.resource_tracker" in part for part in process.cmdline()):
                found.append(process)
    return found


def _adopt_orphans() -> None:
    """From now on what loses its parent below us becomes our child, and can't get away."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


PR_SET_CHILD_SUBREAPER = 36
"""From <linux/prctl.h>."""
