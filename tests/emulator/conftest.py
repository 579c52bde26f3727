"""Starts emulators as processes, and endpoints in this one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import pytest_asyncio

from emulator.app import build_app
from emulator.client_api import ClientApi
from emulator.endpoint import Endpoint
from emulator.worker_api import WorkerApi

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def wait_until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """The condition's first true value; fails the test if there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not true within {seconds:g} s")
        time.sleep(0.02)
    return value


@dataclass
class Emulator:
    """A running `python -m emulator`, its output in two files."""

    process: subprocess.Popen[bytes]
    stdout: Path
    stderr: Path

    @property
    def out(self) -> str:
        return self.stdout.read_text()

    @property
    def err(self) -> str:
        return self.stderr.read_text()

    @property
    def url(self) -> str:
        """The endpoint's base URL, read from the first line."""

        def first_line() -> str | None:
            if self.process.poll() is not None:
                pytest.fail(f"the emulator ended with {self.process.returncode}: {self.err}")
            head, newline, _ = self.out.partition("\n")
            return head.removeprefix("listening on ") if newline else None

        return str(wait_until(first_line))

    def ready(self) -> "Emulator":
        wait_until(lambda: self.url and "ready: " in self.out)
        return self

    def call(self, method: str, path: str, body: Any = None, key: str = "any") -> Any:
        """The JSON answer of the client face, with its HTTP status if that is not 200."""
        headers = {"Authorization": f"Bearer {key}"}
        response = httpx.request(
            method, f"{self.url}/{path}", json=body, headers=headers, timeout=60, trust_env=False
        )
        answer = response.json()
        return answer if response.status_code == 200 else (response.status_code, answer)

    def runsync(self, **job_input: Any) -> Any:
        return self.call("POST", "runsync", {"input": job_input})

    def run(self, **job_input: Any) -> str:
        return str(self.call("POST", "run", {"input": job_input})["id"])

    def status(self, job_id: str) -> Any:
        return self.call("GET", f"status/{job_id}")

    def workers(self) -> list[dict[str, Any]]:
        root = self.url.partition("/v2/")[0]
        return list(httpx.get(f"{root}/emulator/workers", trust_env=False).json())

    def tree(self) -> list[psutil.Process]:
        """The emulator's process and all below it."""
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def stop(self, name: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(name)
        return self.process.wait(timeout=30)


@pytest.fixture(scope="session")
def eventually() -> Callable[..., Any]:
    return wait_until


@pytest.fixture(scope="session")
def raw_worker() -> list[str]:
    return [sys.executable, "-S", str(HERE / "raw_worker.py")]


@pytest.fixture(scope="session")
def echo_worker() -> list[str]:
    return [sys.executable, str(HERE / "echo_worker.py")]


def start(folder: Path, arguments: list[str], environment: dict[str, str] | None) -> Emulator:
    stdout, stderr = folder / "stdout", folder / "stderr"
    with stdout.open("wb") as out, stderr.open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "emulator", "--port", "0", *arguments],
            stdout=out,
            stderr=err,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
        )
    return Emulator(process, stdout, stderr)


@pytest.fixture
def start_emulator(tmp_path: Path) -> Iterator[Callable[..., Emulator]]:
    """`start_emulator(*arguments, environment=None)`: `python -m emulator --port 0 ...`."""
    started: list[Emulator] = []

    def factory(*arguments: str, environment: dict[str, str] | None = None) -> Emulator:
        folder = tmp_path / f"emulator{len(started)}"
        folder.mkdir()
        started.append(start(folder, list(arguments), environment))
        return started[-1]

    yield factory
    for emulator in started:
        emulator.process.kill()
        emulator.process.wait()


@pytest.fixture(scope="session")
def sdk_emulator(
    tmp_path_factory: pytest.TempPathFactory, echo_worker: list[str]
) -> Iterator[Emulator]:
    """An emulator with two workers on the real SDK."""
    folder = tmp_path_factory.mktemp("sdk")
    emulator = start(folder, ["--workers", "2", "--", *echo_worker], {"RUNPOD_LOG_LEVEL": "INFO"})
    try:
        wait_until(lambda: emulator.url and emulator.call("GET", "health")["workers"]["ready"] == 2)
        yield emulator
    finally:
        emulator.stop()


@pytest_asyncio.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.close()


@pytest_asyncio.fixture
async def http(endpoint: Endpoint) -> AsyncIterator[httpx.AsyncClient]:
    """Both HTTP faces of `endpoint`, with short polls; sends an API key."""
    app = build_app(
        endpoint,
        client=ClientApi(endpoint, stream_poll=0.2),
        worker=WorkerApi(endpoint, poll=0.2),
    )
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app),
        base_url="http://emulator/v2/local/",
        headers={"Authorization": "Bearer any"},
    ) as client:
        yield client
