"""Tripod's handler and engine on the runpod SDK's own job loop, to measure what JobLoop changes.

Settings from the environment as for a worker; CONCURRENCY_MODIFIER must be a number.
"""

import asyncio
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import runpod

from worker import engines
from worker.configuration import load
from worker.engines.base import Engine
from worker.errors import TripodError
from worker.handler import handler


def serve(engine: Engine, slots: int) -> None:
    """Answer jobs, `slots` at once, until SIGTERM; the first one warms the engine on its loop."""
    warming: list[asyncio.Task[None]] = []

    async def answer(job: dict[str, Any]) -> AsyncGenerator[Any, None]:
        if not warming:
            warming.append(asyncio.create_task(engine.warm_up()))
        await asyncio.shield(warming[0])
        try:
            async with aclosing(handler(job, engine)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except TripodError as error:
            yield {"error": str(error)}

    runpod.serverless.start(
        {
            "handler": answer,
            "return_aggregate_stream": True,
            "concurrency_modifier": lambda _: slots,
        }
    )


if __name__ == "__main__":
    settings = load(os.environ)
    assert settings.concurrency_modifier != "auto"
    engine = engines.load(settings)
    serve(engine, settings.concurrency_modifier)
    engine.stop()
    sys.stdout.flush()
    os._exit(0)  # a normal exit would wait for the engine's threads
