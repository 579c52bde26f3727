"""The ASGI application: the faces of the endpoint and what the emulator tells of itself."""

from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from emulator.client_api import ClientApi
from emulator.endpoint import Endpoint
from emulator.faults import Fault, Faults, parse
from emulator.jobs import EndpointError
from emulator.misbehaviour import Connections, Misbehaviour
from emulator.openai_api import OpenAiApi
from emulator.web import load, on_error, on_hung_up, refuse, reply
from emulator.worker_api import WorkerApi


def build_app(
    endpoint: Endpoint,
    *,
    client: ClientApi | None = None,
    worker: WorkerApi | None = None,
    list_workers: Callable[[], list[dict[str, Any]]] | None = None,
    faults: Faults | None = None,
    connections: Connections | None = None,
) -> Starlette:
    """The application on one endpoint. `list_workers` is the body of /emulator/workers.

    Without the server's `connections` no fault can cut one.
    """
    faults = faults or Faults()
    client = client or ClientApi(endpoint)
    worker = worker or WorkerApi(endpoint)

    async def workers(_: Request) -> Response:
        if list_workers:
            return reply(list_workers())
        return reply([worker.as_dict() for worker in endpoint.workers.values()])

    async def jobs(_: Request) -> Response:
        return reply(
            [
                {"id": job.id, "status": job.status, "worker_id": job.worker_id, "bytes": job.size}
                for job in endpoint.store.jobs.values()
            ]
        )

    async def change_faults(request: Request) -> Response:
        if request.method == "POST":
            faults.add(await _read_fault(request))
        elif request.method == "DELETE":
            faults.clear()
        return reply(faults.describe())

    misbehaviour = Middleware(
        Misbehaviour,
        faults=faults,
        endpoint=endpoint,
        connections={} if connections is None else connections,
    )
    return Starlette(
        routes=[
            *worker.routes(),
            *client.routes(),
            *OpenAiApi(client).routes(),
            Route("/emulator/workers", workers),
            Route("/emulator/jobs", jobs),
            Route("/emulator/faults", change_faults, methods=["GET", "POST", "DELETE"]),
        ],
        middleware=[misbehaviour],
        exception_handlers={
            HTTPException: on_error,
            EndpointError: on_error,
            ClientDisconnect: on_hung_up,
        },
    )


async def _read_fault(request: Request) -> Fault:
    """The fault in a body `{"fault": "CALL:KIND..."}`; anything else is refused with 400."""
    try:
        body = load(await request.body())
        text = body.get("fault") if isinstance(body, dict) else None
        if not isinstance(text, str):
            refuse(400, 'the body has no "fault": send {"fault": "job-done:status=503"}')
        return parse(text)
    except ValueError as error:
        refuse(400, str(error))
