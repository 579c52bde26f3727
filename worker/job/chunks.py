"""Deltas of the engine → the dicts that a job yields, and their JSON."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from worker.job.types import Delta, ToolCall, Usage

Chunk = dict[str, Any]
"""`{"text"}`, with `reasoning` and `tool_calls` where the model thinks and calls tools, `index`
when n > 1, `finish_reason` on the last of an answer, and `usage` on the last of all."""


def as_chunk(delta: Delta, n: int) -> Chunk:
    """One delta as the client sees it; `n` is the number of answers that were asked for."""
    chunk: Chunk = {"text": delta.text}
    if delta.reasoning:
        chunk["reasoning"] = delta.reasoning
    if delta.tool_calls:
        chunk["tool_calls"] = list(delta.tool_calls)
    if n > 1:
        chunk["index"] = delta.index
    if delta.finish_reason:
        chunk["finish_reason"] = delta.finish_reason
    if delta.usage:
        chunk["usage"] = _openai_usage(delta.usage)
    return chunk


async def joined(deltas: AsyncIterator[Delta], n: int) -> list[Chunk]:
    """Wait for the end; one chunk for each of the `n` answers, in their order."""
    answers: list[list[Delta]] = [[] for _ in range(n)]
    usage: Usage | None = None
    async for delta in deltas:
        answers[delta.index].append(delta)
        usage = delta.usage
    *others, last = (replace(merged(answer), usage=None) for answer in answers)
    return [as_chunk(answer, n) for answer in [*others, replace(last, usage=usage)]]


def merged(deltas: list[Delta]) -> Delta:
    """Deltas of one answer that follow each other, as one."""
    last = deltas[-1]
    return Delta(
        "".join(delta.text for delta in deltas),
        last.index,
        last.finish_reason,
        last.usage,
        "".join(delta.reasoning for delta in deltas),
        _whole_calls([piece for delta in deltas for piece in delta.tool_calls]),
    )


def _whole_calls(pieces: list[ToolCall]) -> tuple[ToolCall, ...]:
    """Pieces of calls, as OpenAI streams them → each call once, with its arguments together."""
    calls: dict[int, ToolCall] = {}
    for piece in pieces:
        call = calls.setdefault(piece["index"], {"function": {"arguments": ""}})
        function, said = call["function"], _without_nulls(piece.get("function") or {})
        arguments = function["arguments"] + said.get("arguments", "")
        call |= _without_nulls(piece)
        call["function"] = function | said | {"arguments": arguments}
    return tuple(calls.values())


def _without_nulls(piece: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in piece.items() if value is not None}


async def piled(*streams: AsyncGenerator[Delta, None]) -> AsyncGenerator[Delta, None]:
    """The deltas of all, read as they come; for a slow consumer those of an answer become one.

    When one stream raises, so does this, and the others are closed.
    """
    waiting: dict[int, list[Delta]] = {}
    changed = asyncio.Event()

    async def read(stream: AsyncGenerator[Delta, None]) -> None:
        async with aclosing(stream) as deltas:
            async for delta in deltas:
                waiting.setdefault(delta.index, []).append(delta)
                changed.set()

    readings = [asyncio.create_task(read(stream)) for stream in streams]
    for reading in readings:
        reading.add_done_callback(lambda _: changed.set())
    try:
        while waiting or not all(reading.done() for reading in readings):
            await changed.wait()
            changed.clear()
            while waiting:
                index = min(waiting, key=lambda index: waiting[index][-1].usage is not None)
                yield merged(waiting.pop(index))
            for reading in readings:
                if reading.done():
                    reading.result()
    finally:
        for reading in readings:
            reading.cancel()
        await asyncio.gather(*readings, return_exceptions=True)


async def text_of(deltas: AsyncIterator[Delta]) -> str:
    """Wait for the end; the text of the first answer."""
    return "".join([delta.text async for delta in deltas if delta.index == 0])


def encoded(value: Any) -> bytes:
    """JSON as UTF-8.

    Raises:
        TypeError, ValueError: JSON can't hold it.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a pair of surrogates, which only an escape can carry
        return json.dumps(value, allow_nan=False).encode()


def _openai_usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
