"""The OpenAI face, /openai/v1/*: a request becomes a job, and its output OpenAI's answer.

The job's input is `{"openai_route", "openai_input"}`, where the input of a GET is null. The
worker says which routes there are. An error that it wants OpenAI's clients to see is a string,
all that the SDK carries: JSON of `{"message", "type", "param", "code"}`, whose code becomes the
HTTP status.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from emulator.client_api import RUNSYNC_BYTES, SHUTTING_DOWN, ClientApi
from emulator.endpoint import Endpoint
from emulator.jobs import EndpointError, Job, Status
from emulator.web import ENDPOINT_ID, dump, explain, load, read_body, refuse, reply
from worker.asgi import unless_gone

ALL_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
"""All are routed here, so that a refusal has OpenAI's body too."""
DONE = "data: [DONE]\n\n"
CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


@dataclass(frozen=True, slots=True)
class OpenAiApi:
    """The OpenAI face of the endpoint that `client` is the client face of."""

    client: ClientApi

    @property
    def endpoint(self) -> Endpoint:
        return self.client.endpoint

    def routes(self) -> list[Route]:
        path = "/v2/{endpoint_id}/openai/{path:path}"
        return [Route(path, self.answer, methods=ALL_METHODS)]

    async def answer(self, request: Request) -> Response:
        try:
            route = _route(request)
            self.client.admit(request)
            body = await read_body(request, RUNSYNC_BYTES, "the request's body")
            ask = _ask(body) if request.method == "POST" else None
            job_input = {"openai_route": route, "openai_input": ask}
            job = self.endpoint.submit(job_input, sync=True, size=len(body))
        except (HTTPException, EndpointError) as error:
            return Failure.saying(*explain(request, error)).reply()
        try:
            answer = self._stream if ask and ask.get("stream") else self._whole
            response = await unless_gone(request.receive, answer(job))
        except BaseException:
            self.endpoint.cancel(job)
            raise
        response.headers["x-request-id"] = job.id
        return response

    async def _whole(self, job: Job) -> Response:
        outputs: list[Any] = []
        while streamed := await self._next(job):
            outputs += streamed
        # A generator without return_aggregate_stream has no output but what it streamed.
        outputs = _as_list(job.output) or outputs
        if failure := _failure_of(job):
            return failure.reply()
        if len(outputs) != 1 or not isinstance(outputs[0], dict):
            sentence = f"the worker's answer is not one object but {dump(outputs)[:200]!r}"
            return Failure.saying(500, sentence).reply()
        failure = _failure_in(outputs[0])
        return failure.reply() if failure else reply(outputs[0])

    async def _stream(self, job: Job) -> Response:
        """A stream once there is a first chunk; until then an error has a status of its own."""
        outputs = await self._next(job)
        if not outputs:
            if failure := _failure_of(job):
                return failure.reply()
            outputs = _as_list(job.output)
        if not outputs:
            return Failure.saying(500, "the worker's answer is empty").reply()
        if failure := _failure_in(outputs[0]):
            self.endpoint.cancel(job)
            return failure.reply()
        return EventStream(self._events(job, outputs), lambda: self.endpoint.cancel(job))

    async def _events(self, job: Job, outputs: list[Any]) -> AsyncIterator[bytes]:
        """The outputs and all that follow, as they come; then how the job failed, if it did."""
        last: Any = None
        while outputs:
            for last in outputs:
                if failure := _failure_in(last):
                    self.endpoint.cancel(job)
                    yield _event(failure.body)
                    return
                yield _event(last)
            if isinstance(last, str) and last.rstrip().endswith(DONE.rstrip()):
                # OpenAI's clients hang up here, a moment before the worker reports the job's end.
                return
            outputs = await self._next(job)
        if failure := _failure_of(job):
            yield _event(failure.body)
        elif not isinstance(last, str):
            yield _event(DONE)

    async def _next(self, job: Job) -> list[Any]:
        """What was streamed since the last call, as soon as it is there; [] once that is all."""
        while not (chunks := self.endpoint.take_chunks(job)):
            if job.final or self.endpoint.closing:
                return []
            await self.endpoint.wait(job, _has_news, job.policy.ttl)
        return [load(chunk)["output"] for chunk in chunks]


class EventStream(StreamingResponse):
    """Server-sent events; `on_broken` is called if the client hangs up before their end."""

    def __init__(self, events: AsyncIterator[bytes], on_broken: Callable[[], None]) -> None:
        headers = {"cache-control": "no-cache"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self.on_broken = on_broken
        self.complete = False

    async def stream_response(self, send: Send) -> None:
        await super().stream_response(send)
        self.complete = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self.complete:
                self.on_broken()


@dataclass(frozen=True, slots=True)
class Failure:
    """OpenAI's error object with its HTTP status.

    OpenAI's clients send a request again after 408, 409, 429 and 5xx; not if this is `final`.
    """

    status: int
    error: dict[str, Any]
    final: bool = False

    @classmethod
    def saying(cls, status: int, sentence: str, *, final: bool = False) -> Failure:
        error = {
            "message": sentence,
            "type": "server_error" if status >= 500 else "invalid_request_error",
            "param": None,
            "code": CODES.get(status),
        }
        return cls(status, error, final)

    @classmethod
    def from_worker(cls, error: Any) -> Failure:
        """The worker's error: OpenAI's object as it is or as JSON, anything else as a message."""
        parsed = error
        if isinstance(error, str):
            with suppress(ValueError):
                parsed = load(error.encode())
        if isinstance(parsed, dict):
            parsed = parsed.get("error") or parsed
        if not isinstance(parsed, dict) or not isinstance(parsed.get("message"), str):
            return cls.saying(500, error if isinstance(error, str) else dump(error).decode())
        code = parsed.get("code")
        status = code if isinstance(code, int) and 400 <= code < 600 else 500
        return cls(status, cls.saying(status, "").error | {"code": code} | parsed)

    @property
    def body(self) -> dict[str, Any]:
        return {"error": self.error}

    def reply(self) -> Response:
        response = reply(self.body, self.status)
        if self.final:
            response.headers["x-should-retry"] = "false"
        return response


def _route(request: Request) -> str:
    """The path as the worker gets it, without the query."""
    route = f"/{request.path_params['path']}"
    if request.path_params["endpoint_id"] != ENDPOINT_ID or not route.startswith("/v1/"):
        refuse(404, "Not Found")
    if request.method not in ("GET", "POST"):
        refuse(405, "Method Not Allowed")
    return route


def _ask(body: bytes) -> dict[str, Any]:
    try:
        ask = load(body)
    except ValueError as error:
        refuse(400, f"the body is not JSON: {error}")
    if not isinstance(ask, dict):
        refuse(400, "the body is not a JSON object")
    if not isinstance(ask.get("stream"), bool | None):
        refuse(400, f"stream is {ask['stream']!r}: it must be true or false")
    return ask


def _has_news(job: Job) -> bool:
    return bool(job.chunks) or job.final


def _as_list(output: Any) -> list[Any]:
    if output is None:
        return []
    return output if isinstance(output, list) else [output]


def _event(output: Any) -> bytes:
    """Text as it is, for the worker wrote events; anything else as one event."""
    if isinstance(output, str):
        return output.encode(errors="replace")
    return b"data: %s\n\n" % dump(output)


def _failure_of(job: Job) -> Failure | None:
    """How the job failed; None if it did not."""
    match job.status:
        case Status.COMPLETED:
            return None
        case Status.FAILED:
            return Failure.from_worker(job.error)
        case Status.TIMED_OUT:
            return Failure.saying(504, str(job.error), final=True)
        case Status.CANCELLED:
            return Failure.saying(409, f"job {job.id} was cancelled", final=True)
        case _:
            return Failure.saying(503, SHUTTING_DOWN)


def _failure_in(output: Any) -> Failure | None:
    """The error that an output is; None for an answer.

    An object of the Responses API has an "error" too, null or not, and is an answer.
    """
    if not isinstance(output, dict) or output.get("object", "error") != "error":
        return None
    if "object" not in output and output.get("error") is None:
        return None
    return Failure.from_worker(output)
