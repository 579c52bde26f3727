"""The worker face: what the runpod SDK calls. Bodies are JSON whatever their content type."""

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from emulator.endpoint import Endpoint
from emulator.jobs import Job
from emulator.web import DRAINED, ENDPOINT_ID, MB, load, read_body, refuse, reply
from worker.asgi import unless_gone

CHUNK_BYTES, RESULT_BYTES = MB, 20 * MB
POLL = 60.0
"""Seconds that job-take and job-stop are held open; the SDK's own cap is 90."""
STOPPING_POLL = 0.5
"""The same for a worker that is being stopped, so that it neither waits nor spins."""

OK = {"status": "ok"}
IGNORED = {"status": "ignored"}


@dataclass(frozen=True, slots=True)
class WorkerApi:
    """The worker face of an endpoint. Any worker may connect: it is on loopback only."""

    endpoint: Endpoint
    poll: float = POLL

    def routes(self) -> list[Route]:
        prefix = f"/v2/{ENDPOINT_ID}"
        either = ["GET", "POST"]
        return [
            Route(f"{prefix}/job-stream/{{worker_id}}/{{job_id}}", self.job_stream, methods=either),
            Route(f"{prefix}/job-done/{{worker_id}}/{{job_id}}", self.job_done, methods=either),
            Route(f"{prefix}/job-take/{{worker_id}}", self.job_take),
            Route(f"{prefix}/job-take-batch/{{worker_id}}", self.job_take_batch),
            Route(f"{prefix}/job-stop/{{worker_id}}", self.job_stop),
            Route(f"{prefix}/ping/{{worker_id}}", self.ping),
        ]

    async def job_take(self, request: Request) -> Response:
        jobs = await self._take(request, 1)
        return reply(_for_worker(jobs[0])) if jobs else Response(status_code=204)

    async def job_take_batch(self, request: Request) -> Response:
        size = request.query_params.get("batch_size", "1")
        if not (size.isascii() and size.isdecimal() and int(size) > 0):
            refuse(400, f"batch_size is {size!r}: it must be a positive whole number")
        jobs = await self._take(request, int(size))
        return reply([_for_worker(job) for job in jobs]) if jobs else Response(status_code=204)

    async def job_stop(self, request: Request) -> Response:
        worker_id = request.path_params["worker_id"]
        worker = self.endpoint.worker(worker_id)
        await unless_gone(
            request.receive, worker.wait_for_stop_requests(self._poll_time(worker_id))
        )
        if jobs := self.endpoint.worker(worker_id).take_stop_requests():
            return reply({"jobsToStop": jobs})
        return Response(status_code=204)

    async def job_stream(self, request: Request) -> Response:
        body = await read_body(request, CHUNK_BYTES, "the stream chunk")
        try:
            chunk = load(body)
        except ValueError as error:
            refuse(400, f"the stream chunk is not JSON: {error}")
        if not isinstance(chunk, dict) or "output" not in chunk:
            refuse(400, 'the stream chunk has no "output"')
        path = request.path_params
        kept = self.endpoint.add_chunk(path["worker_id"], path["job_id"], body)
        return reply(OK if kept else IGNORED)

    async def job_done(self, request: Request) -> Response:
        path = request.path_params
        body = await read_body(request, DRAINED, "the job's result")
        try:
            result = _result(body)
        except ValueError as error:
            sentence = f"the worker's result was refused: {error}"
            self.endpoint.finish(path["worker_id"], path["job_id"], error=sentence, size=0)
            refuse(413 if len(body) > RESULT_BYTES else 400, sentence)
        if result.get("status") == "IN_PROGRESS":
            kept = self.endpoint.report_progress(
                path["worker_id"], path["job_id"], result.get("output")
            )
            return reply(OK if kept else IGNORED)
        kept = self.endpoint.finish(
            path["worker_id"],
            path["job_id"],
            output=result.get("output"),
            error=_error(result),
            size=len(body),
        )
        if result.get("stopPod") is True:
            self.endpoint.stop_pod(path["worker_id"])
        return reply(OK if kept else IGNORED)

    async def ping(self, request: Request) -> Response:
        worker_id = request.path_params["worker_id"]
        query = request.query_params
        self.endpoint.ping(worker_id, [id for id in query.get("job_id", "").split(",") if id])
        if query.get("status") == "unhealthy":
            check, reason = query.get("check", "unnamed"), query.get("reason", "no reason given")
            self.endpoint.report_unhealthy(worker_id, f"fitness check {check} failed: {reason}")
        return reply(OK)

    async def _take(self, request: Request, limit: int) -> list[Job]:
        worker_id = request.path_params["worker_id"]
        jobs = self.endpoint.take(worker_id, limit, self._poll_time(worker_id))
        return await unless_gone(request.receive, jobs, self.endpoint.give_back)

    def _poll_time(self, worker_id: str) -> float:
        worker = self.endpoint.workers.get(worker_id)
        return STOPPING_POLL if worker and worker.stopping else self.poll


def _for_worker(job: Job) -> dict[str, Any]:
    body = {"id": job.id, "input": job.input}
    if job.s3_config is not None:
        body["s3Config"] = job.s3_config
    return body


def _result(body: bytes) -> dict[str, Any]:
    """The result that a worker sent. Raises ValueError if it is none, or too large."""
    if len(body) > RESULT_BYTES:
        raise ValueError(f"it has {len(body)} bytes, and {RESULT_BYTES // MB} MB are allowed")
    result = load(body)
    if not isinstance(result, dict):
        raise ValueError("it is not a JSON object")
    return result


def _error(result: dict[str, Any]) -> str | None:
    """The error as text; the SDK sends none, a string, or now and then another type."""
    error = result.get("error")
    if error is None or isinstance(error, str):
        return error
    return str(error)
