"""MODE_TO_RUN → what runs; starts, watches and stops it."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Mapping

from worker.processes import Child, stop_signals
from worker.settings import Settings

log = logging.getLogger(__name__)

SERVICE_GRACE = 3.0
"""Seconds that sshd and JupyterLab have to end."""


def run(settings: Settings, environment: Mapping[str, str]) -> int:
    """Run the mode until it ends; returns the exit code of the process."""
    if settings.mode_to_run == "serverless":
        from worker.serverless import loop as serverless

        return serverless.serve(settings)
    if settings.mode_to_run == "api":
        from worker.api import front as api

        return api.serve(settings)
    if settings.mode_to_run == "rpc":
        from worker.rpc import serve as rpc

        return rpc.serve(settings)
    return asyncio.run(_pod(settings, environment))


async def _pod(settings: Settings, environment: Mapping[str, str]) -> int:
    """`pod`: the services until SIGTERM. `both`: the same, and the serverless worker beside them.

    The serverless worker is a process of its own, so that neither can harm the other; when it
    ends, so does the container, with its exit code.
    """
    from worker.pod import services as pod

    stopped = stop_signals()

    pod.run_hook("pre_start.sh")
    services = pod.services(settings, environment)
    kept = [asyncio.create_task(service.keep_running()) for service in services]
    pod.run_hook("post_start.sh")

    stop = asyncio.create_task(stopped.wait())
    code = 0
    if settings.mode_to_run == "both":
        code = await _serverless_until(stop, settings, environment)
    else:
        await stop
    for task in (*kept, stop):
        task.cancel()
    await asyncio.gather(*kept, stop, return_exceptions=True)
    await asyncio.gather(*(service.stop(SERVICE_GRACE) for service in services))
    return code


async def _serverless_until(
    stop: asyncio.Task[bool], settings: Settings, environment: Mapping[str, str]
) -> int:
    worker = Child(
        "the serverless worker",
        [sys.executable, "-m", "worker"],
        {**environment, "MODE_TO_RUN": "serverless"},
    )
    ended = asyncio.create_task(worker.run())
    await asyncio.wait({stop, ended}, return_when=asyncio.FIRST_COMPLETED)
    if not ended.done():
        await worker.stop(settings.shutdown_timeout + SERVICE_GRACE)
    code = await ended
    log.info("%s ended with code %d", worker.name, code)
    return code if code >= 0 else 1
