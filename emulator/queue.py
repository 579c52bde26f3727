"""The queue: jobs that wait for a worker, and workers that wait for jobs."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from emulator.jobs import Job
from emulator.worker import Worker


@dataclass(slots=True, eq=False)
class Taker:
    """One open job-take: a worker that waits for up to `limit` jobs."""

    worker: Worker
    limit: int
    jobs: asyncio.Future[list[Job]]


class Queue:
    """Jobs by id, the first to be handed out first, and the takers that are open.

    `on_start(job)` is called for each job that was handed out.
    """

    def __init__(self, on_start: Callable[[Job], None]) -> None:
        self.jobs: dict[str, Job] = {}
        self.takers: list[Taker] = []
        self._on_start = on_start
        self._closed = False

    def put(self, job: Job) -> None:
        """Queue a job as the last one."""
        self.jobs[job.id] = job
        self._dispatch()

    def put_first(self, jobs: dict[str, Job]) -> None:
        """Queue jobs before all others."""
        self.jobs = jobs | self.jobs
        self._dispatch()

    def open(self, worker: Worker, limit: int) -> Taker:
        """Let this worker wait for up to `limit` jobs, until `close(taker)`."""
        taker = Taker(worker, limit, asyncio.get_running_loop().create_future())
        self.takers.append(taker)
        self._dispatch()
        return taker

    def close(self, taker: Taker) -> None:
        """The worker waits no longer."""
        if taker in self.takers:
            self.takers.remove(taker)

    def answer(self, worker_id: str) -> None:
        """Answer this worker's takers now, with no job."""
        for taker in [t for t in self.takers if t.worker.id == worker_id]:
            self.takers.remove(taker)
            taker.jobs.set_result([])

    def stop(self) -> None:
        """Hand out no further job."""
        self._closed = True

    def _dispatch(self) -> None:
        """Hand queued jobs out, each to the waiting worker with the fewest in progress."""
        taken: dict[Taker, list[Job]] = {}
        while self.jobs and not self._closed:
            waiting = [
                taker
                for taker in self.takers
                if not taker.worker.draining and len(taken.get(taker, ())) < taker.limit
            ]
            if not waiting:
                break
            taker = min(waiting, key=lambda taker: len(taker.worker.in_progress))
            job = self.jobs.pop(next(iter(self.jobs)))
            taker.worker.start(job)
            self._on_start(job)
            taken.setdefault(taker, []).append(job)
        for taker, jobs in taken.items():
            self.takers.remove(taker)
            taker.jobs.set_result(jobs)
