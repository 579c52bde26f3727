"""POST /predict: the body is a job's input, the answer what the handler yields."""

from __future__ import annotations

import json
import logging
import uuid
from contextlib import aclosing
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from worker.asgi import Message, Receive, Send, unless_gone
from worker.engines.base import Engine
from worker.errors import BadRequest, EngineRefusal, TripodError, raised_by_handler
from worker.job.chunks import encoded
from worker.job.routes import error_object
from worker.loading import Handler

log = logging.getLogger(__name__)

EVENTS = b"text/event-stream"


class Predict:
    """The ASGI app: a JSON list of all chunks, or an event each where the client accepts those."""

    def __init__(self, handler: Handler, engine: Engine) -> None:
        self._handler = handler
        self._engine = engine

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            body = await request.body()
            job = {"id": uuid.uuid4().hex, "input": json.loads(body)}
        except ClientDisconnect:
            return
        except (ValueError, RecursionError) as error:
            problem = error_object(400, f"the body is no JSON: {error}")
            await _refusal(problem)(scope, receive, send)
            return
        accepted = request.headers.get("accept", "").encode()
        response: Response | None
        try:
            if EVENTS in accepted:
                response = await unless_gone(receive, self._stream(job, send))
            else:
                response = await unless_gone(receive, self._whole(job))
        except ClientDisconnect:
            return
        if response:
            await response(scope, receive, send)

    async def _whole(self, job: dict[str, Any]) -> Response:
        try:
            async with aclosing(self._handler.answer(job, self._engine)) as chunks:
                body = encoded([chunk async for chunk in chunks])
        except Exception as error:  # noqa: BLE001 - whatever a handler raises fails this call alone
            return _refusal(_error_of(error))
        return Response(body, media_type="application/json")

    async def _stream(self, job: dict[str, Any], send: Send) -> Response | None:
        """An event a chunk; what goes wrong before the first is a response of its own."""
        began = False
        try:
            async with aclosing(self._handler.answer(job, self._engine)) as chunks:
                async for chunk in chunks:
                    event = _event(chunk)
                    if not began:
                        began = True
                        await send(_start())
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:  # noqa: BLE001 - as above
            problem = _error_of(error)
            if not began:
                return _refusal(problem)
            event = _event({"error": problem})
            await send({"type": "http.response.body", "body": event, "more_body": True})
        if not began:
            await send(_start())
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return None


def _start() -> Message:
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", EVENTS)]}


def _event(chunk: Any) -> bytes:
    return b"data: " + encoded(chunk) + b"\n\n"


def _error_of(error: Exception) -> dict[str, Any]:
    if isinstance(error, EngineRefusal):
        return error.error
    if isinstance(error, TripodError):
        return error_object(400 if isinstance(error, BadRequest) else 500, str(error))
    log.error("the handler raised", exc_info=error)
    return error_object(500, raised_by_handler(error))


def _refusal(error: dict[str, Any]) -> JSONResponse:
    return JSONResponse({"error": error}, error["code"])
