"""`python -m worker try`: one job after another through the handler, no queue needed."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from typing import Any

from worker import startup
from worker.engines.base import Engine
from worker.errors import TripodError
from worker.loading import Handler
from worker.reloading import Reloading
from worker.settings import Settings

log = logging.getLogger(__name__)


def run(settings: Settings, job_input: dict[str, Any], *, reload: bool) -> int:
    """Load the engine and answer `job_input`.

    With `reload`, go on with a prompt, or a whole input as a JSON object, a line from standard
    input; an empty line repeats the last job, and a handler that was edited meanwhile is read anew
    while the engine and what its `setup` made stay.

    Returns:
        the exit code: 0, or 1 when the (last) job failed.

    Raises:
        SettingsError: HANDLER does not load.
    """
    sys.dont_write_bytecode = True  # two edits within a second would be taken for one
    loaded = Reloading(settings.handler)
    return asyncio.run(_run(settings, loaded, job_input, reload=reload))


async def _run(
    settings: Settings, loaded: Reloading, job_input: dict[str, Any], *, reload: bool
) -> int:
    engine = await startup.start(settings, loaded.handler)
    try:
        loaded.remember_setup()
        failed = await _answer(loaded.handler, engine, job_input)
        while reload:
            print("prompt (empty: the same again, Ctrl-D: end)> ", end="", file=sys.stderr)
            sys.stderr.flush()
            line = await asyncio.to_thread(sys.stdin.readline)
            if not line:
                break
            if asked := line.rstrip("\n"):
                job_input = _input_of(asked, job_input)
            if loaded.again():
                failed = await _answer(loaded.handler, engine, job_input)
    finally:
        engine.stop()
    return int(failed)


def _input_of(line: str, last: dict[str, Any]) -> dict[str, Any]:
    """A JSON object is the whole input; anything else is a prompt for the last one."""
    try:
        given = json.loads(line)
    except ValueError:
        given = None
    if isinstance(given, dict):
        return given
    return {name: value for name, value in last.items() if name != "messages"} | {"prompt": line}


async def _answer(handler: Handler, engine: Engine, job_input: dict[str, Any]) -> bool:
    """Run one job and print its chunks as they come, a JSON text a line; True when it failed."""
    begin = time.monotonic()
    first: float | None = None
    try:
        async for chunk in handler.answer({"id": "try", "input": job_input}, engine):
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
