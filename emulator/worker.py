"""A worker as the endpoint sees it: its state, its jobs, and what it shall stop."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

from emulator.jobs import Job


@dataclass(slots=True, eq=False)
class Worker:
    """What the endpoint knows of one worker. `seen` is `time.monotonic()` of its last call.

    `managed`: a supervisor says when it is gone. `draining`: it gets no further job.
    `stopping`: moreover its long polls are cut short.
    """

    id: str
    managed: bool = False
    ready: bool = False
    draining: bool = False
    stopping: bool = False
    unhealthy: str | None = None
    in_progress: dict[str, Job] = field(default_factory=dict)
    open_polls: int = 0
    pings: int = 0
    pinged_jobs: list[str] = field(default_factory=list)
    seen: float = field(default_factory=time.monotonic)
    _stop_requests: list[str] = field(default_factory=list)
    _stop_waiters: list[asyncio.Future[None]] = field(default_factory=list)

    @property
    def state(self) -> str:
        if self.unhealthy is not None:
            return "unhealthy"
        if self.draining:
            return "stopping"
        if not self.ready:
            return "initializing"
        return "running" if self.in_progress else "idle"

    def start(self, job: Job) -> None:
        """Give it this queued job; what it was to stop before was an earlier attempt."""
        if job.id in self._stop_requests:
            self._stop_requests.remove(job.id)
        self.in_progress[job.id] = job
        job.start(self.id)

    def ask_to_stop(self, job_id: str) -> None:
        """Have it stop a job."""
        if job_id not in self._stop_requests:
            self._stop_requests.append(job_id)
            self.wake_stop_polls()

    async def wait_for_stop_requests(self, seconds: float) -> None:
        """Wait up to `seconds` until it shall stop a job."""
        if self._stop_requests:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._stop_waiters.append(waiter)
        self.open_polls += 1
        try:
            await asyncio.wait((waiter,), timeout=seconds)
        finally:
            self._stop_waiters.remove(waiter)
            self.open_polls -= 1

    def take_stop_requests(self) -> list[str]:
        """Ids of the jobs that it shall stop; each is handed out once."""
        requests, self._stop_requests = self._stop_requests, []
        return requests

    def wake_stop_polls(self) -> None:
        """End every `wait_for_stop_requests()` now."""
        for waiter in self._stop_waiters:
            if not waiter.done():
                waiter.set_result(None)

    def as_dict(self) -> dict[str, Any]:
        """As /emulator/workers shows it; a supervisor adds what it knows of its process."""
        return {
            "id": self.id,
            "pid": None,
            "state": self.state,
            "reason": self.unhealthy,
            "jobs_in_progress": list(self.in_progress),
            "started_at": None,
            "restarts": 0,
            "last_exit_code": None,
            "pings": self.pings,
            "pinged_jobs": self.pinged_jobs,
        }
