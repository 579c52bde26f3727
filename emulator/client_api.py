"""The client face: /run, /runsync, /status, /stream, /cancel, /retry, /purge-queue, /health."""

import hmac
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from emulator.endpoint import Endpoint
from emulator.jobs import Job, Policy, Status
from emulator.web import ENDPOINT_ID, MB, Handler, load, read_body, refuse, reply
from worker.asgi import unless_gone

SHUTTING_DOWN = "the emulator is shutting down"
RUN_BYTES, RUNSYNC_BYTES = 10 * MB, 20 * MB
WAIT_MS, DEFAULT_WAIT_MS = (1_000, 300_000), 90_000
WEEK_MS = 7 * 24 * 3600 * 1000
EXECUTION_TIMEOUT_MS, TTL_MS = (5_000, WEEK_MS), (10_000, WEEK_MS)
STREAM_POLL = 2.0
"""Seconds that /stream waits for a chunk; the SDK's client gives up after 10."""


@dataclass(frozen=True, slots=True)
class ClientApi:
    """The client face of an endpoint. Without `api_key` any key is accepted, but not none."""

    endpoint: Endpoint
    api_key: str | None = None
    stream_poll: float = STREAM_POLL

    def routes(self) -> list[Route]:
        either = ["GET", "POST"]
        return [
            self._route("/run", self.run, ["POST"]),
            self._route("/runsync", self.runsync, ["POST"]),
            self._route("/status/{job_id}", self.status, either),
            self._route("/stream/{job_id}", self.stream, either),
            self._route("/cancel/{job_id}", self.cancel, ["POST"]),
            self._route("/retry/{job_id}", self.retry, ["POST"]),
            self._route("/purge-queue", self.purge_queue, ["POST"]),
            self._route("/health", self.health, ["GET"]),
        ]

    async def run(self, request: Request) -> Response:
        job = self._submit(await read_body(request, RUN_BYTES, "the /run body"))
        return reply({"id": job.id, "status": job.status})

    async def runsync(self, request: Request) -> Response:
        wait = _milliseconds(
            "wait", _number(request.query_params.get("wait")), WAIT_MS, DEFAULT_WAIT_MS
        )
        body = await read_body(request, RUNSYNC_BYTES, "the /runsync body")
        job = self._submit(body, sync=True)
        await unless_gone(
            request.receive, self.endpoint.wait(job, lambda job: job.final, wait / 1000)
        )
        return reply(job.as_dict())

    async def status(self, request: Request) -> Response:
        return reply(self._job(request).as_dict())

    async def stream(self, request: Request) -> Response:
        job = self._job(request)

        def has_news(job: Job) -> bool:
            return bool(job.chunks) or job.final

        await request.body()
        await unless_gone(request.receive, self.endpoint.wait(job, has_news, self.stream_poll))
        chunks = b",".join(self.endpoint.take_chunks(job))
        body = b'{"status":"%s","stream":[%s]}' % (job.status.encode(), chunks)
        return Response(body, media_type="application/json")

    async def cancel(self, request: Request) -> Response:
        job = self._job(request)
        self.endpoint.cancel(job)
        return reply({"id": job.id, "status": job.status})

    async def retry(self, request: Request) -> Response:
        job = self._job(request)
        self.endpoint.retry(job)
        return reply({"id": job.id, "status": Status.IN_QUEUE})

    async def purge_queue(self, _: Request) -> Response:
        return reply({"removed": self.endpoint.purge(), "status": "completed"})

    async def health(self, _: Request) -> Response:
        return reply(self.endpoint.health())

    def _job(self, request: Request) -> Job:
        return self.endpoint.store.job(request.path_params["job_id"])

    def _submit(self, body: bytes, *, sync: bool = False) -> Job:
        try:
            request = load(body)
        except ValueError as error:
            refuse(400, f"the body is not JSON: {error}")
        if not isinstance(request, dict) or request.get("input") is None:
            refuse(400, 'the body has no "input": send {"input": {...}}')
        return self.endpoint.submit(
            request["input"],
            policy=_policy(request.get("policy")),
            sync=sync,
            webhook=_webhook(request.get("webhook")),
            s3_config=request.get("s3Config"),
            size=len(body),
        )

    def _route(self, path: str, handler: Handler, methods: list[str]) -> Route:
        async def authorized(request: Request) -> Response:
            self.admit(request)
            return await handler(request)

        return Route(f"/v2/{ENDPOINT_ID}{path}", authorized, methods=methods)

    def admit(self, request: Request) -> None:
        """Refuse a request without the right key, and any while the emulator shuts down."""
        key = request.headers.get("authorization", "").strip()
        scheme, _, token = key.partition(" ")
        if scheme.lower() == "bearer":
            key = token.strip()
        if not key:
            refuse(401, "the Authorization header is missing or empty: send 'Bearer <api key>'")
        if self.api_key and not hmac.compare_digest(key.encode(), self.api_key.encode()):
            refuse(401, "the Authorization header does not hold this endpoint's API key")
        if self.endpoint.closing:
            refuse(503, SHUTTING_DOWN)


def _number(text: str | None) -> Any:
    """An integer if the text is one, else the text itself, for the error to name."""
    return int(text) if text and text.isascii() and text.isdecimal() else text


def _milliseconds(name: str, value: Any, allowed: tuple[int, int], default: int) -> int:
    if value is None:
        return default
    low, high = allowed
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        refuse(400, f"{name} is {value!r}: it must be {low} to {high} (milliseconds)")
    return value


def _policy(value: Any) -> Policy:
    if value is None:
        return Policy()
    if not isinstance(value, dict):
        refuse(400, f"policy is {value!r}: it must be an object")
    default = Policy()
    run = _milliseconds(
        "policy.executionTimeout",
        value.get("executionTimeout"),
        EXECUTION_TIMEOUT_MS,
        round(default.execution_timeout * 1000),
    )
    ttl = _milliseconds("policy.ttl", value.get("ttl"), TTL_MS, round(default.ttl * 1000))
    return Policy(run / 1000, ttl / 1000)


def _webhook(value: Any) -> str | None:
    if value is None or value == "":
        return None
    try:
        url = urlsplit(value if isinstance(value, str) else "")
    except ValueError:
        url = urlsplit("")
    if url.scheme not in ("http", "https") or not url.hostname:
        refuse(400, f"webhook is {value!r}: it must be an http or https URL")
    return str(value)
