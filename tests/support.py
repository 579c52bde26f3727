"""What several test modules need: a worker under the emulator, and a platform driven by hand."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from aiohttp import web

from worker.processes import find_program

ROOT = Path(__file__).parents[1]
MODEL = os.environ.get("TEST_MODEL", str(ROOT / "models" / "tiny"))
GGUF = ROOT / "models" / "tiny-gguf" / "tiny-f32.gguf"
LLAMA = ROOT / ".cache" / "llama.cpp"

START = 240.0
"""Seconds that a worker may take to become ready on a busy machine."""

TOKEN_BYTES = 6 * 2 * 2 * 64 * 2
"""KV cache of the bundled model: layers * (key, value) * heads * head size * bfloat16."""

AMPLE = "200"
"""A SHUTDOWN_TIMEOUT for jobs that shall end by themselves: 2,000 tokens can take half a minute."""

AUTH = {"Authorization": "Bearer test"}


def eventually(condition: Callable[[], Any], timeout: float, what: str) -> Any:
    """Wait until `condition` holds and return its value; fail with `what` after `timeout` s."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {timeout:g} s: {what}"
        time.sleep(0.02)
    return value


async def soon(condition: Callable[[], Any], timeout: float, what: str) -> Any:
    """`eventually` for the event loop."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {timeout:g} s: {what}"
        await asyncio.sleep(0.01)
    return value


def needs(program: str) -> pytest.MarkDecorator:
    """Skip where neither this machine nor `make setup` has that program of llama.cpp."""
    note = LLAMA / "skip"
    why = note.read_text(encoding="utf-8").strip() if note.is_file() else "run `make setup`"
    return pytest.mark.skipif(find_program(program) is None, reason=f"{program} is missing: {why}")


def left(family: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; one that has ended and waits to be reaped by init does not."""
    alive = []
    for member in family:
        with suppress(psutil.NoSuchProcess):
            if member.is_running() and member.status() != psutil.STATUS_ZOMBIE:
                alive.append(member)
    return alive


def worker_environment(**variables: str) -> dict[str, str]:
    """The environment of a worker in the tests: this one, without what Runpod would set."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RUNPOD_")}
    settings = {
        "MODE_TO_RUN": "serverless",
        "MODEL": MODEL,
        "RUNPOD_LOG_LEVEL": "WARN",
        "ENGINE_ARGS": json.dumps(
            {
                "kv_cache_memory_bytes": 256 << 20,
                "enable_auto_tool_choice": True,
                "tool_call_parser": "hermes",
                # The tiny model would fill a JSON answer with line breaks.
                "structured_outputs_config": {
                    "backend": "xgrammar",
                    "disable_any_whitespace": True,
                },
            }
        ),
        "PYTHONUNBUFFERED": "1",
    }
    return clean | settings | variables


WORKER = [sys.executable, "-m", "worker"]
PROBED_WORKER = [sys.executable, "-m", "tests.probed_worker"]


class Output:
    """The lines that a process writes, as they come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._read, args=(process,), daemon=True)
        self._thread.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        with process.stdout:
            for line in process.stdout:
                self.lines.append(line.rstrip("\n"))

    def find(self, text: str) -> str | None:
        """The first line that holds `text`."""
        return next((line for line in list(self.lines) if text in line), None)

    def text(self) -> str:
        return "\n".join(self.lines)


def start(command: list[str], environment: dict[str, str]) -> tuple[subprocess.Popen[str], Output]:
    """Start a process in the project's root, with both of its streams read together."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        process_group=0,
    )
    return process, Output(process)


def stop(process: subprocess.Popen[str], timeout: float = 30) -> int:
    """SIGTERM, and SIGKILL for all below it when that is not enough."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        for member in family:
            if member.is_running():
                member.kill()
        process.kill()
        return process.wait()


class Endpoint:
    """The emulator with its workers, and the calls of a client."""

    def __init__(self, process: subprocess.Popen[str], output: Output, url: str) -> None:
        self.process, self.output, self.url = process, output, url
        self.http = httpx.Client(base_url=url, headers=AUTH, timeout=120)

    def workers(self) -> list[dict[str, Any]]:
        return self.http.get(self.url.replace("/v2/local", "/emulator/workers")).json()

    def ready(self) -> bool:
        workers = self.http.get("/health").json()["workers"]
        return workers["idle"] + workers["running"] > 0

    def run(self, job_input: Any, **body: Any) -> str:
        answer = self.http.post("/run", json={"input": job_input, **body})
        answer.raise_for_status()
        return answer.json()["id"]

    def runsync(self, job_input: Any) -> dict[str, Any]:
        answer = self.http.post("/runsync", json={"input": job_input})
        answer.raise_for_status()
        return answer.json()

    def status(self, job: str) -> dict[str, Any]:
        return self.http.get(f"/status/{job}").json()

    def finished(self, job: str, timeout: float = 120) -> dict[str, Any]:
        """The job's status once it is final."""
        running = {"IN_QUEUE", "IN_PROGRESS"}

        def final() -> dict[str, Any] | None:
            status = self.status(job)
            return None if status["status"] in running else status

        return eventually(final, timeout, f"the end of job {job}")

    def stream(self, job: str) -> Iterator[Any]:
        """The outputs of a job as they come."""
        while True:
            answer = self.http.get(f"/stream/{job}").json()
            for chunk in answer["stream"]:
                yield chunk["output"]
            if answer["status"] not in {"IN_QUEUE", "IN_PROGRESS"}:
                return

    def text(self, job_input: dict[str, Any]) -> str:
        status = self.runsync(job_input)
        assert status["status"] == "COMPLETED", status
        return "".join(chunk["text"] for chunk in status["output"])

    def error(self, job_input: Any) -> str:
        status = self.runsync(job_input)
        assert status["status"] == "FAILED", status
        return status["error"]


@contextmanager
def endpoint(
    *, options: Sequence[str] = (), command: list[str] = WORKER, **variables: str
) -> Iterator[Endpoint]:
    """An emulator on a free port with real workers, ready to take jobs."""
    emulator = [sys.executable, "-m", "emulator", "--port", "0", *options, "--", *command]
    process, output = start(emulator, worker_environment(**variables))
    try:
        line = eventually(lambda: output.find("listening on "), 30, "the emulator's first line")
        served = Endpoint(process, output, line.split("listening on ")[1].strip())
        eventually(
            lambda: served.ready() or output.find("exited with code") or process.poll() is not None,
            START,
            "a worker that takes jobs",
        )
        assert served.ready(), output.text()
        try:
            yield served
        finally:
            served.http.close()
    finally:
        stop(process)
        print("\n".join(output.lines[-100:]))  # pytest shows it where a test failed


class Platform:
    """Runpod's worker side, driven by the test: it says when each call is answered."""

    def __init__(self) -> None:
        self.offers: asyncio.Queue[list[Any]] = asyncio.Queue()
        self.stops: asyncio.Queue[list[str]] = asyncio.Queue()
        self.chunks: dict[str, list[Any]] = {}
        self.done: dict[str, list[dict[str, Any]]] = {}
        self.polls = 0
        self.pings = 0
        self.batch_sizes: list[int] = []
        self.deliver = asyncio.Event()
        self.deliver.set()
        self.url = ""

    def environment(self) -> dict[str, str]:
        base = f"{self.url}/v2/ep"
        return {
            "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID",
            "RUNPOD_PING_INTERVAL": "1000",
            "RUNPOD_POD_ID": "w1",
            "RUNPOD_AI_API_KEY": "key",
        }

    async def give(self, *jobs: dict[str, Any]) -> None:
        await self.offers.put(list(jobs))

    async def answer(self, job: dict[str, Any], timeout: float = 120) -> dict[str, Any]:
        """Give one job and wait for its end."""
        await self.give(job)
        return await self.end_of(job["id"], timeout)

    async def end_of(self, job: str, timeout: float = 120) -> dict[str, Any]:
        return (await soon(lambda: self.done.get(job), timeout, f"the end of {job}"))[0]

    async def _take(self, request: web.Request) -> web.Response:
        self.polls += 1
        try:
            async with asyncio.timeout(20):
                jobs = await self.offers.get()
        except TimeoutError:
            return web.Response(status=204)
        finally:
            self.polls -= 1
        size = int(request.query.get("batch_size", 1))
        if later := jobs[size:]:
            self.offers.put_nowait(later)
        if "batch" not in request.path:
            return web.json_response(jobs[0])
        self.batch_sizes.append(size)
        return web.json_response(jobs[:size])

    async def _stop(self, request: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(20):
                return web.json_response({"jobsToStop": await self.stops.get()})
        except TimeoutError:
            return web.Response(status=204)

    async def _stream(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        self.chunks.setdefault(request.match_info["job"], []).append(body["output"])
        await self.deliver.wait()
        return web.Response()

    async def _done(self, request: web.Request) -> web.Response:
        body = json.loads(await request.read())
        self.done.setdefault(request.match_info["job"], []).append(body)
        return web.Response()

    async def _ping(self, request: web.Request) -> web.Response:
        self.pings += 1
        return web.Response()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/v2/ep/job-take/{worker}", self._take)
        app.router.add_get("/v2/ep/job-take-batch/{worker}", self._take)
        app.router.add_get("/v2/ep/job-stop/{worker}", self._stop)
        app.router.add_post("/v2/ep/job-stream/{worker}/{job}", self._stream)
        app.router.add_post("/v2/ep/job-done/{worker}/{job}", self._done)
        app.router.add_get("/v2/ep/ping/{worker}", self._ping)
        return app


@asynccontextmanager
async def platform() -> AsyncIterator[Platform]:
    """A platform on a free loopback port."""
    served = Platform()
    runner = web.AppRunner(served.app(), handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    served.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield served
    finally:
        await runner.cleanup()


class Probe:
    """What tests/probed_worker.py tells of the engine inside it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    async def unfinished(self) -> int:
        reader, writer = await asyncio.open_unix_connection(str(self.path))
        try:
            return int(await reader.read())
        finally:
            writer.close()
