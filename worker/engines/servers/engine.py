"""Any OpenAI-compatible server as an engine: one that Tripod starts, or one at ENGINE_URL.

presets.py says how each server is started, dialects.py how it is asked.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx
from httpx_sse import SSEError

from worker.engines.asgi import App, StreamingASGITransport
from worker.engines.base import Delta
from worker.engines.limits import answer_tokens
from worker.engines.servers import dialects
from worker.engines.servers.answers import WRONG_KEY, answers
from worker.engines.servers.proxy import Proxy
from worker.engines.spawned import Spawned, find_program, free_port, is_taken
from worker.errors import BadRequest, EngineDead, EngineError, EngineStartError
from worker.job import routes
from worker.job.input import DEFAULT_MAX_TOKENS, Options, Request

if TYPE_CHECKING:
    from worker.engines.servers.dialects import Dialect
    from worker.engines.servers.presets import Preset
    from worker.settings import Settings

log = logging.getLogger(__name__)

PROBE_TIMEOUT = 2.0
"""Seconds that a server that starts has to answer one probe; some listen before they can."""

GONE_TIMEOUT = 10.0
"""Seconds that the server at ENGINE_URL has to answer after it broke off an answer."""

PORTS_TRIED = 5
"""Free ports that may turn out to be somebody else's before the start is given up."""

RESTART_PAUSES = (1.0, 30.0)
"""Seconds between two starts of a server whose RPC backends are gone: the first, the longest."""


class ServerEngine:
    """See worker.engines.base.Engine."""

    def __init__(self, settings: Settings, preset: Preset) -> None:
        self.max_model_len = preset.max_model_len
        self.slots = preset.slots
        self.batch = preset.slots
        self.model_name = preset.model_name
        self.phases: dict[str, float] = {}
        self.dialect: Dialect = preset.dialect or dialects.OPENAI
        self.name = preset.name
        self.models: dict[str, dict[str, Any]] = {}
        key = {"Authorization": f"Bearer {preset.key}"} if preset.key else {}
        self.http = httpx.AsyncClient(
            headers={"Accept-Encoding": "identity", **key},
            timeout=httpx.Timeout(None, connect=10),
            # Many servers close a connection that was idle for 5 s.
            limits=httpx.Limits(max_connections=None, keepalive_expiry=2),
        )
        self._settings = settings
        self._preset = preset
        self._program: str | None = None
        self._child: Spawned | None = None
        self._requests: dict[object, bool] = {}
        self._busy = asyncio.Event()
        self._progress = 0.0
        self._sound = asyncio.Event()
        self._sound.set()
        self._dead = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    def load(self) -> None:
        wanted = self._preset.program
        if wanted is None:
            return
        self._program = find_program(wanted)
        if self._program is None:
            raise EngineStartError(
                f"ENGINE={self.name}: the program {wanted} is not on PATH; install it, or take an "
                "image that holds it"
            )

    async def warm_up(self) -> None:
        self._app = Proxy(self)
        self.client = httpx.AsyncClient(
            transport=StreamingASGITransport(self._app), base_url="http://engine", timeout=None
        )
        try:
            await self._start_until_ready()
        except BaseException as error:
            if self._child and not isinstance(error, EngineStartError):
                log.warning("%s was not ready%s", self.name, self._last_lines())
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
            if path in self.dialect.routes
        }
        return {"openapi": "3.1.0", "info": {"title": self.name, "version": "1"}, "paths": paths}

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        with self.running(shows_tokens=True):
            async with aclosing(self._generate(request)) as deltas:
                async for delta in deltas:
                    yield delta

    async def available(self) -> None:
        await self._sound.wait()

    def unfinished(self) -> int:
        return len(self._requests)

    def is_dead(self) -> bool:
        return self._dead.is_set() or (self._has_ended() and not self._preset.backends)

    async def died(self) -> None:
        await self._dead.wait()

    def stop(self) -> None:
        if self._keeper:
            self._keeper.cancel()
        if self._child:
            self._child.stop()
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
        mark = object()
        if not self._requests:
            self.progressed()
        self._requests[mark] = shows_tokens
        self._busy.set()
        try:
            yield
        finally:
            del self._requests[mark]
            if not self._requests:
                self._busy.clear()

    def progressed(self) -> None:
        """A token has come."""
        self._progress = time.monotonic()

    async def cause(self, error: httpx.HTTPError) -> EngineError:
        """What a broken connection to the server means."""
        if self._child:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._child.ended.wait(), 3 if self._is_sound() else 0)
        elif not isinstance(error, SSEError) and await self._probe(GONE_TIMEOUT) != 200:
            self._die("the server at ENGINE_URL is gone")
        if self.is_dead():
            return EngineDead("the engine died")
        if not self._is_sound():
            return self._restart_error()
        return EngineError(f"the engine broke off its answer: {error!r}")

    def _has_ended(self) -> bool:
        return self._child is not None and self._child.ended.is_set()

    def _is_sound(self) -> bool:
        return self._sound.is_set() and not self._has_ended()

    async def _generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        try:
            body = await self._body(request)
            reading = answers(self.http, request, body, self.max_model_len, self.progressed)
            async with aclosing(reading) as deltas:
                async for delta in deltas:
                    yield delta
        except httpx.HTTPError as error:
            raise await self.cause(error) from error

    async def _body(self, request: Request) -> dict[str, Any]:
        body = dialects.fields(request, self.dialect, self.name)
        tokens = await self._count(request)
        if tokens is None:
            body["max_tokens"] = request.max_tokens or DEFAULT_MAX_TOKENS
        else:
            body["max_tokens"] = answer_tokens(request, tokens, self.max_model_len)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        body["model"] = self.models[self.model_name]["id"]
        if request.prompt is not None:
            return body | {"prompt": request.prompt}
        return body | {"messages": request.messages} | dict(self.dialect.added or {})

    async def _count(self, request: Request) -> int | None:
        """The prompt's tokens, or None where the server can't count them."""
        text = request.prompt
        if self.dialect.counts == "llama.cpp":
            if text is None:
                rendered = await self._asked("/apply-template", {"messages": request.messages})
                text = rendered["prompt"]
            body = {"content": text, "add_special": True, "parse_special": True}
            return len((await self._asked("/tokenize", body))["tokens"])
        if self.dialect.counts == "vllm":
            body = {"model": self.models[self.model_name]["id"]}
            body |= {"messages": request.messages} if text is None else {"prompt": text}
            return int((await self._asked("/tokenize", body))["count"])
        return None

    async def _asked(self, path: str, body: dict[str, Any]) -> Any:
        response = await self.http.post(path, json=body)
        if response.status_code in {401, 403}:
            raise EngineError(WRONG_KEY)
        if response.status_code != 200:
            message = routes.error_of(response)["message"]
            raise BadRequest(f"{'messages' if 'messages' in body else 'prompt'}: {message}")
        return response.json()

    async def _start_until_ready(self) -> None:
        """Start the server; while RPC backends are missing, again and again."""
        pause, longest = RESTART_PAUSES
        while True:
            try:
                await self._start()
                await self._generate_a_little()
            except _BackendGone as error:
                assert self._child
                self._child.kill()
                backends = ", ".join(self._preset.backends)
                log.warning(
                    "not all RPC backends of %s serve; again in %g s: %s", backends, pause, error
                )
                await asyncio.sleep(pause)
                pause = min(pause * 2, longest)
            else:
                return

    async def _start(self) -> None:
        begin = time.monotonic()
        for _ in range(PORTS_TRIED):
            url = self._settings.engine_url or ""
            if self._program:
                port = free_port()
                preset = self._preset
                command = preset.command(self._program, port)
                url = f"http://127.0.0.1:{port}"
                try:
                    self._child = Spawned(
                        self.name, command, preset.variables(), port, f"GET {preset.ready} "
                    )
                except OSError as error:
                    raise EngineStartError(f"{self._program} can't be run: {error}") from None
            self.http.base_url = httpx.URL(url)
            if await self._becomes_ready():
                break
            log.warning("port %d is somebody else's; %s gets another", port, self.name)
            assert self._child
            await asyncio.to_thread(self._child.stop)
        else:
            raise EngineStartError(f"{self.name}: {PORTS_TRIED} ports in turn were taken by others")
        if self._child:
            self._preset.report(list(self._child.lines))
        await self._ask_for_models()
        self.phases["server"] = time.monotonic() - begin

    async def _becomes_ready(self) -> bool:
        """Wait for the server; False when its port turns out to be another program's."""
        child = self._child
        used, since = 0.0, time.monotonic()
        pause = 0.05
        while True:
            if child and child.ended.is_set():
                if is_taken(child.port):
                    return False
                code = child.code or 0
                aborted = self._preset.backends and (code < 0 or code >= 128)
                raise (_BackendGone if aborted else EngineStartError)(
                    f"{self.name} ended with code {code} before it was ready" + self._last_lines()
                )
            status = await self._probe()
            if child and status is not None and not child.listens():
                if not child.ended.is_set():
                    return False
                continue
            if status == 200:
                return True
            if not child and status and 400 <= status < 500:
                raise EngineStartError(
                    WRONG_KEY
                    if status in {401, 403}
                    else f"ENGINE_URL: the server answers {status} to {self._preset.ready}"
                )
            if child and self._preset.backends:
                if (now_used := child.cpu_seconds()) > used + 0.01:
                    used, since = now_used, time.monotonic()
                if time.monotonic() - since > self._settings.stall_timeout:
                    raise _BackendGone(f"{self.name} hangs at its start")
            with suppress(TimeoutError):
                await asyncio.wait_for(child.ended.wait() if child else asyncio.sleep(1), pause)
            pause = min(pause * 1.2, 1)

    async def _probe(self, timeout: float = PROBE_TIMEOUT) -> int | None:
        """The status of one probe; None when nobody listens, 0 when there is no answer in time."""
        try:
            response = await self.http.get(self._preset.ready, timeout=timeout)
        except httpx.ConnectError:
            return None
        except httpx.TransportError:
            return 0
        return response.status_code

    async def _ask_for_models(self) -> None:
        """What the server calls its models, and how long a request may be there."""
        try:
            listed = (await self.http.get("/v1/models", timeout=30)).json()["data"]
            entries = {str(entry["id"]): dict(entry) for entry in listed}
            first = entries.get(self.model_name) or next(iter(entries.values()))
        except (httpx.HTTPError, ValueError, KeyError, TypeError, StopIteration) as error:
            raise EngineStartError(
                f"{self.name} does not list its models at /v1/models as OpenAI does: {error!r}"
            ) from None
        if self._preset.dialect is None:
            owner = str(first.get("owned_by"))
            self.dialect = dialects.BY_OWNER.get(owner, dialects.OPENAI)
            await self._see_what_is_passed_on()
            log.info("%s serves %s, owned by %s", self.name, ", ".join(entries), owner)
        if self._preset.program is None and not self._settings.served_model_name:
            self.model_name = str(first["id"])
            self.models = entries
        else:
            self.models = {self.model_name: first}
        limit = first.get("max_model_len") or (first.get("meta") or {}).get("n_ctx")
        if limit and int(limit) < self.max_model_len:
            self.max_model_len = int(limit)
            log.info("max_model_len is %d tokens, as the server says", self.max_model_len)

    async def _see_what_is_passed_on(self) -> None:
        """What stands before the server, a bento say, may pass on OpenAI's routes only."""
        if self.dialect.steps and await self._steps() is None:
            self.dialect = replace(self.dialect, steps=None)
        if self.dialect.counts and not await self._counts():
            log.info("%s has no /tokenize: prompts are not counted beforehand", self.name)
            self.dialect = replace(self.dialect, counts=None)

    async def _counts(self) -> bool:
        try:
            answer = await self.http.post("/tokenize", json={}, timeout=30)
        except httpx.HTTPError:
            return False
        return answer.status_code not in {404, 405}

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
            raise (_BackendGone if self._preset.backends else EngineStartError)(
                f"{self.name} is up but generates nothing: {error or 'it is silent'}"
                + self._last_lines()
            ) from None
        except BadRequest as refused:
            log.info("no warm-up generation: %s", refused)

    async def _keep(self) -> None:
        """Watch the server until it is dead; with RPC backends, restart it."""
        while True:
            stalled = asyncio.create_task(self._stalled())
            ended = asyncio.create_task(self._child.ended.wait()) if self._child else None
            watched: list[asyncio.Task[Any]] = [stalled, *([ended] if ended else [])]
            try:
                await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in watched:
                    task.cancel()
            if ended and ended.done() and not ended.cancelled():
                assert self._child
                why = f"it ended with code {self._child.code}"
            else:
                why = (
                    f"it gave no token for STALL_TIMEOUT={self._settings.stall_timeout:g} seconds "
                    f"while {len(self._requests)} requests ran"
                )
            if not self._preset.backends:
                self._die(why)
                return
            self._sound.clear()
            log.error("%s: %s; it is restarted%s", self.name, why, self._last_lines())
            assert self._child
            self._child.kill()
            try:
                async with asyncio.timeout(self._settings.startup_timeout):
                    await self._start_until_ready()
            except TimeoutError:
                self._die("its RPC backends did not come back within STARTUP_TIMEOUT")
                return
            except EngineStartError as error:
                self._die(str(error))
                return
            log.info("%s is ready again", self.name)
            self._sound.set()

    def _kept(self, keeper: asyncio.Task[None]) -> None:
        if not keeper.cancelled() and (error := keeper.exception()):
            self._die(f"nobody watches it any more: {error!r}")

    async def _stalled(self) -> None:
        """Return when requests run and no token has come for STALL_TIMEOUT seconds."""
        limit = self._settings.stall_timeout
        while True:
            await self._busy.wait()
            quiet = time.monotonic() - self._progress
            if quiet < limit / 4:
                await asyncio.sleep(limit / 4 - quiet)
            elif quiet >= limit:
                return
            elif await self._works(limit - quiet):
                self.progressed()

    async def _works(self, patience: float) -> bool:
        """Whether the model itself gets on within `patience` seconds, whatever /health says."""
        crowded = len(self._requests) >= self.slots and not any(self._requests.values())
        if self.dialect.steps is None and crowded:
            return True  # a probe would wait for whole answers; a job's own time-out ends them
        before = None
        with suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while self._requests:
                    now = await self._steps()
                    if now is not None and before is not None and now != before:
                        return True
                    before = now or before
                    await asyncio.sleep(min(1, patience / 4))
        return False

    async def _steps(self) -> object:
        """Something that changes with every step of the model; None where there is no answer."""
        try:
            if self.dialect.steps:
                lines = (await self.http.get("/metrics")).text.splitlines()
                return next((line for line in lines if line.startswith(self.dialect.steps)), None)
            model = self.models[self.model_name]["id"]
            body = {"model": model, "prompt": "Hello", "max_tokens": 1}
            answer = await self.http.post("/v1/completions", json=body)
        except httpx.HTTPError:
            return None
        return object() if answer.status_code < 500 else None

    def _die(self, why: str) -> None:
        if not self._dead.is_set():
            log.error("%s: %s%s", self.name, why, self._last_lines())
            self._dead.set()
            self._sound.clear()
            if self._child:
                self._child.kill()

    def _restart_error(self) -> EngineError:
        backends = ", ".join(self._preset.backends)
        return EngineError(f"an RPC backend of {backends} failed; the engine is being restarted")

    def _last_lines(self) -> str:
        return f"; its last lines:{self._child.last_lines()}" if self._child else ""


class _BackendGone(EngineStartError):
    """llama.cpp aborted or hung at its start, as it does when an RPC backend is not there."""
