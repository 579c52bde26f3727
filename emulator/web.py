"""What the HTTP faces share: JSON bodies and replies, errors, clients that hang up."""

import json
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request
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
