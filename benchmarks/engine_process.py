"""One engine of Tripod's engine layer, settings from the environment as for a worker.

Reads runs as JSON lines `{"prompt", "tokens", "requests"}` from standard input and answers each
with one JSON line: `{"first", "last", "tokens"}` for each request, in seconds and tokens.
"""

import asyncio
import json
import logging
import os
import sys
import time
from contextlib import aclosing
from typing import Any

from worker import startup
from worker.configuration import load
from worker.engines.base import Engine
from worker.job.types import Options, Request


async def one(engine: Engine, prompt: str, tokens: int, begin: float) -> dict[str, Any]:
    """Generate one answer and time it."""
    options = Options(max_tokens=tokens, ignore_eos=True, temperature=0)
    arrivals = []
    usage = None
    async with aclosing(engine.generate(Request(prompt, None, True, options))) as deltas:
        async for delta in deltas:
            usage = delta.usage or usage
            if delta.text:
                arrivals.append(time.monotonic() - begin)
    assert usage, "the last delta has the usage"
    return {"first": arrivals[0], "last": arrivals[-1], "tokens": usage.completion_tokens}


async def main() -> None:
    """Start the engine, say so, then answer run after run until standard input ends."""
    engine = await startup.start(load(os.environ))
    print("ready", file=answers, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        run = json.loads(line)
        begin = time.monotonic()
        requests = [
            one(engine, run["prompt"], run["tokens"], begin) for _ in range(run["requests"])
        ]
        print(json.dumps(await asyncio.gather(*requests)), file=answers, flush=True)
    engine.stop()


if __name__ == "__main__":
    # What the engine's processes print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(main())
