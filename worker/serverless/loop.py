"""The job loop: takes jobs, runs them through the handler, delivers what they yield, ends them.

The SDK's own loop looks for jobs ten times a second, waits up to a second for a freed slot and
drops what the platform does not take at once; JobLoop replaces that with events and `delivery`
and keeps the rest of the SDK as it is: job-take and batches, stop signals, pings, progress, fitness
checks, refresh.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any

from runpod.http_client import AsyncClientSession, ClientSession, TooManyRequests
from runpod.serverless.modules import rp_http, rp_scale

from worker import startup
from worker.engines.base import Engine
from worker.errors import Lost, ShuttingDown
from worker.loading import Handler
from worker.serverless.delivery import Delivery, Outbox
from worker.serverless.running import (
    DIED,
    Running,
    error_of,
    failure,
    log_outcome,
    until_deadline,
)
from worker.settings import Settings

log = logging.getLogger(__name__)

DEAD_ENGINE_GRACE = 6.0
"""Seconds that jobs have to report their failure when the engine has died."""

TAKE_GRACE = 0.5
"""Seconds from SIGTERM in which a job that is on its way may still arrive."""

SHORTEST_POLL = 0.2
"""Seconds between two polls of a platform that does not hold them open."""

LONGEST_PAUSE = 5.0
"""Seconds between two polls of a platform that fails."""

POST_SHARE, LONGEST_MERGE = 0.004, 0.5
"""Seconds between two chunks of a stream: for each job that runs, and at most. POSTs, of which this
makes 250 a second, take the time of the process that all tokens go through."""

LOOK_AGAIN = 0.25
"""Seconds between two looks at an engine that is full; a job's end is seen at once."""

REMEMBERED = 10_000
"""Finished jobs whose ids are kept, so that none runs twice."""


class JobLoop(rp_scale.JobScaler):  # type: ignore[misc]
    """The SDK's JobScaler, driven by events: a job starts when it is taken."""

    def __init__(self, config: dict[str, Any], settings: Settings, handler: Handler) -> None:
        super().__init__(config)
        self.exit_code = 0
        self.ended: Counter[str] = Counter()
        self._settings = settings
        self._handler = handler
        self._engine: Engine
        self._delivery: Delivery
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: dict[str, Running] = {}
        self._finished: OrderedDict[str, None] = OrderedDict()
        self._slot_freed = asyncio.Event()
        is_auto = settings.concurrency_modifier == "auto"
        self._look_again = LOOK_AGAIN if is_auto else None
        self._told = 0

    def handle_shutdown(self, signum: int, frame: object) -> None:
        """SIGTERM or SIGINT; the SDK installs it, and it stays in place until the very end."""
        if self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.kill_worker)

    async def run(self) -> None:
        """Start the engine, serve until told to stop, drain, stop the engine."""
        self._loop = asyncio.get_running_loop()
        if await self._start_engine():
            async with AsyncClientSession() as session:
                self._delivery = Delivery(
                    session,
                    rp_http.JOB_STREAM_URL,
                    rp_http.JOB_DONE_URL,
                    self._settings.delivery_timeout,
                )
                await self._serve(session)
            self._engine.stop()
            kinds = ("finished", "failed", "cancelled", "lost")
            log.info("jobs: %s", ", ".join(f"{self.ended[kind]} {kind}" for kind in kinds))

    async def _start_engine(self) -> bool:
        started = await startup.start_unless(self._shutdown_event, self._settings, self._handler)
        if isinstance(started, int):
            self.exit_code = started
            return False
        self._engine = started
        wanted = self._settings.concurrency_modifier
        if wanted == "auto":
            self.current_concurrency = started.batch
            log.info(
                "taking jobs, %d at once to begin with, then as many as run at once "
                "(CONCURRENCY_MODIFIER=auto)",
                started.room(),
            )
        else:
            self.current_concurrency = wanted
            log.info(
                "taking jobs, %d at once; the engine could hold %d of full length "
                "(CONCURRENCY_MODIFIER=auto takes as many as run at once)",
                wanted,
                started.slots,
            )
        return True

    async def _serve(self, session: ClientSession) -> None:
        take = asyncio.create_task(self.get_jobs(session))
        stop_signals = asyncio.create_task(self.monitor_stop_signals(session))
        died = asyncio.create_task(self._engine.died())
        stop = asyncio.create_task(self._shutdown_event.wait())
        await asyncio.wait({take, died, stop}, return_when=asyncio.FIRST_COMPLETED)
        if died.done():
            self._give_up()
            grace = DEAD_ENGINE_GRACE
        else:
            log.info("told to stop; %d jobs are running", len(self._running))
            grace = self._settings.shutdown_timeout
        begin = asyncio.get_running_loop().time()
        await asyncio.wait({take}, timeout=min(TAKE_GRACE, grace / 4))
        take.cancel()
        await self._drain(begin, grace)
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

    async def _drain(self, begin: float, grace: float) -> None:
        """Let jobs end within `grace` seconds, the last of which are for delivery and clean-up."""
        reserve = startup.delivery_reserve(grace)
        error = ShuttingDown(
            f"the worker was told to stop, and the job did not end within {grace - reserve:g} "
            f"of its SHUTDOWN_TIMEOUT of {grace:g} seconds"
        )
        for job in self._running.values():
            job.end_at(begin + grace - reserve, error)
        if not self.jobs_tasks:
            return
        left = begin + grace - reserve / 2 - asyncio.get_running_loop().time()
        _, late = await asyncio.wait(self.jobs_tasks.values(), timeout=left)
        for job in self._running.values():
            job.outcome = "lost: the worker had to end before the platform took it"
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    async def get_jobs(self, session: ClientSession) -> None:
        """Keep one long poll open while a slot is free, and start what it brings at once."""

        def fetch() -> Awaitable[list[Any] | None]:
            return self.jobs_fetcher(session, self._free_slots())  # type: ignore[no-any-return]

        async for jobs in self._polls(fetch, self.jobs_fetcher_timeout, "jobs"):
            for job in jobs:
                self._start_job(job)
            if not self.is_alive():
                return
            while self._free_slots() < 1:
                self._slot_freed.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._slot_freed.wait(), self._look_again)
            await self._engine.available()

    async def monitor_stop_signals(self, session: ClientSession) -> None:
        """Keep one long poll open for the ids of jobs that shall be stopped."""

        def fetch() -> Awaitable[list[str]]:
            return self.stop_signals_fetcher(session)  # type: ignore[no-any-return]

        async for ids in self._polls(fetch, self.stop_signals_fetcher_timeout, "stop signals"):
            for job in ids:
                await self.stop_job(job)

    async def _polls(
        self, fetch: Callable[[], Awaitable[list[Any] | None]], timeout: float, what: str
    ) -> AsyncGenerator[list[Any], None]:
        """What one long poll after the other brings, for ever, whatever the platform does."""
        loop = asyncio.get_running_loop()
        pause = SHORTEST_POLL
        while True:
            begin = loop.time()
            try:
                async with asyncio.timeout(timeout):
                    found = await fetch() or []
            except TooManyRequests:
                await asyncio.sleep(5)
                continue
            except TimeoutError:
                continue
            except Exception as error:  # noqa: BLE001 - the SDK raises bare Exception for a malformed job
                if pause == SHORTEST_POLL:
                    log.warning("the platform gives no %s: %s; trying again", what, error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)
                continue
            if pause > SHORTEST_POLL:
                pause = SHORTEST_POLL
                log.info("the platform gives %s again", what)
            yield found
            if not found:
                await asyncio.sleep(max(0.0, begin + SHORTEST_POLL - loop.time()))

    def _free_slots(self) -> int:
        """How many more jobs to take; with `auto`, as many as the engine would run at once."""
        taken = len(self.jobs_tasks)
        if self._look_again is None:
            return int(self.current_concurrency) - taken
        on_their_way = max(0, taken - self._engine.unfinished())
        free = self._engine.room() - on_their_way
        self._tell(taken + max(0, free))
        return free

    def _tell(self, at_once: int) -> None:
        """Log how many jobs are taken at once, when that has doubled or halved."""
        if not self._told / 2 < at_once < self._told * 2:
            log.info("up to %d jobs at once", at_once)
            self._told = at_once

    def _start_job(self, job: Any) -> None:
        if not isinstance(job, dict) or not isinstance(job.get("id"), str):
            log.error("the platform handed out something without an id; it can't be answered")
            return
        job.setdefault("input", None)
        if job["id"] in self.jobs_tasks:
            log.warning("handed out again while it runs; ignored", extra={"job": job["id"]})
            return
        if job["id"] in self._finished:
            log.warning("handed out again after its end; ignored", extra={"job": job["id"]})
            return
        running = Running(job["id"], self._settings.job_timeout)
        outbox = Outbox(self._delivery, running.id)
        self._running[running.id] = running
        self.job_progress.add(running.id)
        task = asyncio.create_task(self._run_job(job, running, outbox))
        self.jobs_tasks[running.id] = task
        # A task that is stopped before its first step runs none of its own code.
        task.add_done_callback(lambda _: self._end_job(running, outbox))

    async def _run_job(self, job: dict[str, Any], running: Running, outbox: Outbox) -> None:
        """One job from its taking to the delivery of its end."""
        with suppress(asyncio.CancelledError):  # a stop signal, or _drain, which sets the outcome
            ended = await self._answer(job, running, outbox)
            running.outcome = await self._finish(ended, outbox)

    def _end_job(self, running: Running, outbox: Outbox) -> None:
        """Free its slot, count it, and log one line about it."""
        self.job_progress.remove(running.id)
        del self._running[running.id], self.jobs_tasks[running.id]
        self._slot_freed.set()
        kind = running.outcome.partition(":")[0]
        self.ended[kind] += 1
        if kind == "finished":
            self._remember(running.id)
        log_outcome(running, outbox)

    async def _answer(self, job: dict[str, Any], running: Running, outbox: Outbox) -> str:
        """Generate and deliver chunks; returns how that ended."""
        loop = asyncio.get_running_loop()
        interval = self._settings.stream_interval_ms / 1000
        first = None
        outcome = "finished"
        try:
            async with aclosing(
                until_deadline(self._handler.answer(job, self._engine), running)
            ) as chunks:
                async for chunk in chunks:
                    running.last = chunk
                    begin = loop.time()
                    first = first or begin
                    await outbox.send(chunk)
                    if interval and _may_wait(chunk):
                        crowd = min(LONGEST_MERGE, POST_SHARE * len(self._running))
                        due = begin + max(interval, min(crowd, (begin - first) / 2))
                        await asyncio.sleep(max(0.0, due - loop.time()))
        except Exception as error:  # noqa: BLE001 - a bug in the handler must not end the worker
            outcome = failure(error, running.id)
        if self._engine.is_dead():
            # OpenAI's routes tell of a dead engine inside their answer.
            outcome = f"failed: {DIED}"
            self._give_up()
        return outcome

    async def _finish(self, outcome: str, outbox: Outbox) -> str:
        """Deliver the job's end; returns how it ended in the end."""
        stop_pod = bool(self.config.get("refresh_worker"))
        try:
            if error := await outbox.finish(error_of(outcome), stop_pod=stop_pod):
                outcome = f"failed: {error}"
        except Lost as error:
            outcome = f"lost: {error}"
        if stop_pod:
            self.kill_worker()
        return outcome

    def _remember(self, job: str) -> None:
        self._finished[job] = None
        if len(self._finished) > REMEMBERED:
            self._finished.popitem(last=False)


def _may_wait(chunk: Any) -> bool:
    """Whether the next chunk gains by a pause: not after the last, nor between answers."""
    if isinstance(chunk, str):
        return not chunk.endswith("[DONE]\n\n")
    return not isinstance(chunk, dict) or ("usage" not in chunk and chunk.get("index", 0) == 0)
