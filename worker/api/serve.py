"""MODE_TO_RUN=api: the HTTP front answers at once; the engine and the handler start behind it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from worker import loading, startup
from worker.api.front import Front
from worker.api.listeners import Server, listeners
from worker.loading import Handler
from worker.processes import stop_signals
from worker.settings import Settings

log = logging.getLogger(__name__)

DEAD_ENGINE_GRACE = 5.0
"""Seconds that /ping still answers 503 before the process ends, so that a probe can see it."""


def serve(settings: Settings, environment: Mapping[str, str]) -> int:
    """Serve until SIGTERM (returns 0), a failed start (1; settings: 2) or a dead engine (1).

    Raises:
        SettingsError: HANDLER does not load, or PORT can't be bound.
    """
    return asyncio.run(_serve(settings, loading.load(settings.handler)))


async def _serve(settings: Settings, handler: Handler) -> int:
    front = Front(settings, handler)
    front.enter("starting")
    stopped = stop_signals()
    servers = [Server(front, listener) for listener in listeners(settings)]
    serving = [asyncio.create_task(server.run()) for server in servers]
    code = await _run_engine(front, stopped)
    for server in servers:
        server.should_exit = True
    await asyncio.gather(*serving)
    if front.engine:
        front.engine.stop()
    return code


async def _run_engine(front: Front, stopped: asyncio.Event) -> int:
    """Start the engine and watch it until it dies or the process is told to stop."""
    started = await startup.start_unless(stopped, front.settings, front.handler)
    if isinstance(started, int):
        return started
    front.engine = started
    front.enter("ready")
    stop = asyncio.create_task(stopped.wait())
    died = asyncio.create_task(front.engine.died())
    await asyncio.wait({died, stop}, return_when=asyncio.FIRST_COMPLETED)
    if died.done():
        front.enter("dead")
        log.error("the engine died; this worker ends")
        await asyncio.wait({stop}, timeout=DEAD_ENGINE_GRACE)
        return 1
    died.cancel()
    front.enter("draining")
    grace = front.settings.shutdown_timeout
    log.info("told to stop; %d requests are running", len(front.in_flight))
    if front.in_flight:
        _, late = await asyncio.wait(
            front.in_flight, timeout=grace - startup.delivery_reserve(grace)
        )
        for task in late:
            task.cancel()
    return 0
