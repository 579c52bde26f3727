"""A job while it runs: its deadline, how it ended, and the one log line about that."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from worker.errors import JobTimeout, TripodError, raised_by_handler
from worker.serverless.delivery import Outbox

log = logging.getLogger(__name__)

DIED = "the engine died while this job was running"


class Running:
    """A job between its taking and the delivery of its end.

    `outcome` is `finished`, `cancelled`, `failed: …` or `lost: …`.
    """

    def __init__(self, job: str, limit: float) -> None:
        self.id = job
        self.begin = time.monotonic()
        self.deadline = asyncio.get_running_loop().time() + limit
        self.too_late: TripodError = JobTimeout(
            f"the job ran longer than JOB_TIMEOUT={limit:g} seconds"
        )
        self.timeout: asyncio.Timeout | None = None
        self.outcome = "cancelled"
        self.last: Any = {}

    def end_at(self, when: float, error: TripodError) -> None:
        """Let the job fail with `error` at `when` on the loop's clock, if that is sooner."""
        if when < self.deadline:
            self.deadline, self.too_late = when, error
            if self.timeout:
                self.timeout.reschedule(when)


async def until_deadline(
    chunks: AsyncGenerator[Any, None], running: Running
) -> AsyncGenerator[Any, None]:
    """Pass chunks on until the job's deadline; only waiting for the engine counts as running."""
    async with aclosing(chunks):
        while True:
            try:
                async with asyncio.timeout_at(running.deadline) as running.timeout:
                    chunk = await anext(chunks)
            except StopAsyncIteration:
                return
            except TimeoutError:
                if not (running.timeout and running.timeout.expired()):
                    raise
                raise running.too_late from None
            finally:
                running.timeout = None
            yield chunk


def failure(error: Exception, job: str) -> str:
    """The outcome of a job whose handler raised."""
    if isinstance(error, TripodError):
        return f"failed: {error}"
    log.error("the handler raised", exc_info=error, extra={"job": job})
    return f"failed: {raised_by_handler(error)}"


def error_of(outcome: str) -> str | None:
    """What the client is told, unless the job finished."""
    return None if outcome == "finished" else outcome.removeprefix("failed: ")


def log_outcome(job: Running, outbox: Outbox) -> None:
    """How it ended, after how long, with how many tokens."""
    refused = f", {outbox.refused} chunks refused" if outbox.refused else ""
    glyph = {"finished": "✓", "cancelled": "⊘"}.get(job.outcome, "✗")
    seconds = time.monotonic() - job.begin
    level = logging.ERROR if job.outcome.startswith("lost") else logging.INFO
    log.log(
        level,
        "%s %s after %.2f s%s%s",
        glyph,
        job.outcome,
        seconds,
        _tokens(job.last),
        refused,
        extra={"job": job.id},
    )


def _tokens(chunk: Any) -> str:
    """What a job's last chunk says of its tokens; an engine's other routes name them otherwise."""
    usage = chunk.get("usage") if isinstance(chunk, dict) else None
    if not isinstance(usage, dict):
        return ""
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    answer = usage.get("completion_tokens", usage.get("output_tokens"))
    told = [str(count) for count in (prompt, answer) if isinstance(count, int)]
    return f", {'+'.join(told)} tokens" if told else ""
