"""The ASGI app of an engine that is a server: it passes OpenAI's routes on to it, streaming."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, suppress
from typing import Any, Protocol

import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from worker.asgi import Message, Receive, Send, unless_gone
from worker.engines.servers.server import Server
from worker.errors import EngineError
from worker.job import routes


class Watched(Protocol):
    """A server whose requests are watched."""

    server: Server

    def running(self, *, shows_tokens: bool) -> AbstractContextManager[None]:
        """Around one request."""

    def progressed(self) -> None:
        """A token has come."""

    async def cause(self, error: httpx.HTTPError) -> EngineError:
        """What a broken connection means."""


class Proxy:
    """Pass a request on, without what the server must not see, and its answer back."""

    def __init__(self, engine: Watched) -> None:
        self._engine = engine

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        path = request.url.path
        if path == "/v1/models":
            await JSONResponse(self._models())(scope, receive, send)
            return
        try:
            body = self._body(path, await request.body())
        except ClientDisconnect:
            return
        if isinstance(body, JSONResponse):
            await body(scope, receive, send)
            return
        with suppress(ClientDisconnect):
            await unless_gone(receive, self._pass_on(path, body, scope, receive, send))

    def _models(self) -> dict[str, Any]:
        """The models by the names that clients use."""
        server = self._engine.server
        entries = [
            {
                "id": name,
                "object": "model",
                "created": entry.get("created", 0),
                "owned_by": entry.get("owned_by", server.name),
                "max_model_len": server.max_model_len,
            }
            for name, entry in server.models.items()
        ]
        return {"object": "list", "data": entries}

    def _body(self, path: str, raw: bytes) -> dict[str, Any] | JSONResponse:
        """What the server shall get, or the refusal of it."""
        server = self._engine.server
        if path not in server.dialect.routes:
            known = ", ".join(sorted(server.dialect.routes))
            return _error(404, f"the engine {server.name} has no route {path}; it has {known}")
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as error:
            return _error(400, f"the body is no JSON: {error}")
        if not isinstance(body, dict):
            return _error(400, "the body must be a JSON object")
        name = body.get("model") or server.model_name
        if not isinstance(name, str) or name not in server.models:
            known = ", ".join(server.models)
            return _error(404, f"model {name!a} is not served; there is {known}")
        kept = {key: value for key, value in body.items() if key not in server.dialect.strip}
        return kept | {"model": server.models[name]["id"]}

    async def _pass_on(
        self, path: str, body: dict[str, Any], scope: Message, receive: Receive, send: Send
    ) -> None:
        engine = self._engine
        began = False
        problem: EngineError
        try:
            with engine.running(shows_tokens=bool(body.get("stream"))):
                async with engine.server.http.stream("POST", path, json=body) as response:
                    if response.status_code >= 400:
                        await response.aread()
                        error = routes.error_of(response)
                        await JSONResponse({"error": error}, error["code"])(scope, receive, send)
                        return
                    kind = response.headers.get("content-type", "application/json").encode()
                    headers = [(b"content-type", kind)]
                    start = {"type": "http.response.start", "status": response.status_code}
                    began = True
                    await send(start | {"headers": headers})
                    async for part in response.aiter_raw():
                        if b"data:" in part:  # a comment only keeps the connection open
                            engine.progressed()
                        await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        except httpx.HTTPError as error:
            problem = await engine.cause(error)
        except EngineError as error:
            problem = error
        if began:
            event = {"error": routes.error_object(500, str(problem))}
            text = f"data: {json.dumps(event)}\n\n".encode()
            await send({"type": "http.response.body", "body": text, "more_body": False})
        else:
            await _error(503, str(problem))(scope, receive, send)


def _error(code: int, message: str) -> JSONResponse:
    return JSONResponse({"error": routes.error_object(code, message)}, code)
