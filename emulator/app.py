"""The ASGI application: the faces of the endpoint and what the emulator tells of itself."""

from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from emulator.client_api import ClientApi
from emulator.dispatch import Endpoint, Worker
from emulator.jobs import EndpointError
from emulator.openai_api import OpenAiApi
from emulator.web import on_error, on_hung_up, reply
from emulator.worker_api import WorkerApi


def build_app(
    endpoint: Endpoint,
    *,
    client: ClientApi | None = None,
    worker: WorkerApi | None = None,
    list_workers: Callable[[], list[dict[str, Any]]] | None = None,
) -> Starlette:
    """The application on one endpoint. `list_workers` is the body of /emulator/workers."""
    client = client or ClientApi(endpoint)
    worker = worker or WorkerApi(endpoint)

    async def workers(_: Request) -> Response:
        if list_workers:
            return reply(list_workers())
        return reply([describe(worker) for worker in endpoint.workers.values()])

    async def jobs(_: Request) -> Response:
        return reply(
            [
                {"id": job.id, "status": job.status, "worker_id": job.worker_id, "bytes": job.size}
                for job in endpoint.jobs.values()
            ]
        )

    return Starlette(
        routes=[
            *worker.routes(),
            *client.routes(),
            *OpenAiApi(client).routes(),
            Route("/emulator/workers", workers),
            Route("/emulator/jobs", jobs),
        ],
        exception_handlers={
            HTTPException: on_error,
            EndpointError: on_error,
            ClientDisconnect: on_hung_up,
        },
    )


def describe(worker: Worker) -> dict[str, Any]:
    """A worker as /emulator/workers shows it; the supervisor adds what it knows of its process."""
    return {
        "id": worker.id,
        "pid": None,
        "state": worker.state,
        "reason": worker.unhealthy,
        "jobs_in_progress": list(worker.in_progress),
        "started_at": None,
        "restarts": 0,
        "last_exit_code": None,
        "pings": worker.pings,
        "pinged_jobs": worker.pinged_jobs,
    }
