"""The jobs that the endpoint holds: within how many bytes, and each for how long."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from emulator.jobs import Job, QueueFull, UnknownJob


@dataclass(frozen=True, slots=True)
class Limits:
    """What the endpoint holds and for how long: seconds, bytes, counts."""

    retention: float = 1800.0
    sync_retention: float = 60.0
    memory: int = 1024**3
    queued_jobs_per_worker: int = 500
    worker_silence: float = 60.0


class Store:
    """Every job by its id; `size` is the bytes of them all.

    `on_timeout(job, error)` is called when a job's ttl or execution timeout has passed.
    """

    def __init__(self, limits: Limits, on_timeout: Callable[[Job, str], None]) -> None:
        self.jobs: dict[str, Job] = {}
        self.finished: dict[str, Job] = {}
        self.timers: dict[str, asyncio.TimerHandle] = {}
        self.size = 0
        self._sizes: dict[str, int] = {}
        self._limits = limits
        self._on_timeout = on_timeout
        self._closed = False

    def add(self, job: Job) -> None:
        """Hold this job, if need be in place of the oldest finished ones. Raises QueueFull."""
        self._make_room(job.size)
        self.jobs[job.id] = job
        self._sizes[job.id] = 0
        self.update(job)

    def job(self, job_id: str) -> Job:
        """The job of this id. Raises UnknownJob."""
        try:
            return self.jobs[job_id]
        except KeyError:
            raise UnknownJob(f"job {job_id} does not exist or has expired") from None

    def count(self, job: Job) -> None:
        """Count the bytes that the job holds now; none of one that is forgotten meanwhile."""
        if job.id in self._sizes:
            self.size += job.size - self._sizes[job.id]
            self._sizes[job.id] = job.size

    def update(self, job: Job) -> None:
        """Take note of the job's new state: its bytes, and until when it may stay so."""
        self.count(job)
        if job.final:
            self.finished[job.id] = job
        else:
            self.finished.pop(job.id, None)
        self._set_timer(job)

    def close(self) -> None:
        """Time no job any more, and end every wait for a change of one."""
        self._closed = True
        for job in self.jobs.values():
            job.wake()
        for timer in self.timers.values():
            timer.cancel()

    def _set_timer(self, job: Job) -> None:
        """Set the one timer that a job has at a time.

        Queued: its ttl. In progress: its ttl or execution timeout. Final: its retention.
        """
        if timer := self.timers.pop(job.id, None):
            timer.cancel()
        if self._closed:
            return
        if job.finished_at is not None:
            kept = self._limits.sync_retention if job.sync else self._limits.retention
            deadline, action = job.finished_at + kept, self._forget
        else:
            deadline, action = job.queued_at + job.policy.ttl, self._time_out
            if job.started_at is not None:
                deadline = min(deadline, job.started_at + job.policy.execution_timeout)
        delay = max(0.0, deadline - time.monotonic())
        self.timers[job.id] = asyncio.get_running_loop().call_later(delay, action, job)

    def _time_out(self, job: Job) -> None:
        error = f"job expired: its ttl of {job.policy.ttl:g} s passed"
        if job.started_at is not None:
            limit = job.policy.execution_timeout
            if job.started_at + limit < job.queued_at + job.policy.ttl:
                error = f"job ran longer than its executionTimeout of {limit:g} s"
        self._on_timeout(job, error)

    def _forget(self, job: Job) -> None:
        del self.jobs[job.id]
        self.finished.pop(job.id, None)
        self.size -= self._sizes.pop(job.id)
        if timer := self.timers.pop(job.id, None):
            timer.cancel()

    def _make_room(self, size: int) -> None:
        """Forget the oldest finished jobs until `size` more bytes fit. Raises QueueFull."""
        while self.size + size > self._limits.memory and self.finished:
            self._forget(next(iter(self.finished.values())))
        if self.size + size > self._limits.memory:
            raise QueueFull(
                f"jobs hold {self.size} bytes and this one has {size}; "
                f"this endpoint holds {self._limits.memory}"
            )
