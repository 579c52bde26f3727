"""The stand-in platform of the benchmarks: what it hands out, holds back, times and reads."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from benchmarks.endpoint import Endpoint, TextOf, Timed, summary

EVENT = 'data: {"choices": [{"text": "%s"}]}\n\n'


@asynccontextmanager
async def served() -> AsyncIterator[aiohttp.ClientSession]:
    runner = web.ServerRunner(web.Server(Endpoint().answer, access_log=None))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    base = f"http://127.0.0.1:{runner.addresses[0][1]}/w/"
    try:
        async with aiohttp.ClientSession(base) as session:
            yield session
    finally:
        await runner.cleanup()


def test_text_is_read_from_chunks_and_from_events_cut_anywhere() -> None:
    assert TextOf()({"text": "abc", "finish_reason": "length"}) == "abc"
    stream = EVENT % "é1" + EVENT % "" + EVENT % "2" + "data: [DONE]\n\n"
    for cut in range(len(stream)):
        text_of = TextOf()
        assert text_of(stream[:cut]) + text_of(stream[cut:]) == "é12"


def test_how_a_job_ended_is_read_from_both_shapes() -> None:
    ended = TextOf()
    ended({"text": "a"})
    assert ended.finish_reason is None
    ended({"text": "", "finish_reason": "length"})
    assert ended.finish_reason == "length"
    events = TextOf()
    events('data: {"choices": [{"text": "", "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n')
    assert events.finish_reason == "stop"


def test_a_summary_times_text_not_empty_chunks() -> None:
    bodies = [
        json.dumps({"output": text}).encode()
        for text in ("data: {", '"choices": [{"text": ""}]}\n\n', EVENT % "x", EVENT % "y", "\n")
    ]
    job = Timed(list(zip([0.1, 0.2, 0.3, 0.4, 0.5], bodies, strict=True)), end=0.6)
    assert summary(job) == {
        "first": 0.3,
        "last": 0.4,
        "end": 0.6,
        "chunks": 5,
        "bytes": sum(map(len, bodies)),
        "text": "xy",
        "finish_reason": None,
        "error": "",
    }


@pytest.mark.parametrize("batch_size", [None, 2])
async def test_jobs_are_handed_out_until_none_is_left_and_timed(batch_size: int | None) -> None:
    query = f"?batch_size={batch_size}" if batch_size else "?gpu=none"
    kind = "job-take-batch" if batch_size else "job-take"
    jobs = [{"id": str(number), "input": {}} for number in range(3)]

    async def take(session: aiohttp.ClientSession) -> list[dict]:
        async with session.get(f"{kind}/w{query}") as answer:
            found = await answer.json()
        return found if batch_size else [found]

    async def post(session: aiohttp.ClientSession, call: str, job: str, output: object) -> None:
        async with session.post(f"{call}/w/{job}?x", data=json.dumps(output)) as answer:
            assert answer.status == 200

    async with served() as session:
        run = {"jobs": jobs, "round_trip": 0.05, "timeout": 20}
        running = asyncio.create_task(session.post("run", json=run))
        taken: list[dict] = []
        while len(taken) < 3:
            taken += await take(session)
        assert taken == jobs
        begin = asyncio.get_running_loop().time()
        await post(session, "job-stream", "0", {"output": {"text": "a"}})
        assert asyncio.get_running_loop().time() - begin >= 0.05
        await post(session, "job-done", "0", {"output": [{"text": "a"}]})
        await post(session, "job-done", "1", {"error": "no room"})
        await post(session, "job-done", "2", {"output": []})
        async with await running as answer:
            first, second, third = await answer.json()
    assert first["text"] == "a"
    assert first["first"] is not None
    assert first["first"] < first["end"]
    assert (first["error"], second["error"], third["error"]) == ("", "no room", "")
    assert third["first"] is None


async def test_a_run_that_does_not_end_is_given_up() -> None:
    async with served() as session:
        run = {"jobs": [{"id": "1", "input": {}}], "round_trip": 0, "timeout": 0.05}
        async with session.post("run", json=run) as answer:
            [job] = await answer.json()
    assert job["end"] is None
