"""Deltas of the engine → the dicts that a job yields, and their JSON."""

import json
from collections.abc import AsyncIterator
from typing import Any

from worker.job.types import Delta, Usage

Chunk = dict[str, Any]
"""`{"text"}`, with `index` when n > 1, `finish_reason` on the last of an answer, and `usage` on
the last of all."""


def as_chunk(delta: Delta, n: int) -> Chunk:
    """One delta as the client sees it; `n` is the number of answers that were asked for."""
    chunk: Chunk = {"text": delta.text}
    if n > 1:
        chunk["index"] = delta.index
    if delta.finish_reason:
        chunk["finish_reason"] = delta.finish_reason
    if delta.usage:
        chunk["usage"] = _openai_usage(delta.usage)
    return chunk


async def joined(deltas: AsyncIterator[Delta], n: int) -> list[Chunk]:
    """Wait for the end; one chunk for each of the `n` answers, in their order."""
    texts: dict[int, list[str]] = {index: [] for index in range(n)}
    reasons: dict[int, str | None] = {}
    usage: Usage | None = None
    async for delta in deltas:
        texts[delta.index].append(delta.text)
        reasons[delta.index] = delta.finish_reason
        usage = delta.usage
    last = n - 1
    return [
        as_chunk(Delta("".join(texts[i]), i, reasons.get(i), usage if i == last else None), n)
        for i in range(n)
    ]


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
