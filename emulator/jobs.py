"""A job: what it holds and how its state may change."""

import asyncio
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class EndpointError(Exception):
    """Anything the endpoint refuses; its text is one sentence for the caller."""


class UnknownJob(EndpointError):
    """No such job, or it has expired."""


class UnknownWorker(EndpointError):
    """No such worker, or it has been replaced."""


class Conflict(EndpointError):
    """The job's state, or its owner, does not allow this."""


class QueueFull(EndpointError):
    """The queue holds as much as it may."""


class Status(StrEnum):
    """The states of a job, by Runpod's names."""

    IN_QUEUE = "IN_QUEUE"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"


FINAL = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED, Status.TIMED_OUT})
RETRIABLE = frozenset({Status.FAILED, Status.TIMED_OUT})


@dataclass(frozen=True, slots=True)
class Policy:
    """How long a job may run once started, and live since it was queued, in seconds."""

    execution_timeout: float = 600.0
    ttl: float = 86_400.0


@dataclass(slots=True, eq=False)
class Job:
    """One job. Times are `time.monotonic()` seconds; `size` is all the bytes it holds."""

    id: str
    input: Any
    policy: Policy = Policy()
    sync: bool = False
    webhook: str | None = None
    s3_config: Any = None
    input_size: int = 0
    size: int = field(init=False)
    status: Status = Status.IN_QUEUE
    worker_id: str | None = None
    output: Any = None
    error: str | None = None
    chunks: list[bytes] = field(default_factory=list)
    queued_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    finished_at: float | None = None
    _watchers: list[asyncio.Future[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.size = self.input_size

    @property
    def final(self) -> bool:
        return self.status in FINAL

    def start(self, worker_id: str) -> None:
        """IN_QUEUE -> IN_PROGRESS on this worker."""
        self._require(Status.IN_QUEUE)
        self.status, self.worker_id, self.started_at = (
            Status.IN_PROGRESS,
            worker_id,
            time.monotonic(),
        )
        self.wake()

    def give_back(self) -> None:
        """IN_PROGRESS -> IN_QUEUE, for a job that never reached its worker."""
        self._require(Status.IN_PROGRESS)
        self.status, self.worker_id, self.started_at = Status.IN_QUEUE, None, None
        self.wake()

    def add_chunk(self, chunk: bytes) -> None:
        """Keep one streamed `{"output": ...}` until a client fetches it."""
        self._require(Status.IN_PROGRESS)
        self.chunks.append(chunk)
        self.size += len(chunk)
        self.wake()

    def take_chunks(self) -> list[bytes]:
        """The chunks that no client has fetched yet, as sent by the worker; forgets them."""
        chunks, self.chunks = self.chunks, []
        self.size -= sum(map(len, chunks))
        return chunks

    def report_progress(self, output: Any) -> None:
        """A worker's progress update: the output that /status shows while the job runs."""
        self._require(Status.IN_PROGRESS)
        self.output = output
        self.wake()

    def finish(
        self, status: Status, *, output: Any = None, error: str | None = None, size: int = 0
    ) -> None:
        """IN_QUEUE or IN_PROGRESS -> a final state. `size` is the output's bytes."""
        if status not in FINAL:
            raise ValueError(f"status is {status}: a job finishes in one of {sorted(FINAL)}")
        self._require(Status.IN_QUEUE, Status.IN_PROGRESS)
        self.status, self.output, self.error = status, output, error
        self.finished_at = time.monotonic()
        self.size += size
        if status not in RETRIABLE:
            self.input = None
            self.size -= self.input_size
        self.wake()

    def requeue(self) -> None:
        """FAILED or TIMED_OUT -> IN_QUEUE, without what the last attempt left behind."""
        if self.status not in RETRIABLE:
            raise Conflict(
                f"job {self.id} is {self.status}: only FAILED and TIMED_OUT jobs can be retried"
            )
        self.status, self.worker_id, self.chunks = Status.IN_QUEUE, None, []
        self.size = self.input_size
        self.output = self.error = self.started_at = self.finished_at = None
        self.queued_at = time.monotonic()
        self.wake()

    def as_dict(self) -> dict[str, Any]:
        """The body of /status, with times in milliseconds."""
        body: dict[str, Any] = {"id": self.id, "status": self.status}
        if self.started_at is not None:
            body["delayTime"] = round((self.started_at - self.queued_at) * 1000)
            body["workerId"] = self.worker_id
            if self.finished_at is not None:
                body["executionTime"] = round((self.finished_at - self.started_at) * 1000)
        if self.output is not None:
            body["output"] = self.output
        if self.error is not None:
            body["error"] = self.error
        return body

    def jump_clock(self, seconds: float) -> None:
        """Let all that has happened so far lie `seconds` further back."""
        self.queued_at -= seconds
        if self.started_at is not None:
            self.started_at -= seconds
        if self.finished_at is not None:
            self.finished_at -= seconds

    async def changed(self, seconds: float) -> None:
        """Wait for the next change, at most `seconds`."""
        watcher = asyncio.get_running_loop().create_future()
        self._watchers.append(watcher)
        try:
            await asyncio.wait((watcher,), timeout=seconds)
        finally:
            if watcher in self._watchers:
                self._watchers.remove(watcher)

    def wake(self) -> None:
        """End every `changed()` now."""
        watchers, self._watchers = self._watchers, []
        for watcher in watchers:
            if not watcher.done():
                watcher.set_result(None)

    def _require(self, *allowed: Status) -> None:
        if self.status not in allowed:
            raise Conflict(f"job {self.id} is {self.status}, not {' or '.join(allowed)}")
