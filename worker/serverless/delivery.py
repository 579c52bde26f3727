"""A job's chunks and its end → the platform: in order, through outages, within its limits."""

from __future__ import annotations

import asyncio
import io
import logging
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import aiohttp

from worker.errors import JobFailed, Lost, Refused, Undelivered
from worker.job.chunks import encoded

log = logging.getLogger(__name__)

CHUNK_LIMIT = 1_000_000
"""Bytes of one chunk that /stream passes on."""

RESULT_LIMIT = 20_000_000
"""Bytes of a result that the platform takes."""

PIECE = 80_000
"""Characters of a piece of a chunk: 960,000 bytes if each is an escaped pair of surrogates."""

ATTEMPT_TIMEOUT = 30.0
"""Seconds after which a POST without an answer is tried again."""

LARGE = 1 << 20
"""Bytes of a body that would hold up the event loop."""

OFFSETS = {"text": "offset", "reasoning": "reasoning_offset", "tool_calls": "tool_calls_offset"}
"""Where a chunk that may be there twice belongs: characters, or pieces of calls, before it."""

LONGEST_PAUSE = 5.0
"""Seconds between two attempts at most."""

TRY_AGAIN = {408, 425, 429}
"""What the platform may answer below 500 that is not a refusal."""


class Delivery:
    """POSTs to the platform, each tried again for up to `timeout` seconds.

    Args:
        session: the SDK's, with its authorization.
        chunk_url, result_url: the SDK's, with `$ID` where the job's id belongs.
    """

    def __init__(
        self, session: aiohttp.ClientSession, chunk_url: str, result_url: str, timeout: float
    ) -> None:
        self.chunk_url = chunk_url + "&isStream=false"
        self.result_url = result_url + "&isStream=true"
        self._session = session
        self._timeout = timeout
        self._attempt_timeout = aiohttp.ClientTimeout(total=min(ATTEMPT_TIMEOUT, timeout))
        self._is_failing = False

    async def post(
        self, url: str, job: str, body: bytes, again: Callable[[], bytes] | None = None
    ) -> None:
        """POST `body`; once an attempt may have arrived without our knowing it, POST `again()`.

        Raises:
            Refused: the platform does not want it.
            Undelivered: the platform was away for longer than `timeout` seconds.
        """
        loop = asyncio.get_running_loop()
        failing_since = None
        pause = 0.1
        while True:
            try:
                problem = await self._attempt(url.replace("$ID", job), job, body)
            except aiohttp.ClientConnectorError as error:
                problem = str(error)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                problem = str(error) or type(error).__name__
                body = again() if again else body
            if problem is None:
                self._works_again(failing_since, loop.time())
                return
            now = loop.time()
            failing_since = failing_since or now
            if now + pause > failing_since + self._timeout:
                raise Undelivered(
                    f"the platform took nothing for DELIVERY_TIMEOUT={self._timeout:g} seconds: "
                    f"{problem}"
                )
            if now - failing_since > 1 and not self._is_failing:
                self._is_failing = True
                log.warning("the platform takes no deliveries: %s; trying again", problem)
            await asyncio.sleep(pause * random.uniform(0.5, 1))
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _attempt(self, url: str, job: str, body: bytes) -> str | None:
        """None when it was taken, else why it has to be tried again."""
        headers = {"Content-Type": "application/x-www-form-urlencoded", "X-Request-ID": job}
        # aiohttp sends bytes in one go, and a file piece by piece.
        data = body if len(body) < LARGE else io.BytesIO(body)
        async with self._session.post(
            url, data=data, headers=headers, timeout=self._attempt_timeout
        ) as response:
            status = response.status
            if status < 400:
                await response.read()
                return None
            answer = (await response.text(errors="replace"))[:200]
        problem = f"status {status} {answer}".strip()
        if status < 500 and status not in TRY_AGAIN:
            raise Refused(problem)
        return problem

    def _works_again(self, since: float | None, now: float) -> None:
        if self._is_failing and since:
            self._is_failing = False
            log.info("the platform takes deliveries again, after %.1f s", now - since)


@dataclass(slots=True)
class Outbox:
    """What one job has to deliver.

    The result repeats all chunks, as the SDK's `return_aggregate_stream` does, so nothing is
    lost with a chunk that the platform refused.
    """

    delivery: Delivery
    job: str
    refused: int = 0
    _output: list[Any] = field(default_factory=list)
    _size: int = 0
    _sent: Counter[tuple[int, str]] = field(default_factory=Counter)

    async def send(self, chunk: Any) -> None:
        """Deliver a chunk, in pieces if it is too large for one.

        Raises:
            JobFailed: JSON can't hold it.
            Undelivered: the platform was away for too long.
        """
        try:
            whole = encoded({"output": chunk})
        except (TypeError, ValueError, RecursionError) as error:
            raise JobFailed(f"the handler yielded what JSON can't hold: {error}") from None
        self._keep(chunk, len(whole))
        if len(whole) <= CHUNK_LIMIT:
            await self._post(chunk, whole)
            return
        for piece in pieces(chunk) or [_too_large(len(whole))]:
            await self._post(piece, encoded({"output": piece}))

    async def finish(self, error: str | None, *, stop_pod: bool) -> str | None:
        """Deliver the job's end; returns the error that it was given, if any.

        Raises:
            Lost: the platform did not take it.
        """
        if error is None and self._size > RESULT_LIMIT:
            error = (
                f"the result has {self._size:,} bytes, and the platform takes {RESULT_LIMIT:,}; "
                "ask for less at once"
            )
        flags = {"stopPod": True} if stop_pod else {}
        result = {"output": self._output} if error is None else {"error": error}
        body = encoded(result | flags)
        url = self.delivery.result_url
        try:
            await self.delivery.post(url, self.job, body)
        except Undelivered as problem:
            raise Lost(str(problem)) from None
        except Refused as problem:
            sentence = f"the platform refused the job's result of {len(body):,} bytes: {problem}"
            try:
                await self.delivery.post(url, self.job, encoded({"error": sentence} | flags))
            except (Refused, Undelivered):
                raise Lost(sentence) from None
            raise Lost(f"{sentence}; the client was told") from None
        return error

    def _keep(self, chunk: Any, size: int) -> None:
        self._size += size
        if self._size > RESULT_LIMIT:
            self._output.clear()
        else:
            self._output.append(chunk)

    async def _post(self, piece: Any, body: bytes) -> None:
        again = None
        if isinstance(piece, dict) and isinstance(piece.get("text"), str):
            index = piece.get("index", 0)
            offsets = {}
            for name, offset in OFFSETS.items():
                if isinstance(piece.get(name), str | list):
                    offsets[offset] = self._sent[index, name]
                    self._sent[index, name] += len(piece[name])
            again = partial(encoded, {"output": piece | offsets})
        try:
            await self.delivery.post(self.delivery.chunk_url, self.job, body, again)
        except Refused as problem:
            self.refused += 1
            if self.refused == 1:
                log.warning("a chunk was refused: %s", problem, extra={"job": self.job})


def pieces(chunk: Any) -> list[Any]:
    """A chunk of text, or text of server-sent events, as several; [] if it can't be divided."""
    if isinstance(chunk, str):
        return _cut(chunk)
    if not (isinstance(chunk, dict) and isinstance(chunk.get("text"), str)):
        return []
    if len(encoded(chunk | {"text": ""})) > CHUNK_LIMIT - 12 * PIECE:
        return []
    whose = {"index": chunk["index"]} if "index" in chunk else {}
    *texts, last = _cut(chunk["text"])
    return [{"text": text} | whose for text in texts] + [chunk | {"text": last}]


def _cut(text: str) -> list[str]:
    """After an event where there is one, else anywhere."""
    parts = []
    begin = 0
    while begin < len(text):
        end = begin + PIECE
        if end < len(text) and (event := text.rfind("\n\n", begin, end)) >= 0:
            end = event + 2
        parts.append(text[begin:end])
        begin = end
    return parts


def _too_large(size: int) -> dict[str, str]:
    return {
        "error": f"this part has {size:,} bytes, and /stream passes on {CHUNK_LIMIT:,}; "
        "/status and /runsync give it whole"
    }
