"""A worker on the real runpod SDK that answers the documented job input without a model.

The prompt says how: `fail`, `slow`, `options`, `meet N`, `hold` and `release`; any other is echoed.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import runpod

meeting = asyncio.Condition()
present = most = 0
released = asyncio.Event()


async def words(job_input: dict[str, Any]) -> AsyncIterator[str]:
    """The answer, piece by piece."""
    global most, present
    if "messages" in job_input:
        yield f"chat: {job_input['messages'][-1]['content']}"
        return
    prompt = job_input["prompt"]
    match prompt.split():
        case ["fail"]:
            yield "so far"
            raise RuntimeError("the canned failure")
        case ["slow"]:
            yield "so far"
            await asyncio.Event().wait()
        case ["options"]:
            yield json.dumps(job_input["options"])
        case ["meet", number]:  # go on once so many are here; tell how many there were at most
            async with meeting:
                present += 1
                most = max(most, present)
                meeting.notify_all()
                await meeting.wait_for(lambda: most >= int(number))
                present -= 1
            yield str(most)
        case ["hold"]:
            await released.wait()
            released.clear()
            yield "held"
        case ["release"]:
            released.set()
            yield "released"
        case _:
            for word in ("echo: ", prompt):
                yield word


async def handler(job: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    job_input, text = job["input"], ""
    try:
        async for word in words(job_input):
            text += word
            if job_input["answerType"] == "stream":
                yield {"text": word}
        rest = "" if job_input["answerType"] == "stream" else text
        yield {"text": rest, "finish_reason": "stop", "usage": {"total_tokens": 1}}
    except RuntimeError as error:
        yield {"error": str(error)}


if __name__ == "__main__":
    runpod.serverless.start(
        {
            "handler": handler,
            "return_aggregate_stream": True,
            "concurrency_modifier": lambda _: 16,
        }
    )
