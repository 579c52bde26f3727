"""Deltas that pile up, and what they are when they are joined."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from worker.errors import EngineError
from worker.job.chunks import joined, merged, piled
from worker.job.types import Delta, Usage

USAGE = Usage(3, 4)


async def gave(*deltas: Delta, error: Exception | None = None) -> AsyncGenerator[Delta, None]:
    for delta in deltas:
        yield delta
        await asyncio.sleep(0)
    if error:
        raise error


def piece(arguments: str, **first: object) -> Delta:
    call = {"index": 0, **first, "function": {"arguments": arguments}}
    return Delta("", tool_calls=(call,))


async def slowly(*deltas: Delta) -> list[Delta]:
    """What a consumer gets that takes one and comes back when all has been read."""
    read = asyncio.Event()

    async def source() -> AsyncGenerator[Delta, None]:
        for delta in deltas:
            yield delta
        read.set()

    async with aclosing(piled(source())) as given:
        first = await anext(given)
        await read.wait()
        return [first, *[delta async for delta in given]]


async def test_a_stream_is_read_however_slow_its_consumer_is() -> None:
    found = await slowly(Delta("a"), Delta("b"), Delta("c"), Delta("", 0, "stop", USAGE))
    assert "".join(delta.text for delta in found) == "abc"
    assert len(found) <= 2
    assert found[-1].usage == USAGE


async def test_usage_comes_last_of_all_answers() -> None:
    ends = Delta("", 0, "stop"), Delta("", 1, "stop", USAGE)
    found = await slowly(Delta("b", 1), Delta("a", 0), *ends)
    assert [delta.usage for delta in found] == [None] * (len(found) - 1) + [USAGE]


async def test_an_error_comes_after_what_was_there_before_it_and_closes_the_others() -> None:
    closed = asyncio.Event()

    async def endless() -> AsyncGenerator[Delta, None]:
        try:
            await asyncio.Event().wait()
            yield Delta("")
        finally:
            closed.set()

    given = piled(endless(), gave(Delta("a", 1), error=EngineError("broke")))
    assert (await anext(given)).text == "a"
    with pytest.raises(EngineError, match="broke"):
        await anext(given)
    assert closed.is_set()


async def test_the_pieces_of_a_call_are_one_call() -> None:
    pieces = [piece('{"a"', id="call_1", type="function"), piece(": 1}", id=None)]
    [chunk] = await joined(gave(*pieces, Delta("", 0, "tool_calls", USAGE)), 1)
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"arguments": '{"a": 1}'}}
    assert chunk["tool_calls"] == [call]
    assert chunk["finish_reason"] == "tool_calls"
    assert merged([Delta("a", reasoning="x"), Delta("b", reasoning="y")]) == Delta(
        "ab", reasoning="xy"
    )
