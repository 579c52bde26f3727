"""The worker against a platform that the test drives by hand: timings that no emulator gives."""

import asyncio
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from tests.support import (
    AMPLE,
    PROBED_WORKER,
    START,
    Output,
    Platform,
    Probe,
    left,
    platform,
    soon,
    start,
    stop,
    worker_environment,
)

pytestmark = pytest.mark.engine

PROMPT = "import os\n\ndef "
LONG = {"max_tokens": 1900, "ignore_eos": True}
SECONDS_LONG = {"max_tokens": 500, "ignore_eos": True}


class Rig:
    """A worker, the platform that it takes its jobs from, and the probe in its engine."""

    def __init__(self, platform: Platform, process, output: Output, probe: Probe) -> None:
        self.platform, self.process, self.output, self.probe = platform, process, output, probe
        self.count = 0

    def job(self, answer_type: str = "stream", **options: object) -> dict:
        self.count += 1
        return {
            "id": f"job-{self.count}",
            "input": {"prompt": PROMPT, "answerType": answer_type, "options": options},
        }

    async def is_idle(self, timeout: float) -> None:
        end = asyncio.get_running_loop().time() + timeout
        while await self.probe.unfinished():
            assert asyncio.get_running_loop().time() < end, "the engine still works on a request"
            await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
async def rig() -> AsyncIterator[Rig]:
    with tempfile.TemporaryDirectory() as folder:
        probe = Probe(Path(folder) / "probe")
        async with platform() as served:
            environment = worker_environment(
                **served.environment(),
                CONCURRENCY_MODIFIER="64",
                PROBE=str(probe.path),
                SHUTDOWN_TIMEOUT=AMPLE,
            )
            process, output = start(PROBED_WORKER, environment)
            try:
                await soon(lambda: served.polls or process.poll() is not None, START, "job-take")
                assert process.poll() is None, output.text()
                yield Rig(served, process, output, probe)
            finally:
                await asyncio.to_thread(stop, process)


async def test_chunks_that_pile_up_during_a_delivery_are_merged(rig: Rig) -> None:
    greedy = {"max_tokens": 64, "ignore_eos": True, "temperature": 0}
    rig.platform.deliver.clear()
    job = rig.job(**greedy)
    await rig.platform.give(job)
    await soon(lambda: rig.platform.chunks.get(job["id"]), 60, "the first chunk")
    await rig.is_idle(60)
    rig.platform.deliver.set()
    end = await rig.platform.end_of(job["id"])

    first, rest = rig.platform.chunks[job["id"]]
    assert 0 < len(first["text"]) < len(rest["text"]), "one token first, then all the rest"
    assert rest["finish_reason"] == "length"
    assert rest["usage"]["completion_tokens"] == 64
    assert end["output"] == [first, rest]

    normal = await rig.platform.answer(rig.job("normal", **greedy))
    assert normal["output"][0]["text"] == first["text"] + rest["text"]


async def test_a_job_that_is_cancelled_while_generating_leaves_the_engine(rig: Rig) -> None:
    job = rig.job(**LONG)
    await rig.platform.give(job)
    await soon(lambda: rig.platform.chunks.get(job["id"]), 60, "the first chunk")
    assert await rig.probe.unfinished() == 1
    await rig.platform.stops.put([job["id"]])
    await rig.is_idle(1)
    assert job["id"] not in rig.platform.done
    await soon(lambda: rig.output.find(f"{job['id']} | ⊘ cancelled"), 10, "the log line")


async def test_a_job_that_is_cancelled_during_a_delivery_leaves_the_engine(rig: Rig) -> None:
    rig.platform.deliver.clear()
    job = rig.job(**LONG)
    await rig.platform.give(job)
    await soon(lambda: rig.platform.chunks.get(job["id"]), 60, "the first chunk")
    assert await rig.probe.unfinished() == 1
    await rig.platform.stops.put([job["id"]])
    await rig.is_idle(1)
    rig.platform.deliver.set()
    await soon(lambda: rig.output.find(f"{job['id']} | ⊘ cancelled"), 10, "the log line")
    assert len(rig.platform.chunks[job["id"]]) == 1


async def test_a_job_handed_out_twice_runs_once(rig: Rig) -> None:
    job = rig.job(**LONG)
    await rig.platform.give(job)
    await soon(lambda: rig.platform.chunks.get(job["id"]), 60, "the first chunk")
    await rig.platform.give(job)
    await rig.platform.end_of(job["id"])
    await rig.platform.answer(rig.job(max_tokens=2))
    assert len(rig.platform.done[job["id"]]) == 1
    assert rig.output.find("handed out again")


async def test_a_job_handed_out_after_its_end_runs_no_second_time(rig: Rig) -> None:
    job = rig.job(max_tokens=2)
    await rig.platform.answer(job)
    await rig.platform.give(job)
    await soon(lambda: rig.output.find("handed out again after its end"), 10, "the log line")
    assert len(rig.platform.done[job["id"]]) == 1
    failed = {"id": "to-be-retried", "input": {}}
    await rig.platform.answer(failed)
    await rig.platform.give({**failed, "input": {"prompt": PROMPT, "options": {"max_tokens": 2}}})
    await soon(lambda: len(rig.platform.done["to-be-retried"]) == 2, 30, "the second answer")
    assert "output" in rig.platform.done["to-be-retried"][1]


async def test_a_malformed_offer_harms_no_other_job(rig: Rig) -> None:
    running = rig.job(max_tokens=200, ignore_eos=True)
    await rig.platform.give(running)
    await rig.platform.give({"id": "no-input"}, {"input": {"prompt": "no id"}}, {}, 3, "x")
    fine = rig.job(max_tokens=2)
    assert "output" in await rig.platform.answer(fine)
    assert "output" in await rig.platform.end_of(running["id"])
    assert "input" in (await rig.platform.end_of("no-input"))["error"]


async def test_a_freed_slot_is_filled_while_others_run(rig: Rig) -> None:
    long = [rig.job(**SECONDS_LONG) for _ in range(63)]
    await rig.platform.give(*long)
    short = [rig.job(max_tokens=2) for _ in range(5)]
    for job in short:
        await rig.platform.answer(job)
    assert any(job["id"] not in rig.platform.done for job in long)
    for job in long:
        assert "output" in await rig.platform.end_of(job["id"])
    assert max(rig.platform.batch_sizes) == 64


async def test_memory_stays_flat(rig: Rig) -> None:
    async def run(jobs: int) -> int:
        for _ in range(jobs // 50):
            batch = [rig.job(max_tokens=8) for _ in range(50)]
            await rig.platform.give(*batch)
            for job in batch:
                await rig.platform.end_of(job["id"])
        return psutil.Process(rig.process.pid).memory_info().rss

    after_50 = await run(50)
    after_500 = await run(450)
    assert after_500 <= after_50 * 1.05


async def test_pings_tell_the_platform_that_the_worker_lives(rig: Rig) -> None:
    before = rig.platform.pings
    await soon(lambda: rig.platform.pings > before, 30, "a ping")


async def test_sigterm_lets_running_jobs_finish_and_takes_no_more(rig: Rig) -> None:
    family = psutil.Process(rig.process.pid).children(recursive=True)
    running = [rig.job(**SECONDS_LONG) for _ in range(3)]
    await rig.platform.give(*running)
    for job in running:
        await soon(lambda job=job: rig.platform.chunks.get(job["id"]), 60, "the first chunk")
    on_its_way = rig.job(max_tokens=2)
    rig.process.send_signal(signal.SIGTERM)
    await rig.platform.give(on_its_way)
    await soon(lambda: rig.platform.polls == 0, 5, "the end of the long poll")
    assert "output" in await rig.platform.end_of(on_its_way["id"])
    for job in running:
        end = await rig.platform.end_of(job["id"])
        assert end["output"][-1]["finish_reason"] == "length"
    assert await asyncio.to_thread(rig.process.wait, 20) == 0
    balance = rig.output.find("jobs: ")
    assert balance
    assert balance.endswith("2 cancelled, 0 lost")
    await soon(lambda: not left(family), 10, "no child is left")
