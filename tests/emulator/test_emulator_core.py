"""The queue and its workers, without HTTP."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from emulator.endpoint import Endpoint
from emulator.jobs import (
    FINAL,
    Conflict,
    Job,
    Policy,
    QueueFull,
    Status,
    UnknownJob,
    UnknownWorker,
)
from emulator.store import Limits


async def take(endpoint: Endpoint, worker: str, limit: int = 1) -> list[Job]:
    return await endpoint.take(worker, limit, 0.01)


async def started(endpoint: Endpoint, worker: str = "w", **policy: float) -> Job:
    job = endpoint.submit({}, policy=Policy(**policy))
    assert await take(endpoint, worker) == [job]
    return job


@pytest_asyncio.fixture
async def small() -> AsyncIterator[Endpoint]:
    """Holds 2 jobs in queue per worker, 100 bytes, and results for no time at all."""
    endpoint = Endpoint(Limits(memory=100, queued_jobs_per_worker=2, worker_silence=0.01))
    yield endpoint
    endpoint.close()


async def test_life_of_a_job(endpoint: Endpoint) -> None:
    job = endpoint.submit({"a": 1}, size=7)
    assert job.as_dict() == {"id": job.id, "status": "IN_QUEUE"}
    assert await take(endpoint, "w") == [job]
    assert job.as_dict().keys() == {"id", "status", "delayTime", "workerId"}
    assert endpoint.add_chunk("w", job.id, b'{"output":1}')
    assert job.size == 7 + len(b'{"output":1}')
    assert endpoint.take_chunks(job) == [b'{"output":1}']
    assert endpoint.take_chunks(job) == []
    assert job.size == 7
    assert endpoint.finish("w", job.id, output=[1], error=None, size=3)
    body = job.as_dict()
    assert (body["status"], body["output"], body["workerId"]) == ("COMPLETED", [1], "w")
    assert body["executionTime"] >= 0
    assert job.size == 3, "the input is not kept once it cannot be retried"


async def test_error_makes_it_failed(endpoint: Endpoint) -> None:
    job = await started(endpoint)
    endpoint.finish("w", job.id, error="no", size=0)
    assert (job.status, job.as_dict()["error"]) == (Status.FAILED, "no")


async def test_jobs_leave_in_the_order_they_came(endpoint: Endpoint) -> None:
    jobs = [endpoint.submit(number) for number in range(3)]
    assert [*await take(endpoint, "w"), *await take(endpoint, "w", 5)] == jobs


async def test_waiting_worker_with_the_fewest_jobs_is_next(endpoint: Endpoint) -> None:
    await started(endpoint, "busy")
    takes = [asyncio.create_task(endpoint.take(name, 1, 5)) for name in ("busy", "free")]
    await asyncio.sleep(0)
    job = endpoint.submit({})
    assert await takes[1] == [job]
    assert not takes[0].done()


async def test_given_back_jobs_are_spread_over_waiting_batches(endpoint: Endpoint) -> None:
    jobs = [endpoint.submit({}) for _ in range(4)]
    assert await take(endpoint, "gone", 8) == jobs
    takes = [asyncio.create_task(endpoint.take(name, 3, 5)) for name in ("a", "b")]
    await asyncio.sleep(0)
    endpoint.give_back(jobs)
    assert [len(await one) for one in takes] == [2, 2]


async def test_batch_size_is_respected(endpoint: Endpoint) -> None:
    for _ in range(5):
        endpoint.submit({})
    assert len(await take(endpoint, "w", 3)) == 3


async def test_cancelled_take_leaves_the_job_in_the_queue(endpoint: Endpoint) -> None:
    taking = asyncio.create_task(endpoint.take("w", 1, 5))
    await asyncio.sleep(0)
    job = endpoint.submit({})
    assert job.status is Status.IN_PROGRESS
    taking.cancel()
    await asyncio.gather(taking, return_exceptions=True)
    assert job.status is Status.IN_QUEUE
    assert await take(endpoint, "other") == [job]


async def test_draining_worker_gets_nothing(endpoint: Endpoint) -> None:
    taking = asyncio.create_task(endpoint.take("w", 1, 5))
    await asyncio.sleep(0)
    endpoint.stop_pod("w")
    job = endpoint.submit({})
    assert job.status is Status.IN_QUEUE
    endpoint.end_polls("w")
    assert await taking == []


async def test_cancel_while_queued(endpoint: Endpoint) -> None:
    job = endpoint.submit({})
    endpoint.cancel(job)
    assert job.status is Status.CANCELLED
    assert await take(endpoint, "w") == []


async def test_cancel_in_progress_asks_the_worker_to_stop(endpoint: Endpoint) -> None:
    job = await started(endpoint)
    waiting = asyncio.create_task(endpoint.worker("w").wait_for_stop_requests(5))
    await asyncio.sleep(0)
    endpoint.cancel(job)
    await waiting
    assert endpoint.worker("w").take_stop_requests() == [job.id]
    assert endpoint.worker("w").take_stop_requests() == []
    assert not endpoint.finish("w", job.id, output=1, error=None, size=1)
    assert not endpoint.report_progress("w", job.id, 1)
    assert job.as_dict().keys() == {"id", "status", "delayTime", "workerId", "executionTime"}


async def test_worker_that_goes_on_with_a_cancelled_job_is_asked_again(endpoint: Endpoint) -> None:
    job = await started(endpoint)
    endpoint.cancel(job)
    for sign_of_life in (
        lambda: endpoint.add_chunk("w", job.id, b"{}"),
        lambda: endpoint.ping("w", [job.id, "unknown"]),
    ):
        assert endpoint.worker("w").take_stop_requests() == [job.id]
        sign_of_life()
    assert endpoint.worker("w").take_stop_requests() == [job.id]


async def test_execution_timeout(endpoint: Endpoint) -> None:
    job = await started(endpoint, execution_timeout=0.02)
    assert await endpoint.wait(job, lambda job: job.final, 5)
    assert job.status is Status.TIMED_OUT
    assert job.error == "job ran longer than its executionTimeout of 0.02 s"
    assert endpoint.worker("w").take_stop_requests() == [job.id]


async def test_ttl_ends_queued_and_running_jobs(endpoint: Endpoint) -> None:
    running = await started(endpoint, ttl=0.02)
    queued = endpoint.submit({}, policy=Policy(ttl=0.02))
    for job in (running, queued):
        assert await endpoint.wait(job, lambda job: job.final, 5)
        assert job.status is Status.TIMED_OUT
        assert job.error == "job expired: its ttl of 0.02 s passed"


async def test_results_of_others_are_refused(endpoint: Endpoint) -> None:
    job = await started(endpoint)
    await take(endpoint, "other")
    with pytest.raises(Conflict, match="is not with worker other"):
        endpoint.finish("other", job.id, output=1, error=None, size=1)
    with pytest.raises(UnknownJob, match="job none does not exist or has expired"):
        endpoint.finish("w", "none", output=1, error=None, size=1)


async def test_lost_worker_fails_its_jobs_and_cannot_return(endpoint: Endpoint) -> None:
    endpoint.register("w", managed=True)
    job = await started(endpoint)
    endpoint.lose("w", "exited with code 3")
    assert job.error == "worker w exited with code 3 while this job was in progress"
    for late in (
        lambda: endpoint.finish("w", job.id, output=1, error=None, size=1),
        lambda: endpoint.worker("w"),
    ):
        with pytest.raises(UnknownWorker, match="worker w has been replaced"):
            late()


async def test_retry(endpoint: Endpoint) -> None:
    job = await started(endpoint, execution_timeout=0.01)
    endpoint.add_chunk("w", job.id, b"{}")
    with pytest.raises(Conflict, match="only FAILED and TIMED_OUT jobs can be retried"):
        endpoint.retry(job)
    await endpoint.wait(job, lambda job: job.final, 5)
    endpoint.retry(job)
    assert job.as_dict() == {"id": job.id, "status": "IN_QUEUE"}
    assert endpoint.take_chunks(job) == []
    assert await take(endpoint, "w") == [job]
    assert endpoint.worker("w").take_stop_requests() == [], (
        "the stop was meant for the first attempt"
    )
    assert endpoint.health()["jobs"]["retried"] == 1


async def test_purge_spares_jobs_in_progress(endpoint: Endpoint) -> None:
    running = await started(endpoint)
    queued = [endpoint.submit({}) for _ in range(2)]
    assert endpoint.purge() == 2
    assert running.status is Status.IN_PROGRESS
    assert {job.status for job in queued} == {Status.CANCELLED}


async def test_health_counts(endpoint: Endpoint) -> None:
    endpoint.register("starting", managed=True)
    endpoint.register("ill", managed=True)
    endpoint.report_unhealthy("ill", "no disk")
    await take(endpoint, "idle")
    done = await started(endpoint)
    endpoint.finish("w", done.id, output=1, error=None, size=1)
    await started(endpoint)
    taking = asyncio.create_task(endpoint.take("w", 1, 5))
    await asyncio.sleep(0)
    endpoint.end_polls("idle")
    endpoint.lose("idle", "left")
    taking.cancel()
    await asyncio.gather(taking, return_exceptions=True)
    endpoint.submit({})
    assert endpoint.health() == {
        "jobs": {"completed": 1, "failed": 0, "inProgress": 1, "inQueue": 1, "retried": 0},
        "workers": {
            "idle": 0,
            "initializing": 1,
            "ready": 1,
            "running": 1,
            "throttled": 0,
            "unhealthy": 1,
        },
    }


async def test_results_are_kept_for_their_time_only() -> None:
    endpoint = Endpoint(Limits(retention=1000, sync_retention=0.01))
    kept, dropped = endpoint.submit({}), endpoint.submit({}, sync=True)
    endpoint.purge()
    async with asyncio.timeout(5):
        while dropped.id in endpoint.store.jobs:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert endpoint.store.job(kept.id) is kept
    endpoint.close()


async def test_memory_is_bounded(small: Endpoint) -> None:
    first = small.submit({}, size=60)
    with pytest.raises(QueueFull, match="jobs hold 60 bytes and this one has 60"):
        small.submit({}, size=60)
    await take(small, "w")
    small.finish("w", first.id, error="failed, so its input is kept", size=1)
    small.submit({}, size=60)
    with pytest.raises(UnknownJob):
        small.store.job(first.id)


async def test_queue_is_bounded(small: Endpoint) -> None:
    small.submit({})
    small.submit({})
    with pytest.raises(QueueFull, match="2 jobs are queued; this endpoint holds 2"):
        small.submit({})


async def test_silent_worker_from_outside_is_lost(small: Endpoint) -> None:
    job = await started(small, "outside")
    assert await small.wait(job, lambda job: job.final, 5)
    assert job.error == "worker outside was silent for 0.01 s while this job was in progress"
    assert await take(small, "outside") == [], "it may come back"


async def test_close_ends_every_wait(endpoint: Endpoint) -> None:
    job = await started(endpoint)
    waits: list[Coroutine[Any, Any, Any]] = [
        endpoint.take("w", 1, 1000),
        endpoint.worker("w").wait_for_stop_requests(1000),
        endpoint.wait(job, lambda job: job.final, 1000),
    ]
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.sleep(0)
    endpoint.close()
    async with asyncio.timeout(5):
        assert await asyncio.gather(*tasks) == [[], None, False]


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order, every job is in one place and all counts agree."""

    workers = st.sampled_from(["a", "b", "c"])
    number = st.integers(0, 1000)

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.endpoint = Endpoint(Limits(memory=500))
        self.finished: list[str] = []
        self.endpoint.on_finish = lambda job: self.finished.append(job.id)
        self.ends = 0

    def teardown(self) -> None:
        self.endpoint.close()
        self.loop.close()

    def do(self, action: Any) -> Any:
        async def inside() -> Any:
            result = action()
            return await result if asyncio.iscoroutine(result) else result

        return self.loop.run_until_complete(inside())

    def pick(self, number: int, *statuses: Status) -> Job | None:
        jobs = [job for job in self.endpoint.store.jobs.values() if job.status in statuses]
        return jobs[number % len(jobs)] if jobs else None

    @rule(size=st.integers(0, 120))
    def submit(self, size: int) -> None:
        try:
            self.do(lambda: self.endpoint.submit({}, size=size))
        except QueueFull:
            assert self.endpoint.store.size + size > 500

    @rule(worker=workers, limit=st.integers(1, 4))
    def take(self, worker: str, limit: int) -> None:
        before = len(self.endpoint.queue.jobs)
        jobs = self.do(lambda: self.endpoint.take(worker, limit, 0))
        assert len(jobs) == min(before, limit)

    @rule(number=number, size=st.integers(0, 50), fail=st.booleans())
    def finish(self, number: int, size: int, fail: bool) -> None:
        if job := self.pick(number, Status.IN_PROGRESS):
            error = "failed" if fail else None
            worker = str(job.worker_id)
            self.do(lambda: self.endpoint.finish(worker, job.id, error=error, size=size))
            self.ends += 1

    @rule(number=number)
    def stream(self, number: int) -> None:
        if job := self.pick(number, Status.IN_PROGRESS):
            self.endpoint.add_chunk(str(job.worker_id), job.id, b"x" * (number % 30))

    @rule(number=number)
    def fetch(self, number: int) -> None:
        if job := self.pick(number, *Status):
            self.endpoint.take_chunks(job)

    @rule(number=number)
    def cancel(self, number: int) -> None:
        if job := self.pick(number, Status.IN_QUEUE, Status.IN_PROGRESS):
            self.do(lambda: self.endpoint.cancel(job))
            self.ends += 1

    @rule(number=number)
    def retry(self, number: int) -> None:
        if job := self.pick(number, Status.FAILED, Status.TIMED_OUT):
            self.do(lambda: self.endpoint.retry(job))

    @rule(number=number)
    def give_back(self, number: int) -> None:
        if job := self.pick(number, Status.IN_PROGRESS):
            self.do(lambda: self.endpoint.give_back([job]))

    @precondition(lambda self: self.endpoint.workers)
    @rule(number=number)
    def lose(self, number: int) -> None:
        workers = list(self.endpoint.workers.values())
        worker = workers[number % len(workers)]
        self.ends += len(worker.in_progress)
        self.do(lambda: self.endpoint.lose(worker.id, "left"))

    @invariant()
    def every_job_is_in_one_place(self) -> None:
        endpoint = self.endpoint
        places = {job.id: [Status.IN_QUEUE] for job in endpoint.queue.jobs.values()}
        for worker in endpoint.workers.values():
            for job_id in worker.in_progress:
                places.setdefault(job_id, []).append(Status.IN_PROGRESS)
        for job_id, job in endpoint.store.finished.items():
            places.setdefault(job_id, []).append(job.status)
            assert job.status in FINAL
        assert places == {job.id: [job.status] for job in endpoint.store.jobs.values()}
        assert endpoint.store.timers.keys() == endpoint.store.jobs.keys()
        assert endpoint.queue.takers == []

    @invariant()
    def memory_is_what_the_jobs_hold(self) -> None:
        assert self.endpoint.store.size == sum(
            job.size for job in self.endpoint.store.jobs.values()
        )

    @invariant()
    def each_end_is_told_once(self) -> None:
        assert len(self.finished) == self.ends


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyOrder = AnyOrder.TestCase
