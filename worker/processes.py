"""The one supervisor of child processes: start, watch, stop with the whole group, leave none."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import shutil
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

log = logging.getLogger(__name__)

CACHE = Path(__file__).parents[1] / ".cache"
"""Where `make setup` puts programs that are no Python packages: `.cache/<name>/bin`."""

KEPT_LINES = 400
"""Lines of a child's output that are kept; a start of llama-server writes about 150."""

TOLD_LINES = 12
"""Lines of it that an error tells."""


def find_program(name: str) -> str | None:
    """The program `name` on PATH, or in this checkout's .cache; None where it is in neither."""
    places = [os.environ.get("PATH", os.defpath), *map(str, sorted(CACHE.glob("*/bin")))]
    return shutil.which(name, path=os.pathsep.join(places))


class Child:
    """A program in a process group of its own; when it ends, so does all that it started.

    Args:
        name: what messages call it.
        environment: all of its environment.
        keeps_output: its last lines are kept and logged at DEBUG; else they go where ours go.
        noise: lines of its output that hold this are not kept, such as those about our probes.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        keeps_output: bool = False,
        noise: str | None = None,
    ) -> None:
        self.name = name
        self.code: int | None = None
        self.ended = asyncio.Event()
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._command = command
        self._environment = environment
        self._keeps_output = keeps_output
        self._noise = noise
        self._process: subprocess.Popen[bytes] | None = None
        self._reaping = threading.Lock()
        self._gone = threading.Event()

    def start(self) -> None:
        """Start it; on the event loop that `ended` is waited for on.

        Raises:
            OSError: it can't be run.
        """
        self.code = None
        self.ended.clear()
        self._gone.clear()
        self._process = subprocess.Popen(
            self._command,
            env=dict(self._environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if self._keeps_output else None,
            stderr=subprocess.STDOUT if self._keeps_output else None,
            # A group, no session: Linux shares cores between sessions, then within each.
            process_group=0,
            # SIGPIPE stays ignored: ggml-rpc-server would end with a client that is killed.
            restore_signals=False,
        )
        reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        reader.start()
        loop = asyncio.get_running_loop()
        wait = threading.Thread(
            target=self._wait, args=(self._process, reader, loop), name=self.name, daemon=True
        )
        wait.start()

    async def run(self) -> int:
        """Start it and wait for its end; returns the exit code, negative for a signal."""
        self.start()
        await self.ended.wait()
        assert self.code is not None
        return self.code

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

    def kill(self) -> None:
        """End the whole group at once, also when it is stopped or hangs."""
        self._signal(signal.SIGKILL, group=True)

    def stop(self, grace: float = 1.0) -> None:
        """SIGTERM to the program, SIGKILL to its group once it ended or after `grace` seconds.

        Blocks until it has ended.
        """
        self._signal(signal.SIGTERM, group=False)
        if self._process and not self._gone.wait(grace):
            self.kill()
            self._gone.wait(5)

    def last_lines(self) -> str:
        """The end of its output, indented, for an error message."""
        told = list(self.lines)[-TOLD_LINES:]
        return "".join(f"\n    {line}" for line in told) or " (it wrote nothing)"

    def family(self) -> list[psutil.Process]:
        """It and all below it, as far as they still run."""
        if self._process is None:
            return []
        try:
            leader = psutil.Process(self._process.pid)
            return [leader, *leader.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def end_strays(self) -> None:
        """End what has left the group; for programs that are known to leave some."""

    def _signal(self, number: int, *, group: bool) -> None:
        with self._reaping:  # once the leader is reaped its number may be another's
            if self._process and self._process.returncode is None:
                with suppress(ProcessLookupError):
                    (os.killpg if group else os.kill)(self._process.pid, number)

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        if process.stdout is None:
            return
        with process.stdout as output:
            for raw in output:
                line = raw.decode("utf-8", "replace").rstrip()
                if self._noise is None or self._noise not in line:
                    self.lines.append(line)
                    log.debug("%s: %s", self.name, line)

    def _wait(
        self,
        process: subprocess.Popen[bytes],
        reader: threading.Thread,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        self._signal(signal.SIGKILL, group=True)
        self.end_strays()
        with self._reaping:
            self.code = process.wait()
        self._gone.set()
        reader.join(2)
        with suppress(RuntimeError):  # the loop may have ended before
            loop.call_soon_threadsafe(self.ended.set)


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
