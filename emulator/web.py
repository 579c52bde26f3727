"""What the HTTP faces share: JSON bodies and replies, errors, clients that hang up."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from emulator.jobs import Conflict, EndpointError, QueueFull, UnknownJob, UnknownWorker

ENDPOINT_ID = "local"
MB = 1024 * 1024
DRAINED = 100 * MB

ERROR_STATUS: dict[type[EndpointError], int] = {
    UnknownJob: 404,
    UnknownWorker: 404,
    Conflict: 409,
    QueueFull: 429,
}

T = TypeVar("T")
Handler = Callable[[Request], Awaitable[Response]]


def dump(value: Any) -> bytes:
    """Compact UTF-8 JSON; escaped to ASCII where a string holds a lone surrogate."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def load(body: bytes) -> Any:
    """Parse strict JSON (no NaN, UTF-8 only). Raises ValueError with a sentence."""
    try:
        return json.loads(body.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def reply(value: Any, status: int = 200) -> Response:
    return Response(dump(value), status, media_type="application/json")


def refuse(status: int, sentence: str) -> NoReturn:
    """End the request with this status and `{"error": sentence}`."""
    raise HTTPException(status, sentence)


async def read_body(request: Request, limit: int, name: str) -> bytes:
    """The body, at most `limit` bytes; a larger one is refused with 413.

    It is read to its end first (within reason), since many clients only look at the reply
    after they have sent everything.
    """
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
        elif size > DRAINED:
            break
    if size > limit:
        refuse(413, f"{name} is larger than {limit // MB} MB, the most that is allowed")
    return b"".join(chunks)


async def unless_hung_up(
    request: Request, work: Coroutine[Any, Any, T], undo: Callable[[T], object] | None = None
) -> T:
    """Await the work of a long poll, but cancel it when the client hangs up.

    `undo` gets the result of work that ended just as the client left. Raises ClientDisconnect.
    """
    task = asyncio.ensure_future(work)
    hung_up = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((task, hung_up), return_when=asyncio.FIRST_COMPLETED)
        if hung_up.done():
            if task.done() and undo:
                undo(task.result())
            raise ClientDisconnect
        return task.result()
    finally:
        for future in (task, hung_up):
            future.cancel()
        await asyncio.gather(task, hung_up, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def explain(request: Request, error: Exception) -> tuple[int, str]:
    """The HTTP status of what a face raised, and a sentence about it."""
    if not isinstance(error, HTTPException):
        found = (ERROR_STATUS[c] for c in type(error).__mro__ if c in ERROR_STATUS)
        return next(found, 500), str(error)
    sentence, path = error.detail, request.url.path
    if sentence == "Not Found":
        parts = path.split("/")
        sentence = f"{path} does not exist"
        if parts[1] == "v2" and len(parts) > 2 and parts[2] != ENDPOINT_ID:
            sentence = f"endpoint {parts[2]!r} does not exist: there is only {ENDPOINT_ID!r}"
    elif sentence == "Method Not Allowed":
        sentence = f"{request.method} is not allowed on {path}"
    return error.status_code, sentence


async def on_error(request: Request, error: Exception) -> Response:
    status, sentence = explain(request, error)
    return reply({"error": sentence}, status)


async def on_hung_up(_: Request, __: Exception) -> Response:
    return Response(status_code=499)
