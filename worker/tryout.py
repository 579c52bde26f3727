"""`python -m worker try`: one job after another through the very same handler, no queue needed."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import sys
import time
from types import ModuleType
from typing import Any

from worker import engines, handler
from worker.engines.base import Engine
from worker.errors import TripodError
from worker.job import chunks, routes
from worker.job import input as requests
from worker.settings import Settings

log = logging.getLogger(__name__)

EDITABLE: tuple[ModuleType, ...] = (requests, chunks, routes, handler)
"""Reloaded in this order, since each may import those before it."""


def run(settings: Settings, job_input: dict[str, Any], *, reload: bool) -> int:
    """Load the engine and answer `job_input`.

    With `reload`, go on with a prompt a line from standard input; an empty line repeats the last
    job, and code that was edited meanwhile is used while the engine stays loaded.

    Returns:
        the exit code: 0, or 1 when the (last) job failed.
    """
    return asyncio.run(_run(settings, job_input, reload=reload))


async def _run(settings: Settings, job_input: dict[str, Any], *, reload: bool) -> int:
    engine = await engines.start(settings)
    try:
        failed = await _answer(engine, job_input)
        while reload:
            print(
                "prompt (empty: the same again, Ctrl-D: end)> ", end="", file=sys.stderr, flush=True
            )
            line = await asyncio.to_thread(sys.stdin.readline)
            if not line:
                break
            if prompt := line.rstrip("\n"):
                job_input = {name: value for name, value in job_input.items() if name != "messages"}
                job_input["prompt"] = prompt
            if _reloaded():
                failed = await _answer(engine, job_input)
    finally:
        engine.stop()
    return int(failed)


def _reloaded() -> bool:
    """Read the editable modules again; code that does not even load leaves the old in place."""
    for module in EDITABLE:
        try:
            importlib.reload(module)
        except Exception:  # whatever the user's edit raises is for him to read
            log.exception("%s does not load; mend it and try again", module.__name__)
            return False
    return True


async def _answer(engine: Engine, job_input: dict[str, Any]) -> bool:
    """Run one job and print its chunks as they come, a JSON object a line; True when it failed."""
    begin = time.monotonic()
    first: float | None = None
    try:
        async for chunk in handler.handler({"id": "try", "input": job_input}, engine):
            first = first or time.monotonic() - begin
            print(json.dumps(chunk, ensure_ascii=False), flush=True)
    except TripodError as error:
        log.error("✗ failed: %s", error)
        return True
    except Exception:  # a bug in the edited handler must not cost the loaded engine
        log.exception("✗ the handler raised")
        return True
    seconds = time.monotonic() - begin
    log.info("✓ finished after %.2f s, the first chunk after %.3f s", seconds, first or seconds)
    return False
