"""The endpoint: its queue, its workers, and who gets which job. No HTTP in here."""

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from emulator.jobs import Conflict, Job, Policy, QueueFull, Status, UnknownJob, UnknownWorker


@dataclass(frozen=True, slots=True)
class Limits:
    """What the endpoint holds and for how long: seconds, bytes, counts."""

    retention: float = 1800.0
    sync_retention: float = 60.0
    memory: int = 1024**3
    queued_jobs_per_worker: int = 500
    worker_silence: float = 60.0


@dataclass(slots=True, eq=False)
class Worker:
    """What the endpoint knows of one worker. `seen` is `time.monotonic()` of its last call.

    `draining`: it gets no further job. `stopping`: moreover its long polls are cut short.
    """

    id: str
    managed: bool = False
    ready: bool = False
    draining: bool = False
    stopping: bool = False
    unhealthy: str | None = None
    in_progress: dict[str, Job] = field(default_factory=dict)
    stop_requests: list[str] = field(default_factory=list)
    stop_waiters: list[asyncio.Future[None]] = field(default_factory=list)
    open_polls: int = 0
    pings: int = 0
    pinged_jobs: list[str] = field(default_factory=list)
    seen: float = field(default_factory=time.monotonic)

    @property
    def state(self) -> str:
        if self.unhealthy is not None:
            return "unhealthy"
        if self.draining:
            return "stopping"
        if not self.ready:
            return "initializing"
        return "running" if self.in_progress else "idle"

    def wake_stop_polls(self) -> None:
        for waiter in self.stop_waiters:
            if not waiter.done():
                waiter.set_result(None)


@dataclass(slots=True, eq=False)
class Taker:
    """One open job-take: a worker that waits for up to `limit` jobs."""

    worker: Worker
    limit: int
    jobs: asyncio.Future[list[Job]]


def _ignore(_: Any) -> None:
    """The callback of an endpoint that nobody watches."""


class Endpoint:
    """A queue of jobs and the workers that take them. Must be used inside one event loop.

    `on_finish(job)` is called once per final state, `on_ready(worker_id)` at a worker's first
    job-take, `on_stop_pod(worker_id)` when a worker asks to be replaced or reports unhealthy.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.jobs: dict[str, Job] = {}
        self.workers: dict[str, Worker] = {}
        self.closing = False
        self.on_finish: Callable[[Job], None] = _ignore
        self.on_ready: Callable[[str], None] = _ignore
        self.on_stop_pod: Callable[[str], None] = _ignore
        self._queue: dict[str, Job] = {}
        self._finished: dict[str, Job] = {}
        self._takers: list[Taker] = []
        self._retired: set[str] = set()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._memory = 0
        self._completed = self._failed = self._retried = 0

    # ---- clients -------------------------------------------------------------------------

    def submit(
        self,
        job_input: Any,
        *,
        policy: Policy | None = None,
        sync: bool = False,
        webhook: str | None = None,
        s3_config: Any = None,
        size: int = 0,
    ) -> Job:
        """Queue a job of `size` bytes. Raises QueueFull."""
        allowed = self.limits.queued_jobs_per_worker * max(1, len(self.workers))
        if len(self._queue) >= allowed:
            raise QueueFull(f"{len(self._queue)} jobs are queued; this endpoint holds {allowed}")
        self._make_room(size)
        job = Job(
            id=f"{'sync-' if sync else ''}{uuid.uuid4()}-u1",
            input=job_input,
            policy=policy or Policy(),
            sync=sync,
            webhook=webhook,
            s3_config=s3_config,
            input_size=size,
        )
        self.jobs[job.id] = self._queue[job.id] = job
        self._memory += job.size
        self._set_timer(job)
        self._dispatch()
        return job

    def job(self, job_id: str) -> Job:
        """The job of this id. Raises UnknownJob."""
        try:
            return self.jobs[job_id]
        except KeyError:
            raise UnknownJob(f"job {job_id} does not exist or has expired") from None

    async def wait(self, job: Job, condition: Callable[[Job], bool], seconds: float) -> bool:
        """Wait up to `seconds` until the condition holds; returns whether it does."""
        deadline = time.monotonic() + seconds
        while not condition(job) and not self.closing:
            if (left := deadline - time.monotonic()) <= 0:
                break
            await job.changed(left)
        return condition(job)

    def take_chunks(self, job: Job) -> list[bytes]:
        """The job's chunks that no client has fetched yet; forgets them."""
        before = job.size
        chunks = job.take_chunks()
        self._memory += job.size - before
        return chunks

    def cancel(self, job: Job) -> None:
        """Cancel a job that is not final yet, and have its worker stop it."""
        if not job.final:
            self._finish(job, Status.CANCELLED, stop=True)

    def retry(self, job: Job) -> None:
        """Queue a FAILED or TIMED_OUT job again, under its id. Raises Conflict."""
        before = job.size
        job.requeue()
        self._memory += job.size - before
        self._finished.pop(job.id, None)
        self._queue[job.id] = job
        self._retried += 1
        self._set_timer(job)
        self._dispatch()

    def purge(self) -> int:
        """Cancel every queued job; returns how many there were."""
        queued = list(self._queue.values())
        for job in queued:
            self._finish(job, Status.CANCELLED)
        return len(queued)

    def health(self) -> dict[str, dict[str, int]]:
        """The body of /health."""
        states = [worker.state for worker in self.workers.values()]
        idle, running = states.count("idle"), states.count("running")
        return {
            "jobs": {
                "completed": self._completed,
                "failed": self._failed,
                "inProgress": sum(len(w.in_progress) for w in self.workers.values()),
                "inQueue": len(self._queue),
                "retried": self._retried,
            },
            "workers": {
                "idle": idle,
                "initializing": states.count("initializing"),
                "ready": idle + running,
                "running": running,
                "throttled": 0,
                "unhealthy": states.count("unhealthy"),
            },
        }

    # ---- workers -------------------------------------------------------------------------

    def register(self, worker_id: str, *, managed: bool) -> Worker:
        """Make a worker known. `managed`: someone calls `lose` when it is gone."""
        worker = self.workers[worker_id] = Worker(worker_id, managed=managed)
        if not managed:
            self._watch_silence(worker)
        return worker

    def worker(self, worker_id: str) -> Worker:
        """The worker of this id, made known if it is new. Raises UnknownWorker if replaced."""
        worker = self.workers.get(worker_id)
        if worker is None:
            if worker_id in self._retired:
                raise UnknownWorker(f"worker {worker_id} has been replaced")
            worker = self.register(worker_id, managed=False)
        worker.seen = time.monotonic()
        return worker

    async def take(self, worker_id: str, limit: int, seconds: float) -> list[Job]:
        """Up to `limit` jobs for this worker, now IN_PROGRESS; [] after `seconds`.

        If the call is cancelled while jobs were being handed over, they return to the queue.
        """
        worker = self.worker(worker_id)
        if not worker.ready:
            worker.ready = True
            self.on_ready(worker_id)
        taker = Taker(worker, limit, asyncio.get_running_loop().create_future())
        self._takers.append(taker)
        self._dispatch()
        worker.open_polls += 1
        try:
            await asyncio.wait((taker.jobs,), timeout=seconds)
        except asyncio.CancelledError:
            if taker.jobs.done():
                self.give_back(taker.jobs.result())
            raise
        finally:
            worker.open_polls -= 1
            if taker in self._takers:
                self._takers.remove(taker)
        return taker.jobs.result() if taker.jobs.done() else []

    def give_back(self, jobs: Iterable[Job]) -> None:
        """Return jobs that never reached their worker to the front of the queue."""
        returned = {job.id: job for job in jobs if job.status is Status.IN_PROGRESS}
        for job in returned.values():
            self._leave_worker(job)
            job.give_back()
            self._set_timer(job)
        self._queue = returned | self._queue
        self._dispatch()

    async def wait_for_stop_requests(self, worker_id: str, seconds: float) -> None:
        """Wait up to `seconds` until this worker shall stop a job."""
        worker = self.worker(worker_id)
        if worker.stop_requests:
            return
        waiter = asyncio.get_running_loop().create_future()
        worker.stop_waiters.append(waiter)
        worker.open_polls += 1
        try:
            await asyncio.wait((waiter,), timeout=seconds)
        finally:
            worker.stop_waiters.remove(waiter)
            worker.open_polls -= 1

    def take_stop_requests(self, worker_id: str) -> list[str]:
        """Ids of the jobs that this worker shall stop; each is handed out once."""
        worker = self.worker(worker_id)
        requests, worker.stop_requests = worker.stop_requests, []
        return requests

    def ask_to_stop(self, worker_id: str, job_id: str) -> None:
        """Have this worker stop a job; asked again while it still shows that it runs.

        Once is not enough: the SDK drops a stop for a job that it has taken but not started.
        """
        worker = self.workers.get(worker_id)
        if worker and job_id not in worker.stop_requests:
            worker.stop_requests.append(job_id)
            worker.wake_stop_polls()

    def add_chunk(self, worker_id: str, job_id: str, chunk: bytes) -> bool:
        """Keep one streamed chunk; False if the job is final. Raises UnknownJob, Conflict."""
        job = self._job_of(worker_id, job_id)
        if job.final:
            self.ask_to_stop(worker_id, job_id)
            return False
        job.add_chunk(chunk)
        self._memory += len(chunk)
        return True

    def report_progress(self, worker_id: str, job_id: str, output: Any) -> bool:
        """Show this output in /status; False if the job is final. Raises UnknownJob, Conflict."""
        job = self._job_of(worker_id, job_id)
        if job.final:
            return False
        job.report_progress(output)
        return True

    def finish(
        self, worker_id: str, job_id: str, *, output: Any = None, error: str | None, size: int
    ) -> bool:
        """The job's result; False if it was final before. Raises UnknownJob, Conflict."""
        job = self._job_of(worker_id, job_id)
        if job.final:
            return False
        status = Status.COMPLETED if error is None else Status.FAILED
        self._finish(job, status, output=output, error=error, size=size)
        return True

    def ping(self, worker_id: str, job_ids: list[str]) -> None:
        """A sign of life, with the jobs that the worker says it has."""
        worker = self.worker(worker_id)
        worker.pings += 1
        worker.pinged_jobs = job_ids
        for job_id in job_ids:
            job = self.jobs.get(job_id)
            if job and job.final and job.worker_id == worker_id:
                self.ask_to_stop(worker_id, job_id)

    def report_unhealthy(self, worker_id: str, reason: str) -> None:
        """A worker's own fitness check failed: it gets no job and is replaced."""
        self.worker(worker_id).unhealthy = reason
        self.drain(worker_id)
        self.on_stop_pod(worker_id)

    def stop_pod(self, worker_id: str) -> None:
        """The worker asks to be replaced: it gets no further job."""
        self.drain(worker_id)
        self.on_stop_pod(worker_id)

    def drain(self, worker_id: str) -> None:
        """Give this worker no further job."""
        if worker := self.workers.get(worker_id):
            worker.draining = True

    def end_polls(self, worker_id: str) -> None:
        """Answer this worker's long polls now, so that it can exit at once."""
        if worker := self.workers.get(worker_id):
            worker.draining = worker.stopping = True
            self.answer_polls(worker_id)
            worker.wake_stop_polls()

    def answer_polls(self, worker_id: str) -> None:
        """Answer this worker's open job-takes now, with no job."""
        for taker in [t for t in self._takers if t.worker.id == worker_id]:
            self._takers.remove(taker)
            taker.jobs.set_result([])

    def lose(self, worker_id: str, reason: str) -> None:
        """The worker is gone: its jobs end FAILED, its id is never used again."""
        self.end_polls(worker_id)
        if worker := self.workers.pop(worker_id, None):
            if worker.managed:
                self._retired.add(worker_id)
            for job in list(worker.in_progress.values()):
                error = f"worker {worker_id} {reason} while this job was in progress"
                self._finish(job, Status.FAILED, error=error)

    def jump_clock(self, seconds: float) -> None:
        """Let the clock by which jobs are timed jump; negative is backwards."""
        for job in self.jobs.values():
            job.jump_clock(seconds)
            self._set_timer(job)

    def close(self) -> None:
        """End every wait now and hand out no further job."""
        self.closing = True
        for worker_id in self.workers:
            self.end_polls(worker_id)
        for job in self.jobs.values():
            job.wake()
        for timer in self._timers.values():
            timer.cancel()

    # ---- inside --------------------------------------------------------------------------

    def _dispatch(self) -> None:
        """Hand queued jobs out, each to the waiting worker with the fewest in progress."""
        taken: dict[Taker, list[Job]] = {}
        while self._queue and not self.closing:
            waiting = [
                taker
                for taker in self._takers
                if not taker.worker.draining and len(taken.get(taker, ())) < taker.limit
            ]
            if not waiting:
                break
            taker = min(waiting, key=lambda taker: len(taker.worker.in_progress))
            job = self._queue.pop(next(iter(self._queue)))
            worker = taker.worker
            if job.id in worker.stop_requests:
                worker.stop_requests.remove(job.id)
            worker.in_progress[job.id] = job
            job.start(worker.id)
            self._set_timer(job)
            taken.setdefault(taker, []).append(job)
        for taker, jobs in taken.items():
            self._takers.remove(taker)
            taker.jobs.set_result(jobs)

    def _job_of(self, worker_id: str, job_id: str) -> Job:
        """The job, if this worker is the one that has it."""
        if worker := self.workers.get(worker_id):
            worker.seen = time.monotonic()
        job = self.job(job_id)
        if worker_id in self._retired:
            raise UnknownWorker(f"worker {worker_id} has been replaced")
        if job.worker_id != worker_id:
            raise Conflict(f"job {job_id} is not with worker {worker_id}")
        return job

    def _finish(
        self,
        job: Job,
        status: Status,
        *,
        output: Any = None,
        error: str | None = None,
        size: int = 0,
        stop: bool = False,
    ) -> None:
        self._leave_worker(job)
        if stop:
            self.ask_to_stop(job.worker_id or "", job.id)
        self._queue.pop(job.id, None)
        before = job.size
        job.finish(status, output=output, error=error, size=size)
        self._memory += job.size - before
        self._finished[job.id] = job
        self._completed += status is Status.COMPLETED
        self._failed += status in (Status.FAILED, Status.TIMED_OUT)
        self._set_timer(job)
        self.on_finish(job)

    def _leave_worker(self, job: Job) -> None:
        if worker := self.workers.get(job.worker_id or ""):
            worker.in_progress.pop(job.id, None)

    def _set_timer(self, job: Job) -> None:
        """Set the one timer that a job has at a time.

        Queued: its ttl. In progress: its ttl or execution timeout. Final: its retention.
        """
        if timer := self._timers.pop(job.id, None):
            timer.cancel()
        if self.closing:
            return
        if job.finished_at is not None:
            kept = self.limits.sync_retention if job.sync else self.limits.retention
            deadline, action = job.finished_at + kept, self._forget
        else:
            deadline, action = job.queued_at + job.policy.ttl, self._time_out
            if job.started_at is not None:
                deadline = min(deadline, job.started_at + job.policy.execution_timeout)
        delay = max(0.0, deadline - time.monotonic())
        self._timers[job.id] = asyncio.get_running_loop().call_later(delay, action, job)

    def _time_out(self, job: Job) -> None:
        error = f"job expired: its ttl of {job.policy.ttl:g} s passed"
        if job.started_at is not None:
            limit = job.policy.execution_timeout
            if job.started_at + limit < job.queued_at + job.policy.ttl:
                error = f"job ran longer than its executionTimeout of {limit:g} s"
        self._finish(job, Status.TIMED_OUT, error=error, stop=True)

    def _forget(self, job: Job) -> None:
        del self.jobs[job.id]
        self._finished.pop(job.id, None)
        self._memory -= job.size
        if timer := self._timers.pop(job.id, None):
            timer.cancel()

    def _make_room(self, size: int) -> None:
        """Forget the oldest finished jobs until `size` more bytes fit. Raises QueueFull."""
        while self._memory + size > self.limits.memory and self._finished:
            self._forget(next(iter(self._finished.values())))
        if self._memory + size > self.limits.memory:
            raise QueueFull(
                f"jobs hold {self._memory} bytes and this one has {size}; "
                f"this endpoint holds {self.limits.memory}"
            )

    def _watch_silence(self, worker: Worker) -> None:
        """Lose an unmanaged worker once it has no open poll and made no call for a while."""
        if self.workers.get(worker.id) is not worker or self.closing:
            return
        limit = self.limits.worker_silence
        quiet = 0.0 if worker.open_polls else time.monotonic() - worker.seen
        if quiet >= limit:
            self.lose(worker.id, f"was silent for {limit:g} s")
        else:
            asyncio.get_running_loop().call_later(limit - quiet, self._watch_silence, worker)
