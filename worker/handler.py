"""One job: request → engine → chunks. This is the file to edit."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from worker.engines.base import Engine
from worker.job.chunks import Chunk, as_chunk, joined
from worker.job.input import parse
from worker.job.routes import call
from worker.job.types import RouteCall


async def handler(job: dict[str, Any], engine: Engine) -> AsyncGenerator[Chunk | str, None]:
    """Answer one job of Runpod's queue.

    While a chunk is being delivered this function stands at its `yield`; the engine goes on,
    and the next delta holds all that it generated meanwhile. Raise any TripodError to fail
    the job with that error's sentence.

    Args:
        job: `{"id": str, "input": {...}}`; docs/reference/input.md gives the shapes.
        engine: loaded and warm.

    Yields:
        dicts that JSON can hold, the last one with `finish_reason` and `usage`; for OpenAI's
        routes the engine's own object, or text of server-sent events.
    """
    request = parse(job["input"])
    if isinstance(request, RouteCall):
        async with aclosing(call(request, engine)) as parts:
            async for part in parts:
                yield part
        return
    n = request.options.n
    async with aclosing(engine.generate(request)) as deltas:
        if request.stream:
            async for delta in deltas:
                yield as_chunk(delta, n)
        else:
            for chunk in await joined(deltas, n):
                yield chunk
