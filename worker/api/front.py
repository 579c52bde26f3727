"""The HTTP front: OpenAI's routes, /predict, llama.cpp's /completion, /ping and /metrics.

The engine's own app answers /v1/*; what stands before it is here: the key, the allow-list,
a bound on what may wait, and the state of the engine.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, generate_latest
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from worker.api import completion
from worker.api.predict import Predict
from worker.asgi import App, Message, Receive, Send, unless_gone
from worker.engines.base import Engine
from worker.errors import BadRequest, EngineError, EngineRefusal
from worker.job import routes
from worker.loading import Handler
from worker.settings import Settings

log = logging.getLogger(__name__)

REQUESTS = Counter("tripod_requests", "HTTP requests by route and status.", ["route", "status"])
IN_FLIGHT = Gauge("tripod_requests_in_flight", "Inference requests being answered.")
STATE = Gauge("tripod_engine_state", "1 for the state that holds.", ["state"])

OWN_ROUTES = {"/ping", "/metrics", "/completion", "/predict", "/openapi.json"}


@dataclass
class Front:
    """The ASGI app before the engine's."""

    settings: Settings
    handler: Handler
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
            answer = self._admitted(lambda engine: self._llama_cpp)
        elif path == "/predict" and scope["method"] == "POST":
            answer = self._admitted(lambda engine: Predict(self.handler, engine))
        elif error := routes.refusal(path, scope["method"]):
            answer = JSONResponse({"error": error}, error["code"])
        elif self.engine and path == "/v1/models":
            answer = self.engine.app
        elif self.engine and path.startswith(routes.MODEL):
            answer = await _model(path.removeprefix(routes.MODEL), self.engine)
        else:
            answer = self._admitted(lambda engine: engine.app)
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

    def _admitted(self, app_of: Callable[[Engine], App]) -> App:
        """The engine's app, tracked, or the reason why this request can't be taken now."""
        if self.engine is None or self.state != "ready":
            return _error(503, f"the engine is {self.state}", retry_after=5)
        most = 2 * self.engine.batch
        if len(self.in_flight) >= most:
            return _error(429, f"{most} requests are running or waiting already", retry_after=1)
        return partial(self._tracked, app_of(self.engine))

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
                response = JSONResponse(
                    await unless_gone(receive, completion.whole(asked, self.engine))
                )
        except ClientDisconnect:
            return
        except (BadRequest, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            response = _error(400, str(error) or "the body is nested too deep")
        except EngineError as error:
            response = _error(500, str(error))
        await response(scope, receive, send)


async def _model(name: str, engine: Engine) -> Response:
    try:
        return JSONResponse(await routes.model(name, engine))
    except EngineRefusal as refused:
        return JSONResponse({"error": refused.error}, refused.error["code"])


def _error(code: int, message: str, *, retry_after: int | None = None) -> JSONResponse:
    headers = {"Retry-After": str(retry_after)} if retry_after else None
    return JSONResponse({"error": routes.error_object(code, message)}, code, headers)
