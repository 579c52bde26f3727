"""MODE_TO_RUN=rpc: lend this machine's devices and memory to a llama.cpp on another one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress

from worker.engines import machine
from worker.engines.servers.process import ServerProcess, bind_problem
from worker.errors import EngineDead, EngineStartError, SettingsError
from worker.processes import find_program, stop_signals
from worker.settings import Settings

log = logging.getLogger(__name__)

PROGRAMS = ("ggml-rpc-server", "rpc-server")
"""llama.cpp's RPC server, by its name and by its older one."""


def serve(settings: Settings, environment: Mapping[str, str]) -> int:
    """Lend until SIGTERM; returns the exit code of the process.

    Raises:
        SettingsError: RPC_HOST or RPC_PORT can't be bound.
        EngineStartError: llama.cpp's RPC server is not installed, or did not start.
        EngineDead: it ended by itself.
    """
    return asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> int:
    stopped = stop_signals()

    host, port = str(settings.rpc_host), settings.rpc_port
    program = next(filter(None, map(find_program, PROGRAMS)), None)
    if program is None:
        raise EngineStartError(
            "MODE_TO_RUN=rpc needs llama.cpp's ggml-rpc-server, and it is not on PATH"
        )
    if problem := bind_problem(host, port):  # it would end with code 0
        raise SettingsError([f"RPC_HOST={host}, RPC_PORT={port}: can't be bound: {problem}"])
    command = [program, "--host", host, "--port", str(port), "--threads", str(machine.threads())]
    server = ServerProcess("ggml-rpc-server", command, machine.LLAMA_CPP, port)
    server.start()
    ended = asyncio.create_task(server.ended.wait())
    stop = asyncio.create_task(stopped.wait())
    try:
        await _until_it_listens(server, settings.startup_timeout)
        _report(server, host, port)
        await asyncio.wait({stop, ended}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stop.cancel()
        ended.cancel()
        server.stop()
    if not stopped.is_set():
        raise EngineDead(f"ggml-rpc-server ended with code {server.code}:{server.last_lines()}")
    return 0


async def _until_it_listens(server: ServerProcess, timeout: float) -> None:
    try:
        async with asyncio.timeout(timeout):
            while not server.listens():
                with suppress(TimeoutError):
                    await asyncio.wait_for(server.ended.wait(), 0.05)
                    return
    except TimeoutError:
        raise EngineStartError(
            f"ggml-rpc-server did not listen after STARTUP_TIMEOUT={timeout:g} seconds:"
            f"{server.last_lines()}"
        ) from None


def _report(server: ServerProcess, host: str, port: int) -> None:
    if server.ended.is_set():
        return
    lines = list(server.lines)
    after = lines.index("Devices:") + 1 if "Devices:" in lines else len(lines)
    for line in lines[after:]:
        if line.endswith("free)"):
            log.info("lends %s", line.strip())
    log.info("serves llama.cpp's RPC on %s:%d with %d threads", host, port, machine.threads())
    log.warning(
        "whoever reaches %s:%d can use this machine and crash it: llama.cpp's RPC knows no key "
        "and no encryption; private networks only",
        host,
        port,
    )
