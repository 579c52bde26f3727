"""A server that Tripod starts: its program, its port, its last lines, and the end of its group."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import socket
import subprocess
import threading
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from preload.catalog import SECRETS

log = logging.getLogger(__name__)

CACHE = Path(__file__).parents[2] / ".cache"
"""Where `make setup` puts programs that are no Python packages: `.cache/<name>/bin`."""

KEPT_LINES = 400
"""Lines of the server's output that are kept; a start of llama-server writes about 150."""

TOLD_LINES = 12
"""Lines of it that an error tells."""

KEPT_BACK = {*SECRETS, "LLAMA_ARG_HOST", "LLAMA_ARG_PORT"} - {"HF_TOKEN"}
"""Variables that no server sees: secrets, and what an image wants it to listen on."""


MARK = "TRIPOD_SERVER"
"""A variable that all processes of a server have; BentoML's leave the group, but not this."""


def find_program(name: str) -> str | None:
    """The program `name` on PATH, or in this checkout's .cache; None where it is in neither."""
    places = [os.environ.get("PATH", os.defpath), *map(str, sorted(CACHE.glob("*/bin")))]
    return shutil.which(name, path=os.pathsep.join(places))


def free_port() -> int:
    """A port of the loopback that nobody listens on; somebody may take it at any time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_taken(port: int) -> bool:
    """Whether somebody listens on the loopback's `port`."""
    return bind_problem("127.0.0.1", port) is not None


def bind_problem(host: str, port: int) -> str | None:
    """Why nobody can listen on this port now; None where it is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return None


class Spawned:
    """A process group of our own; when its leader ends, so does all that it started.

    Args:
        name: what messages call it.
        port: what it was told to listen on.
        variables: added to our environment, but for KEPT_BACK.
        noise: lines of its output that hold this are not kept, such as those about our probes.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        variables: Mapping[str, str],
        port: int,
        noise: str | None = None,
    ) -> None:
        self.name = name
        self.port = port
        self.ended = asyncio.Event()
        self.code: int | None = None
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        environment = {key: value for key, value in os.environ.items() if key not in KEPT_BACK}
        self._mark = uuid.uuid4().hex
        self._process = subprocess.Popen(
            command,
            env={**environment, **variables, MARK: self._mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # A group, no session: Linux shares cores between sessions, then within each.
            process_group=0,
            # Ignored as it is here: ggml-rpc-server would end with a client that is killed.
            restore_signals=False,
        )
        self._noise = noise
        self._loop = asyncio.get_running_loop()
        self._reaping = threading.Lock()
        self._gone = threading.Event()
        self._reader = threading.Thread(target=self._read, name=f"{name} output", daemon=True)
        self._reader.start()
        threading.Thread(target=self._wait, name=f"{name} end", daemon=True).start()

    def last_lines(self) -> str:
        """The end of its output, indented, for an error message."""
        told = list(self.lines)[-TOLD_LINES:]
        return "".join(f"\n    {line}" for line in told) or " (it wrote nothing)"

    def listens(self) -> bool:
        """Whether it is this server, and not somebody else, that listens on its port."""
        for process in self._family():
            with suppress(psutil.Error):
                for connection in process.net_connections("tcp"):
                    listening = connection.status == psutil.CONN_LISTEN
                    if listening and connection.laddr.port == self.port:
                        return True
        return False

    def cpu_seconds(self) -> float:
        """Processor time that it has used so far."""
        total = 0.0
        for process in self._family():
            with suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def kill(self) -> None:
        """End it at once, also when it is stopped or hangs."""
        self._signal(signal.SIGKILL)

    def stop(self, grace: float = 1.0) -> None:
        """SIGTERM to the whole group, SIGKILL after `grace` seconds; returns when it has ended."""
        self._signal(signal.SIGTERM)
        if not self._gone.wait(grace):
            self.kill()
            self._gone.wait(5)

    def _family(self) -> list[psutil.Process]:
        try:
            leader = psutil.Process(self._process.pid)
            return [leader, *leader.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _kill_strays(self) -> None:
        """Kill those that have left the group."""
        while strays := [process for process in psutil.process_iter() if self._is_ours(process)]:
            for process in strays:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(strays, timeout=1)

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return bool(process.environ().get(MARK) == self._mark)
        except psutil.Error:
            return False

    def _signal(self, number: int) -> None:
        with self._reaping:  # once the leader is reaped its number may be another group's
            if self._process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, number)

    def _read(self) -> None:
        assert self._process.stdout
        with self._process.stdout as output:
            for raw in output:
                line = raw.decode("utf-8", "replace").rstrip()
                if self._noise is None or self._noise not in line:
                    self.lines.append(line)
                    log.debug("%s: %s", self.name, line)

    def _wait(self) -> None:
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        self._signal(signal.SIGKILL)
        self._kill_strays()
        with self._reaping:
            self.code = self._process.wait()
        self._gone.set()
        self._reader.join(2)
        with suppress(RuntimeError):  # the loop may have ended before
            self._loop.call_soon_threadsafe(self.ended.set)
