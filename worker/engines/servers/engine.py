"""A server as an engine: requests go to it over HTTP, it is watched, and what ends it is told."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Any

import httpx
from httpx_sse import SSEError

from worker.asgi import App
from worker.engines.servers import questions
from worker.engines.servers.answers import answers
from worker.engines.servers.kind import ServerKind
from worker.engines.servers.proxy import Proxy
from worker.engines.servers.server import BackendGone, Server
from worker.engines.transport import StreamingASGITransport
from worker.engines.watchdog import Watchdog
from worker.errors import BadRequest, EngineDead, EngineError, EngineStartError
from worker.job import routes
from worker.job.types import Delta, Options, Request
from worker.settings import Settings

log = logging.getLogger(__name__)

GONE_TIMEOUT = 10.0
"""Seconds that the server at ENGINE_URL has to answer after it broke off an answer."""

RESTART_PAUSES = (1.0, 30.0)
"""Seconds between two starts of a server whose RPC backends are gone: the first, the longest."""


class ServerEngine:
    """See worker.engines.base.Engine."""

    def __init__(self, settings: Settings, kind: ServerKind) -> None:
        self.server = Server(kind, settings)
        self.slots = kind.slots
        self.batch = kind.slots
        self.phases: dict[str, float] = {}
        self._settings = settings
        self._backends = kind.backends
        self._watchdog = Watchdog(settings.stall_timeout, self._works)
        self._sound = asyncio.Event()
        self._sound.set()
        self._dead = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    @property
    def model_name(self) -> str:
        return self.server.model_name

    @property
    def max_model_len(self) -> int:
        return self.server.max_model_len

    def load(self) -> None:
        self.server.find_program()

    async def warm_up(self) -> None:
        self._app = Proxy(self)
        self.client = httpx.AsyncClient(
            transport=StreamingASGITransport(self._app), base_url="http://engine", timeout=None
        )
        try:
            await self._start_until_ready()
        except BaseException as error:
            if self.server.process and not isinstance(error, EngineStartError):
                log.warning("%s was not ready%s", self.server.name, self.server.last_lines())
            self.stop()
            raise
        self._keeper = asyncio.create_task(self._keep())
        self._keeper.add_done_callback(self._kept)

    @property
    def app(self) -> App:
        return self._app

    def describe(self) -> dict[str, Any]:
        paths = {
            path: {method.lower(): {"responses": {"200": {"description": "as OpenAI's"}}}}
            for path, method in routes.ALLOWED.items()
            if path in self.server.dialect.routes
        }
        title = self.server.name
        return {"openapi": "3.1.0", "info": {"title": title, "version": "1"}, "paths": paths}

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        with self.running(shows_tokens=True):
            async with aclosing(self._generate(request)) as deltas:
                async for delta in deltas:
                    yield delta

    async def available(self) -> None:
        await self._sound.wait()

    def room(self) -> int:
        return max(0, self.slots - self.unfinished())

    def unfinished(self) -> int:
        return self._watchdog.requests

    def is_dead(self) -> bool:
        return self._dead.is_set() or (self.server.has_ended() and not self._backends)

    async def died(self) -> None:
        await self._dead.wait()

    def stop(self) -> None:
        if self._keeper:
            self._keeper.cancel()
        if self.server.process:
            self.server.process.stop()
        self._dead.set()

    @contextmanager
    def running(self, *, shows_tokens: bool) -> Iterator[None]:
        """Around one request to the server: the watchdog looks while there are any.

        Raises:
            EngineDead: the engine is dead.
            EngineError: it is being restarted.
        """
        if self.is_dead():
            raise EngineDead("the engine is not running")
        if not self._is_sound():
            raise self._restart_error()
        with self._watchdog.running(shows_tokens=shows_tokens):
            yield

    def progressed(self) -> None:
        """A token has come."""
        self._watchdog.progressed()

    async def cause(self, error: httpx.HTTPError) -> EngineError:
        """What a broken connection to the server means."""
        if self.server.process:
            with suppress(TimeoutError):
                limit = 3 if self._is_sound() else 0
                await asyncio.wait_for(self.server.process.ended.wait(), limit)
        elif not isinstance(error, SSEError) and await self.server.probe(GONE_TIMEOUT) != 200:
            self._die("the server at ENGINE_URL is gone")
        if self.is_dead():
            return EngineDead("the engine died")
        if not self._is_sound():
            return self._restart_error()
        return EngineError(f"the engine broke off its answer: {error!r}")

    def _is_sound(self) -> bool:
        return self._sound.is_set() and not self.server.has_ended()

    async def _generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        server = self.server
        try:
            body = await questions.body(request, server)
            reading = answers(server.http, request, body, server.max_model_len, self.progressed)
            async with aclosing(reading) as deltas:
                async for delta in deltas:
                    yield delta
        except httpx.HTTPError as error:
            raise await self.cause(error) from error

    async def _start_until_ready(self) -> None:
        """Start the server; while RPC backends are missing, again and again."""
        pause, longest = RESTART_PAUSES
        while True:
            begin = time.monotonic()
            try:
                await self.server.start()
                self.phases["server"] = time.monotonic() - begin
                await self._generate_a_little()
            except BackendGone as error:
                assert self.server.process
                self.server.process.kill()
                log.warning(
                    "not all RPC backends of %s serve; again in %g s: %s",
                    ", ".join(self._backends),
                    pause,
                    error,
                )
                await asyncio.sleep(pause)
                pause = min(pause * 2, longest)
            else:
                return

    async def _generate_a_little(self) -> None:
        request = Request("Hello", None, True, Options(max_tokens=2))
        try:
            async with (
                asyncio.timeout(self._settings.stall_timeout),
                aclosing(self._generate(request)) as deltas,
            ):
                async for _ in deltas:
                    pass
        except (TimeoutError, EngineError) as error:
            raise (BackendGone if self._backends else EngineStartError)(
                f"{self.server.name} is up but generates nothing: {error or 'it is silent'}"
                + self.server.last_lines()
            ) from None
        except BadRequest as refused:
            log.info("no warm-up generation: %s", refused)

    async def _keep(self) -> None:
        """Watch the server until it is dead; with RPC backends, restart it."""
        while True:
            why = await self._failure()
            if not self._backends:
                self._die(why)
                return
            self._sound.clear()
            name, process = self.server.name, self.server.process
            log.error("%s: %s; it is restarted%s", name, why, self.server.last_lines())
            assert process
            process.kill()
            try:
                async with asyncio.timeout(self._settings.startup_timeout):
                    await self._start_until_ready()
            except TimeoutError:
                self._die("its RPC backends did not come back within STARTUP_TIMEOUT")
                return
            except EngineStartError as error:
                self._die(str(error))
                return
            log.info("%s is ready again", name)
            self._sound.set()

    async def _failure(self) -> str:
        """Return when the server has ended or stalled, and which of the two it is."""
        process = self.server.process
        stalled = asyncio.create_task(self._watchdog.stalled())
        ended = asyncio.create_task(process.ended.wait()) if process else None
        watched: list[asyncio.Task[Any]] = [stalled, *([ended] if ended else [])]
        try:
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in watched:
                task.cancel()
        if process and process.ended.is_set():
            return f"it ended with code {process.code}"
        return (
            f"it gave no token for STALL_TIMEOUT={self._settings.stall_timeout:g} seconds "
            f"while {self._watchdog.requests} requests ran"
        )

    def _kept(self, keeper: asyncio.Task[None]) -> None:
        if not keeper.cancelled() and (error := keeper.exception()):
            self._die(f"nobody watches it any more: {error!r}")

    async def _works(self, patience: float) -> bool:
        """Whether the model itself gets on within `patience` seconds, whatever /health says."""
        crowded = self._watchdog.requests >= self.slots and not self._watchdog.sees_tokens
        if self.server.dialect.steps is None and crowded:
            return True  # a probe would wait for whole answers; a job's own time-out ends them
        before = None
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while self._watchdog.requests:
                    now = await self.server.steps()
                    if now is not None and before is not None and now != before:
                        return True
                    before = now or before
                    await asyncio.sleep(min(1, patience / 4))
        return False

    def _die(self, why: str) -> None:
        if not self._dead.is_set():
            log.error("%s: %s%s", self.server.name, why, self.server.last_lines())
            self._dead.set()
            self._sound.clear()
            if self.server.process:
                self.server.process.kill()

    def _restart_error(self) -> EngineError:
        backends = ", ".join(self._backends)
        return EngineError(f"an RPC backend of {backends} failed; the engine is being restarted")
