"""The HTTP front: OpenAI's routes, llama.cpp's /completion, /ping and /metrics.

The engine's own app answers /v1/*; what stands before it is here: the key, the allow-list,
a bound on what may wait, and the state of the engine.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import socket
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, generate_latest
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from worker import engines
from worker.api import completion
from worker.engines.asgi import App, Message, Receive, Send
from worker.engines.base import Engine
from worker.errors import BadRequest, EngineError, EngineRefusal, SettingsError
from worker.job import routes
from worker.processes import stop_signals
from worker.settings import Settings

log = logging.getLogger(__name__)

REQUESTS = Counter("tripod_requests", "HTTP requests by route and status.", ["route", "status"])
IN_FLIGHT = Gauge("tripod_requests_in_flight", "Inference requests being answered.")
STATE = Gauge("tripod_engine_state", "1 for the state that holds.", ["state"])

OWN_ROUTES = {"/ping", "/metrics", "/completion", "/openapi.json"}

DEAD_ENGINE_GRACE = 5.0
"""Seconds that /ping still answers 503 before the process ends, so that a probe can see it."""


def serve(settings: Settings) -> int:
    """Serve until SIGTERM (returns 0), a failed start (1; settings: 2) or a dead engine (1)."""
    return asyncio.run(_serve(settings))


@dataclass
class Front:
    """The ASGI app before the engine's."""

    settings: Settings
    engine: Engine | None = None
    state: str = "starting"
    in_flight: set[asyncio.Task[Any]] = field(default_factory=set)

    def enter(self, state: str) -> None:
        """`starting` → `ready` → `draining` or `dead`."""
        self.state = state
        for name in ("starting", "ready", "draining", "dead"):
            STATE.labels(name).set(name == state)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"]
        known = path in routes.ALLOWED or path in OWN_ROUTES
        status = 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._route(path, scope, receive, counted)
        finally:
            REQUESTS.labels(path if known else "other", status).inc()

    async def _route(self, path: str, scope: Message, receive: Receive, send: Send) -> None:
        answer: App
        if path == "/ping":
            answer = self._ping()
        elif not self._is_authorized(scope):
            log.warning("%s %s refused: the key is wrong or missing", scope["method"], path)
            answer = _error(401, "the key in the Authorization header is wrong or missing")
        elif path == "/metrics":
            answer = Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
        elif path == "/openapi.json" and self.engine:
            answer = JSONResponse(self._description(self.engine))
        elif path == "/completion" and scope["method"] == "POST":
            answer = await self._admitted(self._completion)
        elif error := routes.refusal(path, scope["method"]):
            answer = JSONResponse({"error": error}, error["code"])
        elif self.engine and path == "/v1/models":
            answer = self.engine.app
        elif self.engine and path.startswith(routes.MODEL):
            answer = await _model(path.removeprefix(routes.MODEL), self.engine)
        else:
            answer = await self._admitted(self._engine_app)
        await answer(scope, receive, send)

    def _ping(self) -> Response:
        codes = {"starting": 204, "ready": 200}
        return Response(status_code=codes.get(self.state, 503))

    def _description(self, engine: Engine) -> dict[str, Any]:
        """The engine's own OpenAPI description, restricted to the routes that are served."""
        described = engine.describe()
        served = {
            path: {method.lower(): described["paths"][path][method.lower()]}
            for path, method in routes.ALLOWED.items()
            if path in described["paths"]
        }
        return described | {"paths": served}

    def _is_authorized(self, scope: Message) -> bool:
        if self.settings.api_key is None:
            return True
        key = self.settings.api_key.get_secret_value()
        given = Headers(scope=scope).get("authorization", "")
        return hmac.compare_digest(given.encode(), f"Bearer {key}".encode())

    async def _admitted(self, app: App) -> App:
        """`app`, or the reason why this request can't be taken now."""
        if self.engine is None or self.state != "ready":
            return _error(503, f"the engine is {self.state}", retry_after=5)
        most = 2 * self.engine.batch
        if len(self.in_flight) >= most:
            return _error(429, f"{most} requests are running or waiting already", retry_after=1)
        return app

    async def _engine_app(self, scope: Message, receive: Receive, send: Send) -> None:
        assert self.engine
        await self._tracked(self.engine.app, scope, receive, send)

    async def _completion(self, scope: Message, receive: Receive, send: Send) -> None:
        await self._tracked(self._llama_cpp, scope, receive, send)

    async def _tracked(self, app: App, scope: Message, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task
        self.in_flight.add(task)
        IN_FLIGHT.set(len(self.in_flight))
        try:
            await app(scope, receive, send)
        finally:
            self.in_flight.discard(task)
            IN_FLIGHT.set(len(self.in_flight))

    async def _llama_cpp(self, scope: Message, receive: Receive, send: Send) -> None:
        """POST /completion as llama.cpp's server answers it."""
        assert self.engine
        request = Request(scope, receive)
        response: Response
        try:
            body = json.loads(await request.body())
            asked = completion.parse(body)
            if asked.stream:
                first_of = completion.stream(asked, self.engine)
                first = await anext(first_of)
                response = StreamingResponse(
                    completion.events(first, first_of), media_type="text/event-stream"
                )
            else:
                response = JSONResponse(await _unless_gone(request, asked, self.engine))
        except ClientDisconnect:
            return
        except (BadRequest, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            response = _error(400, str(error) or "the body is nested too deep")
        except EngineError as error:
            response = _error(500, str(error))
        await response(scope, receive, send)


async def _unless_gone(request: Request, asked: completion.Asked, engine: Engine) -> dict[str, Any]:
    """The whole answer, given up as soon as the client is gone."""
    answer = asyncio.create_task(completion.whole(asked, engine))
    gone: asyncio.Task[Message] = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return await answer
    finally:
        for task in (answer, gone):
            task.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)


async def _model(name: str, engine: Engine) -> Response:
    try:
        return JSONResponse(await routes.model(name, engine))
    except EngineRefusal as refused:
        return JSONResponse({"error": refused.error}, refused.error["code"])


def _error(code: int, message: str, *, retry_after: int | None = None) -> JSONResponse:
    headers = {"Retry-After": str(retry_after)} if retry_after else None
    return JSONResponse({"error": routes.error_object(code, message)}, code, headers)


async def _serve(settings: Settings) -> int:
    front = Front(settings)
    front.enter("starting")
    stopped = stop_signals()
    servers = [_Server(front, listener) for listener in _listeners(settings)]
    serving = [asyncio.create_task(server.run()) for server in servers]
    code = await _run_engine(front, stopped)
    for server in servers:
        server.should_exit = True
    await asyncio.gather(*serving)
    if front.engine:
        front.engine.stop()
    return code


async def _run_engine(front: Front, stopped: asyncio.Event) -> int:
    """Start the engine and watch it until it dies or the process is told to stop."""
    started = await engines.start_unless(stopped, front.settings)
    if isinstance(started, int):
        return started
    front.engine = started
    front.enter("ready")
    stop = asyncio.create_task(stopped.wait())
    died = asyncio.create_task(front.engine.died())
    await asyncio.wait({died, stop}, return_when=asyncio.FIRST_COMPLETED)
    if died.done():
        front.enter("dead")
        log.error("the engine died; this worker ends")
        await asyncio.wait({stop}, timeout=DEAD_ENGINE_GRACE)
        return 1
    died.cancel()
    front.enter("draining")
    grace = front.settings.shutdown_timeout
    log.info("told to stop; %d requests are running", len(front.in_flight))
    if front.in_flight:
        _, late = await asyncio.wait(
            front.in_flight, timeout=grace - engines.delivery_reserve(grace)
        )
        for task in late:
            task.cancel()
    return 0


class _Server(uvicorn.Server):
    """uvicorn on one listener; signals are ours."""

    def __init__(self, front: Front, listener: socket.socket) -> None:
        super().__init__(
            uvicorn.Config(
                front,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=2,
                # Longer than clients and balancers keep one: who closes first loses no call.
                timeout_keep_alive=75,
            )
        )
        self._listener = listener

    async def run(self) -> None:  # type: ignore[override]
        await self._serve([self._listener])


def _listeners(settings: Settings) -> list[socket.socket]:
    """The sockets for PORT and, if it is another, PORT_HEALTH."""
    host = settings.host
    if settings.api_key is None and not settings.platform_auth:
        host = "127.0.0.1"
        log.warning(
            "API_KEY is not set: only this machine is served; set API_KEY, or "
            "PLATFORM_AUTH=true where the platform checks every request"
        )
    ports = dict.fromkeys([settings.port, settings.port_health or settings.port])
    return [_listen(host, port) for port in ports]


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sets TCP_NODELAY on what it accepts.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise SettingsError(
            [f"PORT={port}: {host}:{port} can't be bound: {error.strerror}"]
        ) from None
    listener.listen(1024)
    log.info("listening on http://%s:%d", host, port)
    return listener
