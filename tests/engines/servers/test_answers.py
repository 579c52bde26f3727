"""A server's streams as deltas: text, thinking and calls by the names of different servers."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from worker.engines.servers.answers import answers
from worker.job.chunks import merged
from worker.job.types import Delta, Options, Request, Usage

CHAT = [{"role": "user", "content": "x"}]
CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}
MORE = {"index": 0, "function": {"arguments": "{}"}}


def events(deltas: list[dict[str, Any]], reason: str, usage: dict[str, int] | None) -> bytes:
    chunks: list[dict[str, Any]] = [{"choices": [{"delta": delta}]} for delta in deltas]
    chunks.append({"choices": [{"delta": {}, "finish_reason": reason}]})
    if usage:
        chunks.append({"choices": [], "usage": usage})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks).encode()


async def read(n: int, streams: Iterator[bytes]) -> list[Delta]:
    def serve(_: httpx.Request) -> httpx.Response:
        return httpx.Response(
            200, content=next(streams), headers={"content-type": "text/event-stream"}
        )

    request = Request(None, CHAT, True, Options(n=n))
    transport = httpx.MockTransport(serve)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
        body = {"messages": CHAT}
        return [delta async for delta in answers(http, request, body, 2048, lambda: None)]


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
async def test_thinking_and_calls_are_passed_on(name: str) -> None:
    said = [{name: "Hm"}, {name: "."}, {"content": "So"}, {"tool_calls": [CALL]}]
    stream = events(
        [*said, {"tool_calls": [MORE]}],
        "tool_calls",
        {"prompt_tokens": 5, "completion_tokens": 7},
    )
    found = merged(await read(1, iter([stream])))
    assert (found.reasoning, found.text, found.finish_reason) == ("Hm.", "So", "tool_calls")
    assert found.usage == Usage(5, 7)
    [call] = found.tool_calls
    assert call == CALL | {"function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("last", "total"), [({"prompt_tokens": 5, "completion_tokens": 3}, 5), (None, None)]
)
async def test_the_usage_of_all_answers_is_on_the_very_last_delta(last: Any, total: Any) -> None:
    first = {"prompt_tokens": 5, "completion_tokens": 2}
    streams = iter(
        [events([{"content": "a"}], "stop", first), events([{"content": "b"}], "stop", last)]
    )
    found = await read(2, streams)
    assert sorted(delta.text for delta in found if delta.text) == ["a", "b"]
    assert [delta.usage for delta in found[:-1]] == [None] * (len(found) - 1)
    assert found[-1].usage == (Usage(5, total) if total else None)
