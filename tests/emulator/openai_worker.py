"""A worker on the real runpod SDK that answers `{openai_route, openai_input}` with canned objects.

The body may ask for more: `gate` (a port of this machine: connect there after `chunks_before`
chunks and go on when a byte comes), `fail` (an error, after `chunks_before` chunks), `objects`
(stream objects instead of text). A chat's answer is its last message.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import runpod

MODEL = {"id": "org/echo", "object": "model", "created": 0, "owned_by": "test"}


def answer(route: str, ask: dict[str, Any]) -> dict[str, Any]:
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    head = {"id": "x", "created": 0, "model": "org/echo", "usage": usage}
    match route:
        case "/v1/models":
            return {"object": "list", "data": [MODEL]}
        case "/v1/models/org/echo":
            return MODEL
        case "/v1/chat/completions":
            message = {"role": "assistant", "content": ask["messages"][-1]["content"]}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return {**head, "object": "chat.completion", "choices": [choice]}
        case "/v1/completions":
            choice = {"index": 0, "text": ask["prompt"], "finish_reason": "stop"}
            return {**head, "object": "text_completion", "choices": [choice]}
        case "/v1/embeddings":
            vector = {"object": "embedding", "index": 0, "embedding": [0.5, -1.0]}
            return {**head, "object": "list", "data": [vector]}
        case "/v1/responses":
            return {**head, "object": "response", "error": None, "output": []}
    return {"error": openai_error(404, "NotFoundError", f"{route} is not served here")}


def openai_error(code: int, kind: str, message: str) -> str:
    return json.dumps({"message": message, "type": kind, "param": None, "code": code})


def piece(text: str) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    head = {"id": "x", "created": 0, "model": "org/echo", "object": "chat.completion.chunk"}
    return {**head, "choices": [choice]}


def event(text: str) -> str:
    return f"data: {json.dumps(piece(text), ensure_ascii=False)}\n\n"


async def hold(port: int, job_id: str) -> None:
    """Tell the port who waits, and wait for its word; tell it too if this is cancelled."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{job_id}\n".encode())
        await reader.readexactly(1)
    except asyncio.CancelledError:
        writer.write(b"cancelled\n")
        raise
    finally:
        writer.close()


async def handler(job: dict[str, Any]) -> AsyncIterator[Any]:
    route, ask = job["input"]["openai_route"], job["input"]["openai_input"]
    assert (ask is None) == route.startswith("/v1/models")
    ask = ask or {}
    if ask.get("stream"):
        content = ask["messages"][-1]["content"]
        # Two characters a chunk, and each an event of its own.
        texts = [content[i : i + 2] for i in range(0, len(content), 2)]
        chunks = [piece(t) if "objects" in ask else "".join(map(event, t)) for t in texts]
        chunks += [] if "objects" in ask else ["data: [DONE]\n\n"]
    else:
        chunks = [answer(route, ask)]
    first = ask.get("chunks_before", 0)
    for chunk in chunks[:first]:
        yield chunk
    if "gate" in ask:
        await hold(ask["gate"], job["id"])
    if "fail" in ask:
        yield {"error": ask["fail"]}
        return
    for chunk in chunks[first:]:
        yield chunk


if __name__ == "__main__":
    runpod.serverless.start(
        {
            "handler": handler,
            "return_aggregate_stream": True,
            "concurrency_modifier": lambda _: 8,
        }
    )
