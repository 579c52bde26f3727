"""Tells a job's webhook how it ended."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from emulator.jobs import Job
from emulator.web import dump

if TYPE_CHECKING:
    import httpx

log = logging.getLogger("emulator")


@dataclass(slots=True)
class Webhooks:
    """Posts finished jobs: 200 is expected, else there are `tries` in all, `delay` s apart."""

    tries: int = 3
    delay: float = 10.0
    _client: httpx.AsyncClient | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def send(self, job: Job) -> None:
        """Post the job to its webhook, if it has one, without waiting for that."""
        if job.webhook:
            # The body is made now: a later retry of the job must not change what is told.
            task = asyncio.create_task(self._send(job.id, job.webhook, dump(job.as_dict())))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Give up what is not delivered yet."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._client:
            await self._client.aclose()

    async def _send(self, job_id: str, url: str, body: bytes) -> None:
        import httpx  # here, since it is a third of the emulator's start and seldom needed

        if self._client is None:
            direct = httpx.AsyncHTTPTransport()
            self._client = httpx.AsyncClient(
                mounts={"all://127.0.0.1": direct, "all://localhost": direct}, timeout=10.0
            )
        headers = {"Content-Type": "application/json"}
        for attempt in range(1, self.tries + 1):
            try:
                response = await self._client.post(url, content=body, headers=headers)
                outcome = f"answered {response.status_code}"
                if response.status_code == 200:
                    return
            except httpx.HTTPError as error:
                outcome = f"failed: {type(error).__name__}"
            log.warning(f"webhook of job {job_id} {outcome} (try {attempt} of {self.tries})")
            if attempt < self.tries:
                await asyncio.sleep(self.delay)
