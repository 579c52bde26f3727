"""llama.cpp's POST /completion: its request → ours, our deltas → its answers."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from worker.engines.base import Engine
from worker.errors import BadRequest, TripodError
from worker.job.input import parse as parse_input
from worker.job.problems import describe
from worker.job.types import Delta, Request

NAMES = {
    "n_predict": "max_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "seed": "seed",
    "stop": "stop",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "ignore_eos": "ignore_eos",
}
"""llama.cpp's names → ours; what else it knows (`cache_prompt`, `id_slot`, …) is not asked for."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A validated request, and whether its answer is streamed."""

    request: Request
    stream: bool


def parse(body: object) -> Asked:
    """Validate a request.

    Raises:
        BadRequest: one sentence that names the field, the value and what is allowed.
    """
    if not isinstance(body, dict):
        raise BadRequest(f"body: must be an object, not {describe(body)}")
    stream = body.get("stream", False)
    if not isinstance(stream, bool):
        raise BadRequest(f"stream: {describe(stream)} is not allowed; it must be true or false")
    options = {ours: body[theirs] for theirs, ours in NAMES.items() if theirs in body}
    for name in ("max_tokens", "seed"):
        if options.get(name) == -1:  # llama.cpp's "as you like"
            del options[name]
    if not options.get("stop", True):
        del options["stop"]
    request = parse_input({"prompt": body.get("prompt"), "options": options})
    assert isinstance(request, Request)
    return Asked(request, stream)


async def whole(asked: Asked, engine: Engine) -> dict[str, Any]:
    """The answer as one object."""
    texts = []
    last = Delta("")
    async with aclosing(engine.generate(asked.request)) as deltas:
        async for delta in deltas:
            texts.append(delta.text)
            last = delta
    return _final("".join(texts), last, engine)


async def stream(asked: Asked, engine: Engine) -> AsyncGenerator[dict[str, Any], None]:
    """`{"content", "stop": false}` as it is generated; the last one has `stop` true."""
    async with aclosing(engine.generate(asked.request)) as deltas:
        async for delta in deltas:
            if delta.text:
                yield {"content": delta.text, "stop": False}
            if delta.finish_reason:
                yield _final("", delta, engine)


async def events(
    first: dict[str, Any], rest: AsyncGenerator[dict[str, Any], None]
) -> AsyncIterator[str]:
    """Server-sent events; an error that comes after the first one is an event as well."""
    try:
        yield _event(first)
        async for item in rest:
            yield _event(item)
    except TripodError as error:
        yield _event({"error": {"message": str(error), "code": 500}})
    finally:
        await rest.aclose()


def _event(item: dict[str, Any]) -> str:
    return f"data: {json.dumps(item, ensure_ascii=False)}\n\n"


def _final(content: str, last: Delta, engine: Engine) -> dict[str, Any]:
    usage = last.usage
    return {
        "content": content,
        "stop": True,
        "stop_type": "limit" if last.finish_reason == "length" else "eos",
        "model": engine.model_name,
        "tokens_evaluated": usage.prompt_tokens if usage else 0,
        "tokens_predicted": usage.completion_tokens if usage else 0,
    }
