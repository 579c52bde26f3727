"""The process of a server that Tripod starts: its port, its environment, what leaves its group."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress

import psutil

from preload.secret import without_secrets
from worker.processes import Child

LISTENS_ELSEWHERE = ("LLAMA_ARG_HOST", "LLAMA_ARG_PORT")
"""What an image of llama.cpp sets for the server that it starts by itself."""

MARK = "TRIPOD_SERVER"
"""A variable that all processes of a server have; BentoML's leave the group, but not this."""


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


class ServerProcess(Child):
    """A server on a port; when it ends, so does all that it started, wherever that went.

    Args:
        port: what it was told to listen on.
        variables: added to our environment, which it gets without our secrets but HF_TOKEN.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        variables: Mapping[str, str],
        port: int,
        noise: str | None = None,
    ) -> None:
        self.port = port
        self._mark = uuid.uuid4().hex
        inherited = without_secrets(os.environ, keep={"HF_TOKEN"})
        for variable in LISTENS_ELSEWHERE:
            inherited.pop(variable, None)
        environment = {**inherited, **variables, MARK: self._mark}
        super().__init__(name, command, environment, keeps_output=True, noise=noise)

    def listens(self) -> bool:
        """Whether it is this server, and not somebody else, that listens on its port."""
        for process in self.family():
            with suppress(psutil.Error):
                for connection in process.net_connections("tcp"):
                    listening = connection.status == psutil.CONN_LISTEN
                    if listening and connection.laddr.port == self.port:
                        return True
        return False

    def cpu_seconds(self) -> float:
        """Processor time that it has used so far."""
        total = 0.0
        for process in self.family():
            with suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def end_strays(self) -> None:
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
