"""Tripod's handler and engine on the runpod SDK's own job loop, to measure what JobLoop changes."""

import logging
import os
import sys
from collections.abc import AsyncGenerator
from typing import Any

import runpod
from runpod.serverless.modules import rp_scale

from worker import engines, settings
from worker.__main__ import SDK_DEFAULTS
from worker.chunks import Chunk
from worker.engines.base import Engine
from worker.handler import handler


def main() -> None:
    """Serve jobs until SIGTERM."""
    logging.basicConfig(stream=sys.stdout, level=logging.WARNING)
    for name, value in SDK_DEFAULTS.items():
        os.environ.setdefault(name, value)
    given = settings.load(os.environ)
    engine: Engine

    async def answer(job: dict[str, Any]) -> AsyncGenerator[Chunk | str, None]:
        async for chunk in handler(job, engine):
            yield chunk

    class StockLoop(rp_scale.JobScaler):
        """The SDK's loop, unchanged but for the engine, which must be warm on the same loop."""

        async def run(self) -> None:
            nonlocal engine
            engine = await engines.start(given)
            await super().run()
            engine.stop()

    rp_scale.JobScaler = StockLoop
    runpod.serverless.start(
        {
            "handler": answer,
            "return_aggregate_stream": True,
            "concurrency_modifier": lambda _: given.concurrency_modifier,
        }
    )


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
