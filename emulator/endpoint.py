"""The endpoint: what clients and workers may do with its jobs. No HTTP in here."""

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from emulator.jobs import Conflict, Job, Policy, QueueFull, Status, UnknownWorker
from emulator.queue import Queue
from emulator.store import Limits, Store
from emulator.worker import Worker


def _ignore(_: Any) -> None:
    """The callback of an endpoint that nobody watches."""


class Endpoint:
    """A queue of jobs and the workers that take them. Must be used inside one event loop.

    `on_finish(job)` is called once per final state, `on_ready(worker_id)` at a worker's first
    job-take, `on_stop_pod(worker_id)` when a worker asks to be replaced or reports unhealthy.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.store = Store(self.limits, self._time_out)
        self.queue = Queue(on_start=self.store.update)
        self.workers: dict[str, Worker] = {}
        self.closing = False
        self.on_finish: Callable[[Job], None] = _ignore
        self.on_ready: Callable[[str], None] = _ignore
        self.on_stop_pod: Callable[[str], None] = _ignore
        self._retired: set[str] = set()
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
        if (queued := len(self.queue.jobs)) >= allowed:
            raise QueueFull(f"{queued} jobs are queued; this endpoint holds {allowed}")
        job = Job(
            id=f"{'sync-' if sync else ''}{uuid.uuid4()}-u1",
            input=job_input,
            policy=policy or Policy(),
            sync=sync,
            webhook=webhook,
            s3_config=s3_config,
            input_size=size,
        )
        self.store.add(job)
        self.queue.put(job)
        return job

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
        chunks = job.take_chunks()
        self.store.count(job)
        return chunks

    def cancel(self, job: Job) -> None:
        """Cancel a job that is not final yet, and have its worker stop it."""
        if not job.final:
            self._finish(job, Status.CANCELLED, stop=True)

    def retry(self, job: Job) -> None:
        """Queue a FAILED or TIMED_OUT job again, under its id. Raises Conflict."""
        job.requeue()
        self.store.update(job)
        self._retried += 1
        self.queue.put(job)

    def purge(self) -> int:
        """Cancel every queued job; returns how many there were."""
        queued = list(self.queue.jobs.values())
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
                "inQueue": len(self.queue.jobs),
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
        taker = self.queue.open(worker, limit)
        worker.open_polls += 1
        try:
            await asyncio.wait((taker.jobs,), timeout=seconds)
        except asyncio.CancelledError:
            if taker.jobs.done():
                self.give_back(taker.jobs.result())
            raise
        finally:
            worker.open_polls -= 1
            self.queue.close(taker)
        return taker.jobs.result() if taker.jobs.done() else []

    def give_back(self, jobs: Iterable[Job]) -> None:
        """Return jobs that never reached their worker to the front of the queue."""
        returned = {job.id: job for job in jobs if job.status is Status.IN_PROGRESS}
        for job in returned.values():
            self._leave_worker(job)
            job.give_back()
            self.store.update(job)
        self.queue.put_first(returned)

    def ask_to_stop(self, worker_id: str, job_id: str) -> None:
        """Have this worker stop a job; asked again while it still shows that it runs.

        Once is not enough: the SDK drops a stop for a job that it has taken but not started.
        """
        if worker := self.workers.get(worker_id):
            worker.ask_to_stop(job_id)

    def add_chunk(self, worker_id: str, job_id: str, chunk: bytes) -> bool:
        """Keep one streamed chunk; False if the job is final. Raises UnknownJob, Conflict."""
        job = self._job_of(worker_id, job_id)
        if job.final:
            self.ask_to_stop(worker_id, job_id)
            return False
        job.add_chunk(chunk)
        self.store.count(job)
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
            job = self.store.jobs.get(job_id)
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
            self.queue.answer(worker_id)
            worker.wake_stop_polls()

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
        for job in self.store.jobs.values():
            job.jump_clock(seconds)
            self.store.update(job)

    def close(self) -> None:
        """End every wait now and hand out no further job."""
        self.closing = True
        self.queue.stop()
        for worker_id in self.workers:
            self.end_polls(worker_id)
        self.store.close()

    # ---- inside --------------------------------------------------------------------------

    def _job_of(self, worker_id: str, job_id: str) -> Job:
        """The job, if this worker is the one that has it."""
        if worker := self.workers.get(worker_id):
            worker.seen = time.monotonic()
        job = self.store.job(job_id)
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
        self.queue.jobs.pop(job.id, None)
        job.finish(status, output=output, error=error, size=size)
        self._completed += status is Status.COMPLETED
        self._failed += status in (Status.FAILED, Status.TIMED_OUT)
        self.store.update(job)
        self.on_finish(job)

    def _leave_worker(self, job: Job) -> None:
        if worker := self.workers.get(job.worker_id or ""):
            worker.in_progress.pop(job.id, None)

    def _time_out(self, job: Job, error: str) -> None:
        self._finish(job, Status.TIMED_OUT, error=error, stop=True)

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
