"""Runpod's worker side in a process of its own: hands out jobs at once and times what comes back.

Several workers may be attached, each under a name of its own. Every answer is held back for the
round trip that the run asks for, so a worker waits as it would for a distant platform; what a
worker sends is stamped when it arrives. Times are seconds since the jobs were handed out.
"""

import asyncio
import json
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

POLL = 60.0
"""Seconds that a poll without work is held open."""


@dataclass(slots=True)
class Timed:
    """What came back for one job."""

    bodies: list[tuple[float, bytes]] = field(default_factory=list)
    end: float | None = None
    error: str = ""


@dataclass(slots=True)
class Worker:
    """One attached worker and the run that it is busy with."""

    round_trip: float = 0.0
    begin: float = 0.0
    queue: deque[dict[str, Any]] = field(default_factory=deque)
    offered: asyncio.Event = field(default_factory=asyncio.Event)
    polls: int = 0
    jobs: dict[str, Timed] = field(default_factory=dict)
    left: int = 0
    finished: asyncio.Event = field(default_factory=asyncio.Event)


class TextOf:
    """The text in the chunks of one job, whatever shape the worker gives them.

    `finish_reason` is that of the last chunk that had one.
    """

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self._rest = ""

    def __call__(self, output: Any) -> str:
        """The text that this chunk adds: of `{"text"}`, or of OpenAI's server-sent events."""
        if isinstance(output, dict):
            self.finish_reason = output.get("finish_reason") or self.finish_reason
            return str(output.get("text", ""))
        *lines, self._rest = (self._rest + str(output)).split("\n")
        events = [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]
        choices = [choice for event in events for choice in json.loads(event)["choices"]]
        for choice in choices:
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        return "".join(choice["text"] for choice in choices)


def summary(job: Timed) -> dict[str, Any]:
    """`{"first", "last", "end", "chunks", "bytes", "text", "finish_reason", "error"}` of one job.

    `first` and `last` are when text arrived, `end` is when the job's end arrived, all three None
    where it never did; `bytes` counts the bodies of the streamed chunks.
    """
    text_of = TextOf()
    texts = [(when, text_of(json.loads(body)["output"])) for when, body in job.bodies]
    arrivals = [when for when, text in texts if text]
    return {
        "first": arrivals[0] if arrivals else None,
        "last": arrivals[-1] if arrivals else None,
        "end": job.end,
        "chunks": len(job.bodies),
        "bytes": sum(len(body) for _, body in job.bodies),
        "text": "".join(text for _, text in texts),
        "finish_reason": text_of.finish_reason,
        "error": job.error,
    }


class Endpoint:
    """Answers workers at /NAME/job-take/… and so on, and the benchmark at /NAME/run."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        _, name, call, *rest = request.path.split("/")
        worker = self.workers.setdefault(name, Worker())
        match call:
            case "job-stream" | "job-done":
                body = await request.read()
                self._record(worker, call, rest[-1], body)
            case "job-take" | "job-take-batch":
                return await self._take(worker, int(request.query.get("batch_size", 0)))
            case "job-stop":
                await asyncio.sleep(POLL)
                return web.Response(status=204)
            case "run":
                return await self._run(worker, json.loads(await request.read()))
            case "polls":
                return web.json_response(worker.polls)
        if worker.round_trip:
            await asyncio.sleep(worker.round_trip)
        return web.Response()

    def _record(self, worker: Worker, call: str, job_id: str, body: bytes) -> None:
        now = time.monotonic() - worker.begin
        job = worker.jobs.get(job_id)
        if job is None or job.end is not None:
            return
        if call == "job-stream":
            job.bodies.append((now, body))
            return
        job.end = now
        job.error = _error(body)
        worker.left -= 1
        if not worker.left:
            worker.finished.set()

    async def _take(self, worker: Worker, batch_size: int) -> web.Response:
        worker.polls += 1
        try:
            async with asyncio.timeout(POLL):
                await worker.offered.wait()
        except TimeoutError:
            return web.Response(status=204)
        finally:
            worker.polls -= 1
        jobs = [worker.queue.popleft() for _ in range(min(batch_size or 1, len(worker.queue)))]
        if not worker.queue:
            worker.offered.clear()
        if worker.round_trip:
            await asyncio.sleep(worker.round_trip)
        return web.json_response(jobs if batch_size else jobs[0])

    async def _run(self, worker: Worker, run: dict[str, Any]) -> web.Response:
        """Hand out `run["jobs"]` and answer when all have ended, or after `run["timeout"]` s."""
        worker.round_trip = run["round_trip"]
        worker.jobs = {job["id"]: Timed() for job in run["jobs"]}
        worker.left = len(worker.jobs)
        worker.finished.clear()
        worker.queue = deque(run["jobs"])
        worker.begin = time.monotonic() + worker.round_trip
        worker.offered.set()
        try:
            async with asyncio.timeout(run["timeout"]):
                await worker.finished.wait()
        except TimeoutError:
            worker.queue.clear()
            worker.offered.clear()
        return web.json_response([summary(job) for job in worker.jobs.values()])


def _error(body: bytes) -> str:
    """What a job failed with; empty when it did not."""
    done = json.loads(body)
    outputs = done.get("output") or []
    errors = [out["error"] for out in outputs if isinstance(out, dict) and "error" in out]
    return str(done.get("error") or (errors and errors[0]) or "")


async def main() -> None:
    """Serve on a free loopback port and print its address."""
    runner = web.ServerRunner(web.Server(Endpoint().answer, access_log=None))
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
