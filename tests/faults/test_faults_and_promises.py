"""A table of faults and promises: the real worker and engine under a platform that misbehaves."""

import asyncio
import os
import re
import signal
from collections.abc import AsyncIterator

import psutil
import pytest

from tests.faults.chaos import Chaos
from tests.faults.client import CODE, Client, answer_of, chat, joined, normal, stream
from tests.faults.conftest import SHUTDOWN_TIMEOUT
from tests.support import Endpoint, left, soon

pytestmark = pytest.mark.engine

LONG = {"max_tokens": 1500, "ignore_eos": True, "temperature": 0}

FAULTS = {
    "nothing": [],
    "latency": ["all:latency=50ms"],
    "chunks-503": ["job-stream:status=503,probability=0.4"],
    "results-502": ["job-done:status=502,count=5"],
    "takes-500": ["job-take:status=500,count=3"],
    "flashboot": ["job-take:status=400,count=2"],
    "stops-503": ["job-stop:status=503,count=2"],
    "dropped-before": ["all:drop=before,probability=0.3"],
    "results-dropped-after": ["job-done:drop=after,count=4"],
    "takes-dropped-after": ["job-take:drop=after,count=2"],
    "chunks-dropped-after": ["job-stream:drop=after,probability=0.3"],
    "half-written": ["all:half,probability=0.3"],
    "handed-out-twice": ["job-take:duplicate"],
    "stop-of-unknown": ["job-stop:stop-signal,count=3"],
    "stop-of-finished": ["job-done:stop-signal"],
    "clock-back": ["all:clock=-1h"],
    "outage": ["all:outage=3s,after=300ms"],
    "much-at-once": [
        "all:latency=20ms",
        "all:status=503,probability=0.1",
        "all:drop=before,probability=0.1",
        "all:drop=after,probability=0.1",
        "job-take:duplicate",
    ],
}
"""Those that no client may notice."""

MAY_REPEAT_EVENTS = {"chunks-dropped-after", "half-written", "much-at-once"}
"""Faults after which a chunk may arrive twice; text tells by its `offset`, events can't."""


@pytest.fixture
async def steady(served: Endpoint, client: Client) -> AsyncIterator[None]:
    """The worker is the same process afterwards; what a failed test left behind is cancelled."""
    before = await client.workers()
    yield
    await client.end_faults()
    after = await client.workers()
    assert [worker["pid"] for worker in after] == [worker["pid"] for worker in before]
    for job in after[0]["jobs_in_progress"]:
        await client.cancel(job)
    await soon(lambda: not served.workers()[0]["jobs_in_progress"], 20, "the end of all jobs")


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.usefixtures("steady")
async def test_no_client_notices(
    name: str, served: Endpoint, client: Client, subtests: pytest.Subtests
) -> None:
    kinds = [normal, stream] if name in MAY_REPEAT_EVENTS else [normal, stream, chat]
    asks = [kinds[number % len(kinds)](number) for number in range(9)]
    async with client.faulty(*FAULTS[name]):
        jobs = [await client.run(ask.input) for ask in asks]
        unwanted = await client.run({"prompt": CODE, "answerType": "stream", "options": LONG})
        async for _ in client.chunks(unwanted):
            await client.cancel(unwanted)
        streams = await asyncio.gather(*map(client.streamed, jobs))
        ends = await asyncio.gather(*map(client.finished, jobs))
        with subtests.test("a cancelled job leaves the engine"):
            line = f"{unwanted} | ⊘ cancelled"
            await soon(lambda: served.output.find(line), 20, "the worker's log line")
    with subtests.test("every result arrives, complete and right"):
        for ask, end in zip(asks, ends, strict=True):
            assert end["status"] == "COMPLETED", end
            assert answer_of(ask, end["output"]) == ask.text
    with subtests.test("streams come in order, with no gap and nothing twice"):
        for ask, streamed in zip(asks, streams, strict=True):
            assert answer_of(ask, streamed) == ask.text
    with subtests.test("each job runs once"):
        for job in jobs:
            await soon(lambda job=job: ends_of(job, served), 20, f"a log line about {job}")
            assert len(ends_of(job, served)) == 1


def ends_of(job: str, served: Endpoint) -> list[str]:
    """What the worker's log says of how a job ended; `cancelled` too where only the platform
    knows that its result has arrived."""
    lines = [line for line in served.output.lines if f" {job} | " in line]
    return [line for line in lines if any(glyph in line for glyph in "✓✗⊘")]


@pytest.mark.usefixtures("steady")
async def test_a_refused_result_is_never_shown_as_finished(
    served: Endpoint, client: Client
) -> None:
    async with client.faulty("job-done:status=400,count=1"):
        told = await client.run(normal(1).input)
        end = await client.finished(told)
    assert end["status"] == "FAILED"
    assert "refused" in end["error"]
    assert "400" in end["error"]
    async with client.faulty("job-done:status=400"):
        untold = await client.run(normal(2).input)
        for job in (told, untold):
            line = await soon(lambda job=job: served.output.find(job), 30, "the log line")
            assert "lost" in line
            assert "finished" not in line
    assert (await client.status(untold))["status"] == "IN_PROGRESS"
    await client.cancel(untold)


@pytest.mark.usefixtures("steady")
async def test_a_refused_chunk_leaves_the_result_whole(client: Client) -> None:
    ask = stream(1)
    async with client.faulty("job-stream:status=413,count=2"):
        job = await client.run(ask.input)
        end = await client.finished(job)
    assert end["status"] == "COMPLETED"
    assert answer_of(ask, end["output"]) == ask.text


@pytest.mark.usefixtures("steady")
async def test_a_job_cancelled_while_it_is_handed_out(served: Endpoint, client: Client) -> None:
    async with client.faulty("job-take:stop-signal"):
        jobs = [await client.run(normal(number).input) for number in range(8)]
        ends = await asyncio.gather(*map(client.finished, jobs))
    assert {end["status"] for end in ends} == {"CANCELLED"}
    for job in jobs:  # those whose stop came before they did run to their end
        await soon(lambda job=job: ends_of(job, served), 60, f"a log line about {job}")
    other = normal(1)
    end = await client.finished(await client.run(other.input))
    assert answer_of(other, end["output"]) == other.text


@pytest.mark.usefixtures("steady")
async def test_a_failed_job_that_is_retried_runs_again(client: Client) -> None:
    job = await client.run({"prompt": ""})
    first = await client.finished(job)
    await client.retry(job)
    again = await client.finished(job)
    assert first["status"] == again["status"] == "FAILED"
    assert again["error"] == first["error"]


@pytest.mark.usefixtures("steady")
async def test_jobs_outlast_a_jump_of_the_workers_clock(served: Endpoint, client: Client) -> None:
    [worker] = await client.workers()
    ask = stream(1, words=60)
    for place in ("3600 s ahead", "0 s ahead"):
        job = await client.run(ask.input)
        chunks = client.chunks(job)
        first = await anext(chunks)
        os.kill(worker["pid"], signal.SIGUSR2)
        await soon(lambda place=place: served.output.find(place), 10, "the jump")
        rest = [chunk async for chunk in chunks]
        assert answer_of(ask, [first, *rest]) == ask.text
        assert (await client.status(job))["status"] == "COMPLETED"


@pytest.mark.usefixtures("steady")
async def test_a_job_whose_time_is_up_by_the_platforms_clock_ends(
    served: Endpoint, client: Client
) -> None:
    job = await client.run({"prompt": CODE, "answerType": "stream", "options": LONG})
    await anext(client.chunks(job))
    async with client.faulty("all:clock=+11m"):
        end = await client.finished(job)
    assert end["status"] == "TIMED_OUT"
    await soon(lambda: served.output.find(f"{job} | ⊘ cancelled"), 20, "the worker's log line")


@pytest.mark.usefixtures("steady")
async def test_an_outage_of_a_minute_during_64_streams_loses_nothing(
    served: Endpoint, client: Client
) -> None:
    [worker] = await client.workers()
    process = psutil.Process(worker["pid"])
    options = LONG | {"max_tokens": 600}
    inputs = [
        {"prompt": f"{CODE}f{i}", "answerType": "stream", "options": options} for i in range(64)
    ]
    jobs = await asyncio.gather(*map(client.run, inputs))
    streams = [client.chunks(job) for job in jobs]
    first = await anext(streams[-1])
    memory = process.memory_info().rss
    await soon(lambda: len(served.workers()[0]["jobs_in_progress"]) == 64, 30, "64 jobs at once")
    async with client.faulty("all:outage=60s"):
        most = memory

        async def rest(stream: AsyncIterator) -> list:
            return [chunk async for chunk in stream]

        reading = asyncio.gather(*map(rest, streams))
        while not reading.done():
            most = max(most, process.memory_info().rss)
            await asyncio.wait([reading], timeout=1)
        *others, last = reading.result()
        ends = await asyncio.gather(*map(client.finished, jobs))
    for chunks, end in zip([*others, [first, *last]], ends, strict=True):
        assert end["status"] == "COMPLETED"
        assert end["output"][-1]["usage"]["completion_tokens"] == 600
        assert joined(chunks) == "".join(part["text"] for part in end["output"])
    assert most < memory + (64 << 20)


@pytest.mark.usefixtures("steady")
async def test_a_short_chaos(served: Endpoint, client: Client) -> None:
    chaos = Chaos(client, served, seed=1, run_limit=30)
    await chaos.run(20)
    assert not chaos.problems, "\n".join(chaos.problems)
    assert chaos.outcomes.total() == chaos.sent
    assert chaos.outcomes["completed"]


async def test_sigterm_during_an_outage_ends_in_time_and_says_what_is_lost(
    served: Endpoint, client: Client
) -> None:
    [worker] = await client.workers()
    process = psutil.Process(worker["pid"])
    family = [process, *process.children(recursive=True)]
    job = await client.run({"prompt": CODE, "answerType": "stream", "options": LONG})
    await anext(client.chunks(job))
    async with client.faulty("all:outage=10m"):
        process.terminate()
        await soon(lambda: not left(family), SHUTDOWN_TIMEOUT + 10, "the worker's end")
        end = await client.finished(job)
    lines = [line for line in served.output.lines if f"{job} | " in line]  # its own, no ping's
    assert "✗ lost: " in lines[-1]
    assert re.search(r"jobs: .*[1-9]\d* lost", served.output.text())
    assert end["status"] == "FAILED"
    assert end["error"].startswith("worker worker-1 exited with code 0 while this job")
