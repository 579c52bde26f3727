"""What a fault does to a call on the wire: the ASGI middleware, and the connections it cuts."""

import asyncio
import json
import uuid
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from emulator.endpoint import Endpoint
from emulator.faults import CALLS, CLIENT_CALLS, WORKER_CALLS, Fault, Faults
from emulator.jobs import Job
from emulator.web import ENDPOINT_ID, dump

Address = tuple[str, int]
Connections = MutableMapping[Address, asyncio.Transport]
"""The open connections, by the client's address."""


def watched_protocol(connections: Connections) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, which also lists its connections, so that they can be cut."""

    class Watched(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        def connection_made(self, transport: asyncio.Transport) -> None:
            self.peer = transport.get_extra_info("peername")[:2]
            connections[self.peer] = transport
            super().connection_made(transport)

        def connection_lost(self, exc: Exception | None) -> None:
            connections.pop(self.peer, None)
            super().connection_lost(exc)

    return Watched


def call_of(path: str) -> str | None:
    """The name of the call to this path, as faults have it; None for the emulator's own."""
    prefix, _, rest = path.partition(f"/v2/{ENDPOINT_ID}/")
    name = "" if prefix else rest.split("/")[0]
    name = "job-take" if name == "job-take-batch" else name
    return name if name in WORKER_CALLS or name in CLIENT_CALLS else None


@dataclass(slots=True)
class Answer:
    """An answer that is kept back while it is decided what becomes of it."""

    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""

    async def keep(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], list(message["headers"])
        else:
            self.body += message.get("body", b"")

    async def send(self, send: Send, *, half: bool = False) -> None:
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        body = self.body[: len(self.body) // 2] if half else self.body
        await send({"type": "http.response.body", "body": body, "more_body": half})


def json_answer(value: Any, status: int = 200) -> Answer:
    body = dump(value)
    length = str(len(body)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", length)]
    return Answer(status, headers, body)


class Misbehaviour:
    """Lets the faults in force strike the calls to the app."""

    def __init__(
        self, app: ASGIApp, faults: Faults, endpoint: Endpoint, connections: Connections
    ) -> None:
        self.app, self.faults, self.endpoint = app, faults, endpoint
        self.connections = connections
        self._under_way: dict[Address, str] = {}
        self._again: dict[str, list[dict[str, Any]]] = {}
        faults.on_begin, faults.on_end = self._begin, self._renew_polls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = call_of(scope["path"]) if scope["type"] == "http" else None
        if call is None:
            await self.app(scope, receive, send)
            return
        peer = _peer(scope)
        self._under_way[peer] = call
        try:
            if call == "job-take" and (again := self._handed_out_again(scope)):
                await again.send(send)
            elif faults := self.faults.strike(call):
                await self._strike(call, faults, scope, receive, send)
            else:
                await self.app(scope, receive, send)
        finally:
            self._under_way.pop(peer, None)

    async def _strike(
        self, call: str, faults: list[Fault], scope: Scope, receive: Receive, send: Send
    ) -> None:
        """One call with all the faults that strike it; of one kind twice, the first counts."""
        wire = self.connections.get(_peer(scope))
        kinds = {fault.kind: fault.value for fault in reversed(faults)}
        one_way = float(kinds.get("latency") or 0) / 2
        await asyncio.sleep(one_way)
        if "outage" in kinds or kinds.get("drop") == "before":
            await _cut(wire, receive)
            return
        if "status" in kinds:
            await _read_to_the_end(receive)
            answer = json_answer({"error": "a fault on purpose"}, int(kinds["status"] or 0))
        elif "stop-signal" in kinds and call == "job-stop":
            answer = json_answer({"jobsToStop": [f"never-was-{uuid.uuid4()}"]})
        elif kinds.keys() == {"latency"} and call == "openai":  # a stream is not kept back
            await asyncio.sleep(one_way)
            await self.app(scope, receive, send)
            return
        else:
            answer = Answer()
            await self.app(scope, receive, answer.keep)
        await asyncio.sleep(one_way)
        if "stop-signal" in kinds:
            self._stop(call, scope, answer)
        if not (wire and wire.is_closing()):
            if not kinds.keys() & {"drop", "half"}:
                await answer.send(send)
                if "duplicate" in kinds:
                    self._hand_out_again(scope, answer, other=kinds["duplicate"] == "other")
                return
            if "half" in kinds and answer.body:
                await answer.send(send, half=True)
            await _cut(wire, receive)
        if call == "job-take":  # the platform sees that its answer did not arrive
            self.endpoint.give_back(self._jobs(answer))

    def _begin(self, fault: Fault) -> None:
        """The clock jumps; an outage cuts what is under way; others strike open polls as well."""
        if fault.kind == "clock":
            self.endpoint.jump_clock(float(fault.value or 0))
        elif fault.kind == "outage":
            for peer, call in self._under_way.items():
                if call in CALLS[fault.call] and peer in self.connections:
                    self.connections[peer].abort()
        else:
            self._renew_polls(fault)

    def _renew_polls(self, fault: Fault) -> None:
        """Answer open long polls, since it was at their beginning that a fault struck or not."""
        for worker_id, worker in self.endpoint.workers.items():
            if "job-take" in CALLS[fault.call]:
                self.endpoint.queue.answer(worker_id)
            if "job-stop" in CALLS[fault.call]:
                worker.wake_stop_polls()

    def _stop(self, call: str, scope: Scope, answer: Answer) -> None:
        """A stop signal at a bad moment: a job just handed out, or one that has just ended."""
        if call == "job-take":
            for job in self._jobs(answer):
                self.endpoint.cancel(job)
        elif call == "job-done":
            worker_id, job_id = scope["path"].split("/")[-2:]
            if self.endpoint.store.job(job_id).final:
                self.endpoint.ask_to_stop(worker_id, job_id)

    def _jobs(self, answer: Answer) -> list[Job]:
        """The jobs that an answer to job-take hands out."""
        found = (self.endpoint.store.jobs.get(job["id"]) for job in _job_bodies(answer))
        return [job for job in found if job]

    def _hand_out_again(self, scope: Scope, answer: Answer, *, other: bool) -> None:
        """Let the next job-take of this worker, or of another one, get the same jobs."""
        worker_id = _worker_of(scope)
        if other:
            others = [w.id for w in self.endpoint.workers.values() if w.ready and not w.draining]
            worker_id = next((id for id in others if id != worker_id), "")
        if worker_id and (jobs := _job_bodies(answer)):
            self._again.setdefault(worker_id, []).extend(jobs)
            self.endpoint.queue.answer(worker_id)

    def _handed_out_again(self, scope: Scope) -> Answer | None:
        """The answer to this job-take if there is something to hand out a second time."""
        if not (jobs := self._again.pop(_worker_of(scope), None)):
            return None
        if "/job-take-batch/" not in scope["path"]:
            job, *rest = jobs
            if rest:
                self._again[_worker_of(scope)] = rest
            return json_answer(job)
        return json_answer(jobs)


def _peer(scope: Scope) -> Address:
    host, port = scope.get("client") or ("", 0)
    return host, port


def _worker_of(scope: Scope) -> str:
    return str(scope["path"].rpartition("/")[2])


def _job_bodies(answer: Answer) -> list[dict[str, Any]]:
    """What an answer to job-take holds: nothing, one job or several."""
    if answer.status != 200:
        return []
    body = json.loads(answer.body)
    return body if isinstance(body, list) else [body]


async def _read_to_the_end(receive: Receive) -> None:
    while (await receive()).get("more_body"):
        pass


async def _cut(wire: asyncio.Transport | None, receive: Receive) -> None:
    """Close the connection once what was sent is out; nothing more of an answer follows."""
    if wire is None:
        raise RuntimeError("there is no connection to cut: only the emulator's own server has them")
    wire.close()
    while (await receive())["type"] != "http.disconnect":
        pass
