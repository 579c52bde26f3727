"""MODE_TO_RUN=pod and both: the services of a pod, and the serverless worker beside them."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from worker.pod import jupyter, ssh
from worker.processes import Child, stop_signals
from worker.settings import Settings

log = logging.getLogger(__name__)

SERVICE_GRACE = 3.0
"""Seconds that sshd and JupyterLab have to end."""


def serve(settings: Settings, environment: Mapping[str, str]) -> int:
    """Run the services until SIGTERM; in `both`, until the serverless worker ends."""
    return asyncio.run(_serve(settings, environment))


async def _serve(settings: Settings, environment: Mapping[str, str]) -> int:
    stopped = stop_signals()
    _run_hook("pre_start.sh")
    wanted = (ssh.service(settings, environment), jupyter.service(settings, environment))
    services = [service for service in wanted if service]
    kept = [asyncio.create_task(service.keep_running()) for service in services]
    _run_hook("post_start.sh")

    stop = asyncio.create_task(stopped.wait())
    code = 0
    if settings.mode_to_run == "both":
        code = await _serverless_until(stop, settings, environment)
    else:
        await stop
    for task in (*kept, stop):
        task.cancel()
    await asyncio.gather(*kept, stop, return_exceptions=True)
    await asyncio.gather(*(asyncio.to_thread(one.stop, SERVICE_GRACE) for one in services))
    return code


async def _serverless_until(
    stop: asyncio.Task[bool], settings: Settings, environment: Mapping[str, str]
) -> int:
    """The serverless worker is a process of its own, so that neither can harm the other; when it
    ends, so does the container, with its exit code."""
    worker = Child(
        "the serverless worker",
        [sys.executable, "-m", "worker"],
        {**environment, "MODE_TO_RUN": "serverless"},
    )
    ended = asyncio.create_task(worker.run())
    await asyncio.wait({stop, ended}, return_when=asyncio.FIRST_COMPLETED)
    if not ended.done():
        await asyncio.to_thread(worker.stop, settings.shutdown_timeout + SERVICE_GRACE)
    code = await ended
    log.info("%s ended with code %d", worker.name, code)
    return code if code >= 0 else 1


def _run_hook(name: str) -> None:
    """Run Runpod's `/pre_start.sh` or `/post_start.sh` if the image has one."""
    hook = Path("/", name)
    if hook.is_file():
        code = subprocess.run(["bash", str(hook)], check=False).returncode
        log.log(logging.WARNING if code else logging.INFO, "%s ended with code %d", hook, code)
