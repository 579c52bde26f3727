"""Chunks and results on their way to a platform that misbehaves as the test says."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from tests.support import soon
from worker.errors import Lost, Undelivered
from worker.serverless import delivery
from worker.serverless.delivery import (
    CHUNK_LIMIT,
    PIECE,
    RESULT_LIMIT,
    Delivery,
    Outbox,
    encoded,
    pieces,
)


class Moody:
    """A platform that answers each POST as `moods` says, and 200 when none is left.

    A mood is a status, or `before` and `after`: the connection is cut before or after the body
    was kept.
    """

    def __init__(self) -> None:
        self.moods: list[int | str] = []
        self.chunks: list[Any] = []
        self.results: list[dict[str, Any]] = []
        self.ids: set[str] = set()
        self.posts = 0

    async def post(self, request: web.Request) -> web.Response:
        self.posts += 1
        self.ids.add(request.headers["X-Request-ID"])
        body = json.loads(await request.read())
        mood = self.moods.pop(0) if self.moods else 200
        if mood in {200, "after"}:
            if "stream" in request.path:
                self.chunks.append(body["output"])
            else:
                self.results.append(body)
        if isinstance(mood, str):
            assert request.transport
            request.transport.abort()
            return web.Response()
        return web.Response(status=mood, text="so it is")


@pytest.fixture
async def moody() -> AsyncIterator[tuple[Moody, Delivery]]:
    platform = Moody()
    app = web.Application(client_max_size=64 << 20)
    app.router.add_post("/{kind}/w/{job}", platform.post)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    base = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with aiohttp.ClientSession() as session:
        urls = f"{base}/job-stream/w/$ID?gpu=1", f"{base}/job-done/w/$ID?gpu=1"
        yield platform, Delivery(session, *urls, timeout=3)
    await runner.cleanup()


def texts(platform: Moody) -> list[str]:
    return [chunk["text"] for chunk in platform.chunks]


async def test_chunks_and_the_result_arrive_in_order_once(moody: tuple[Moody, Delivery]) -> None:
    platform, served = moody
    outbox = Outbox(served, "job-1")
    platform.moods = [200, 503, 500, 429, "before", 200, 502]
    for text in ("a", "b", "c", "d"):
        await outbox.send({"text": text})
    assert await outbox.finish(None, stop_pod=False) is None
    assert texts(platform) == ["a", "b", "c", "d"]
    assert platform.results == [{"output": [{"text": text} for text in "abcd"]}]
    assert platform.ids == {"job-1"}


async def test_a_chunk_that_may_have_arrived_says_where_it_belongs(
    moody: tuple[Moody, Delivery],
) -> None:
    platform, served = moody
    outbox = Outbox(served, "job-1")
    await outbox.send({"text": "zwölf "})
    platform.moods = ["after"]
    await outbox.send({"text": "Boxer"})
    await outbox.send({"text": "!", "usage": {}})
    assert platform.chunks == [
        {"text": "zwölf "},
        {"text": "Boxer"},
        {"text": "Boxer", "offset": 6},
        {"text": "!", "usage": {}},
    ]
    await outbox.finish(None, stop_pod=False)
    assert [chunk["text"] for chunk in platform.results[0]["output"]] == ["zwölf ", "Boxer", "!"]


async def test_offsets_are_counted_for_each_answer(moody: tuple[Moody, Delivery]) -> None:
    platform, served = moody
    outbox = Outbox(served, "job-1")
    await outbox.send({"text": "one", "index": 0})
    await outbox.send({"text": "four", "index": 1})
    platform.moods = ["before"]
    await outbox.send({"text": "more", "index": 1})
    assert platform.chunks[-1] == {"text": "more", "index": 1, "offset": 4}


async def test_thinking_and_calls_have_offsets_of_their_own(
    moody: tuple[Moody, Delivery],
) -> None:
    platform, served = moody
    outbox = Outbox(served, "job-1")
    await outbox.send({"text": "", "reasoning": "Hm."})
    platform.moods = ["after"]
    await outbox.send({"text": "", "reasoning": "Well."})
    await outbox.send({"text": "So", "tool_calls": [{"index": 0}, {"index": 0}]})
    platform.moods = ["after"]
    await outbox.send({"text": "", "tool_calls": [{"index": 0}]})
    again = [chunk for chunk in platform.chunks if "offset" in chunk]
    assert again == [
        {"text": "", "reasoning": "Well.", "offset": 0, "reasoning_offset": 3},
        {"text": "", "tool_calls": [{"index": 0}], "offset": 2, "tool_calls_offset": 2},
    ]


async def test_a_refused_chunk_is_counted_and_still_in_the_result(
    moody: tuple[Moody, Delivery], caplog: pytest.LogCaptureFixture
) -> None:
    platform, served = moody
    outbox = Outbox(served, "job-1")
    platform.moods = [200, 400, 404]
    for text in ("a", "b", "c", "d"):
        await outbox.send({"text": text})
    await outbox.finish(None, stop_pod=False)
    assert texts(platform) == ["a", "d"]
    assert outbox.refused == 2
    assert caplog.text.count("a chunk was refused: status 400 so it is") == 1
    assert [chunk["text"] for chunk in platform.results[0]["output"]] == ["a", "b", "c", "d"]


async def test_a_refused_result_is_lost_and_the_client_is_told(
    moody: tuple[Moody, Delivery],
) -> None:
    platform, served = moody
    outbox = Outbox(served, "job-1")
    await outbox.send({"text": "a"})
    platform.moods = [413]
    with pytest.raises(Lost, match=r"refused the job's result .* status 413 .* was told"):
        await outbox.finish(None, stop_pod=True)
    [result] = platform.results
    assert "refused the job's result" in result["error"]
    assert result["stopPod"] is True


async def test_a_result_that_nobody_takes_is_lost(moody: tuple[Moody, Delivery]) -> None:
    platform, served = moody
    outbox = Outbox(served, "job-1")
    platform.moods = [400, 400]
    with pytest.raises(Lost, match=r"refused the job's result of 14 bytes: status 400 so it is$"):
        await outbox.finish(None, stop_pod=False)
    platform.moods = [503] * 1000
    with pytest.raises(Lost, match=r"took nothing for DELIVERY_TIMEOUT=3 seconds: status 503"):
        await outbox.finish("some error", stop_pod=False)
    assert platform.results == []


async def test_an_outage_is_told_once_and_its_end_too(
    moody: tuple[Moody, Delivery], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    platform, served = moody
    platform.moods = [503] * 1000
    outboxes = [Outbox(served, f"job-{i}") for i in range(8)]
    sending = [asyncio.create_task(outbox.send({"text": "x"})) for outbox in outboxes]
    await soon(lambda: "takes no deliveries" in caplog.text, 10, "the warning")
    platform.moods = []
    await asyncio.gather(*sending)
    assert texts(platform) == ["x"] * 8
    assert caplog.text.count("the platform takes no deliveries: status 503") == 1
    assert caplog.text.count("the platform takes deliveries again") == 1


async def test_a_platform_that_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    async with aiohttp.ClientSession() as session:
        url = "http://127.0.0.1:9/x/$ID?y=1"
        outbox = Outbox(Delivery(session, url, url, timeout=0.5), "job-1")
        with pytest.raises(Undelivered, match=r"DELIVERY_TIMEOUT=0.5 seconds: Cannot connect"):
            await outbox.send({"text": "x"})


async def test_a_platform_that_does_not_answer_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(delivery, "ATTEMPT_TIMEOUT", 0.2)
    held = asyncio.Event()

    async def hang(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await held.wait()
        writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x/$ID?y=1"
    async with aiohttp.ClientSession() as session:
        outbox = Outbox(Delivery(session, url, url, timeout=0.6), "job-1")
        with pytest.raises(Undelivered, match="TimeoutError"):
            await outbox.send({"text": "x"})
    held.set()
    server.close()


async def test_a_chunk_over_the_limit_is_divided(moody: tuple[Moody, Delivery]) -> None:
    platform, served = moody
    outbox = Outbox(served, "job-1")
    text = "ü🎉\n" * 400_000
    chunk = {"text": text, "index": 2, "finish_reason": "stop", "usage": {"total_tokens": 9}}
    await outbox.send(chunk)
    assert len(platform.chunks) > 1
    assert "".join(texts(platform)) == text
    assert all(len(encoded({"output": part})) <= CHUNK_LIMIT for part in platform.chunks)
    assert [("usage" in part, part["index"]) for part in platform.chunks[:-1]] == [(False, 2)] * (
        len(platform.chunks) - 1
    )
    assert platform.chunks[-1]["usage"] == {"total_tokens": 9}
    await outbox.finish(None, stop_pod=False)
    assert platform.results == [{"output": [chunk]}]


async def test_an_object_over_the_limit_is_only_in_the_result(
    moody: tuple[Moody, Delivery],
) -> None:
    platform, served = moody
    outbox = Outbox(served, "job-1")
    answer = {"data": [0.123456789] * 100_000}
    await outbox.send(answer)
    [note] = platform.chunks
    assert "this part has 1,300,0" in note["error"]
    await outbox.finish(None, stop_pod=False)
    assert platform.results == [{"output": [answer]}]


async def test_a_result_over_the_limit_is_a_small_error(moody: tuple[Moody, Delivery]) -> None:
    platform, served = moody
    outbox = Outbox(served, "job-1")
    for _ in range(RESULT_LIMIT // 900_000 + 1):
        await outbox.send({"text": "x" * 900_000})
    sentence = await outbox.finish(None, stop_pod=False)
    assert sentence
    assert "the platform takes 20,000,000" in sentence
    assert platform.results == [{"error": sentence}]


@given(st.text(min_size=1, max_size=2000).map(lambda text: text * 100), st.booleans())
def test_the_pieces_make_up_the_whole(text: str, as_events: bool) -> None:
    parts = pieces(text if as_events else {"text": text})
    joined = "".join(part if isinstance(part, str) else part["text"] for part in parts)
    assert joined == text
    assert all(len(encoded({"output": part})) <= CHUNK_LIMIT for part in parts)


def test_events_are_divided_between_two_of_them() -> None:
    event = f'data: {{"text": "{"x" * 999}"}}\n\n'
    parts = pieces(event * (3 * PIECE // len(event)))
    assert len(parts) > 2
    assert all(part.startswith("data: ") and part.endswith("\n\n") for part in parts)


def test_half_a_surrogate_pair_and_what_json_lacks() -> None:
    assert json.loads(encoded({"error": "\ud800"})) == {"error": "\ud800"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        encoded({"x": float("nan")})
    with pytest.raises(TypeError, match="set"):
        encoded({"x": {1}})
