"""A worker on the real runpod SDK; a job's input says what to do.

`echo_worker.py` streams (4 jobs at once), `echo_worker.py plain` answers once (1 at a time).
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

import runpod


async def stream(job: dict[str, Any]) -> AsyncIterator[Any]:
    ask = job["input"]
    if "raise" in ask:
        raise ValueError(ask["raise"])
    if "error" in ask:
        yield {"error": ask["error"]}
        return
    if "exit" in ask:
        os._exit(ask["exit"])
    if "refresh" in ask:
        config["refresh_worker"] = True
    for index in range(ask.get("chunks", 1)):
        await asyncio.sleep(ask.get("pause", 0))
        yield {"text": ask.get("text", "echo"), "index": index}


async def plain(job: dict[str, Any]) -> Any:
    ask = job["input"]
    if "raise" in ask:
        raise ValueError(ask["raise"])
    if "progress" in ask:
        runpod.serverless.progress_update(job, ask["progress"])
        await asyncio.Event().wait()
    return ask


config: dict[str, Any] = {
    "handler": stream,
    "return_aggregate_stream": True,
    "concurrency_modifier": lambda _: 4,
}

if __name__ == "__main__":
    if "plain" in sys.argv:
        config = {"handler": plain}
    runpod.serverless.start(config)
