"""Runpod's job queue. The only module that imports runpod.

The SDK's own loop looks for jobs ten times a second and waits up to a second for a freed slot;
JobLoop replaces that with events and keeps the rest of the SDK as it is: job-take and batches,
stop signals, pings, fitness checks, delivery, refresh.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import runpod
from runpod.http_client import AsyncClientSession, ClientSession, TooManyRequests
from runpod.serverless.modules import rp_scale

from preload.weights import WeightsError
from worker import engines
from worker.chunks import Chunk
from worker.engines.base import Engine
from worker.errors import JobTimeout, SettingsError, ShuttingDown, TripodError
from worker.handler import handler
from worker.settings import Settings

log = logging.getLogger(__name__)

DIED = "the engine died while this job was running"

DEAD_ENGINE_GRACE = 6.0
"""Seconds that jobs have to report their failure when the engine has died."""


def serve(settings: Settings) -> int:
    """Take and answer jobs until SIGTERM (returns 0) or until the engine is dead (returns 1)."""
    loops: list[JobLoop] = []

    def create(config: dict[str, Any]) -> JobLoop:
        loops.append(JobLoop(config, settings))
        return loops[0]

    rp_scale.JobScaler = create
    runpod.serverless.start({"handler": handler, "return_aggregate_stream": True})
    return loops[0].exit_code


@dataclass(slots=True)
class Running:
    """A job between its taking and the delivery of its end."""

    id: str
    deadline: float
    too_late: TripodError
    begin: float = field(default_factory=time.monotonic)
    chunks: AsyncGenerator[Chunk | str, None] | None = None
    timeout: asyncio.Timeout | None = None
    outcome: str = "cancelled"
    last: Chunk | str = field(default_factory=dict)

    def end_at(self, when: float, error: TripodError) -> None:
        """Let the job fail with `error` at `when` on the loop's clock, if that is sooner."""
        if when < self.deadline:
            self.deadline, self.too_late = when, error
            if self.timeout:
                self.timeout.reschedule(when)


class JobLoop(rp_scale.JobScaler):  # type: ignore[misc]
    """The SDK's JobScaler, driven by events: a job starts when it is taken."""

    def __init__(self, config: dict[str, Any], settings: Settings) -> None:
        config["handler"] = self._answer
        super().__init__(config)
        self.exit_code = 0
        self._settings = settings
        self._engine: Engine
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: dict[str, Running] = {}
        self._slot_freed = asyncio.Event()

    def handle_shutdown(self, signum: int, frame: object) -> None:
        """SIGTERM or SIGINT; the SDK installs it, and it stays in place until the very end."""
        if self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.kill_worker)

    async def run(self) -> None:
        """Start the engine, serve until told to stop, drain, stop the engine."""
        self._loop = asyncio.get_running_loop()
        if await self._start_engine():
            async with AsyncClientSession() as session:
                await self._serve(session)
            self._engine.stop()

    async def _start_engine(self) -> bool:
        start = asyncio.create_task(engines.start(self._settings))
        stop = asyncio.create_task(self._shutdown_event.wait())
        await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            log.info("told to stop while the engine was starting")
            start.cancel()
            return False
        stop.cancel()
        try:
            self._engine = start.result()
        except (TripodError, WeightsError) as error:
            log.error("%s", error, exc_info=error.__cause__)
            self.exit_code = 2 if isinstance(error, SettingsError) else 1
            return False
        wanted = self._settings.concurrency_modifier
        self.current_concurrency = self._engine.slots if wanted == "auto" else wanted
        log.info("taking jobs, %d at once", self.current_concurrency)
        return True

    async def _serve(self, session: ClientSession) -> None:
        take = asyncio.create_task(self.get_jobs(session))
        stop_signals = asyncio.create_task(self.monitor_stop_signals(session))
        died = asyncio.create_task(self._engine.died())
        stop = asyncio.create_task(self._shutdown_event.wait())
        await asyncio.wait({take, died, stop}, return_when=asyncio.FIRST_COMPLETED)
        take.cancel()
        if died.done():
            self._give_up()
            grace = DEAD_ENGINE_GRACE
        else:
            log.info("told to stop; %d jobs are running", len(self._running))
            grace = self._settings.shutdown_timeout
        await self._drain(grace)
        background = (take, stop_signals, died, stop)
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)

    def _give_up(self) -> None:
        """The engine is dead: results say stopPod, and the process ends with an error."""
        if self.exit_code == 0:
            log.error("the engine died; this worker asks to be replaced")
        self.exit_code = 1
        self.config["refresh_worker"] = True
        self.kill_worker()

    async def _drain(self, grace: float) -> None:
        """Let jobs end within `grace` seconds, the last of which are for delivery and clean-up."""
        now = asyncio.get_running_loop().time()
        reserve = min(5.0, grace * 0.4)
        error = ShuttingDown(
            f"the worker was told to stop, and the job did not end within {grace - reserve:g} "
            f"of its SHUTDOWN_TIMEOUT of {grace:g} seconds"
        )
        for job in self._running.values():
            job.end_at(now + grace - reserve, error)
        if not self.jobs_tasks:
            return
        _, late = await asyncio.wait(self.jobs_tasks.values(), timeout=grace - reserve / 2)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    async def get_jobs(self, session: ClientSession) -> None:
        """Keep one long poll open while a slot is free, and start what it brings at once."""
        loop = asyncio.get_running_loop()
        pause = 0.2
        while True:
            while (free := self.current_concurrency - len(self.jobs_tasks)) < 1:
                self._slot_freed.clear()
                await self._slot_freed.wait()
            begin = loop.time()
            try:
                async with asyncio.timeout(self.jobs_fetcher_timeout):
                    jobs = await self.jobs_fetcher(session, free) or []
            except TooManyRequests:
                await asyncio.sleep(5)
                continue
            except TimeoutError:
                continue
            except Exception as error:  # noqa: BLE001 - the SDK raises bare Exception for a malformed job
                log.warning("no job could be taken: %s; trying again in %.1f s", error, pause)
                await asyncio.sleep(pause)
                pause = min(pause * 2, 10)
                continue
            pause = 0.2
            for job in jobs:
                self._start_job(session, job)
            if not jobs:  # a platform that does not hold the poll open must not be hammered
                await asyncio.sleep(max(0.0, begin + 0.2 - loop.time()))

    def _start_job(self, session: ClientSession, job: Any) -> None:
        if not isinstance(job, dict) or not isinstance(job.get("id"), str):
            log.error("the platform handed out something without an id; it can't be answered")
            return
        job.setdefault("input", None)
        if job["id"] in self.jobs_tasks:
            log.warning("handed out again while it runs; ignored", extra={"job": job["id"]})
            return
        self.jobs_tasks[job["id"]] = asyncio.create_task(self.handle_job(session, job))

    async def handle_job(self, session: ClientSession, job: dict[str, Any]) -> None:
        """One job from its taking to the delivery of its end, and one log line about it."""
        now = asyncio.get_running_loop().time()
        limit = self._settings.job_timeout
        too_late = JobTimeout(f"the job ran longer than JOB_TIMEOUT={limit:g} seconds")
        running = Running(job["id"], now + limit, too_late)
        self._running[running.id] = running
        self.job_progress.add(running.id)
        try:
            await self.jobs_handler(session, self.config, job)
        except asyncio.CancelledError:
            running.outcome = "cancelled"
        except Exception as error:  # noqa: BLE001 - whatever the SDK lets through concerns this job alone
            running.outcome = f"failed: {type(error).__name__} in the SDK: {error}"
        finally:
            if running.chunks:
                await running.chunks.aclose()
            self.job_progress.remove(running.id)
            del self._running[running.id], self.jobs_tasks[running.id]
            self._slot_freed.set()
            _log_outcome(running)

    async def _answer(self, job: dict[str, Any]) -> AsyncGenerator[Chunk | str, None]:
        """What the SDK calls: the handler, bounded in time, its errors as sentences."""
        running = self._running[job["id"]]
        running.chunks = handler(job, self._engine)
        try:
            async with aclosing(_until_deadline(running)) as chunks:
                async for chunk in chunks:
                    running.last = chunk
                    yield chunk
            # OpenAI's routes tell of a dead engine inside their answer.
            running.outcome = f"failed: {DIED}" if self._engine.is_dead() else "finished"
        except TripodError as error:
            running.outcome = f"failed: {DIED if self._engine.is_dead() else error}"
        except Exception as error:  # a bug in the handler must not end the worker
            log.exception("the handler raised", extra={"job": running.id})
            running.outcome = f"failed: the handler raised {type(error).__name__}: {error}"
        if self._engine.is_dead():
            self._give_up()
        if running.outcome != "finished":
            yield {"error": running.outcome.removeprefix("failed: ")}


async def _until_deadline(running: Running) -> AsyncGenerator[Chunk | str, None]:
    """Pass chunks on until the job's deadline; only waiting for the engine counts as running."""
    assert running.chunks
    while True:
        try:
            async with asyncio.timeout_at(running.deadline) as running.timeout:
                chunk = await anext(running.chunks)
        except StopAsyncIteration:
            return
        except TimeoutError:
            if not (running.timeout and running.timeout.expired()):
                raise
            raise running.too_late from None
        finally:
            running.timeout = None
        yield chunk


def _log_outcome(job: Running) -> None:
    usage = job.last.get("usage") if isinstance(job.last, dict) else None
    tokens = f", {usage['prompt_tokens']}+{usage['completion_tokens']} tokens" if usage else ""
    glyph = {"finished": "✓", "cancelled": "⊘"}.get(job.outcome, "✗")
    seconds = time.monotonic() - job.begin
    log.info("%s %s after %.2f s%s", glyph, job.outcome, seconds, tokens, extra={"job": job.id})
