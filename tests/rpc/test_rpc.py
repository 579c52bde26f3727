"""A GGUF shared over two RPC backends: real workers, real llama.cpp, all on loopback."""

import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

from tests.support import (
    GGUF,
    ROOT,
    WORKER,
    Endpoint,
    endpoint,
    eventually,
    left,
    needs,
    start,
    stop,
    worker_environment,
)
from worker.engines.servers.process import free_port

pytestmark = [pytest.mark.engine, needs("llama-server"), needs("ggml-rpc-server")]

PROMPTS = ["import os\n\ndef ", "The list of directories that", "class Stack:\n    def "]
GREEDY: dict[str, Any] = {"max_tokens": 64, "temperature": 0}
LONG: dict[str, Any] = {
    "prompt": PROMPTS[0],
    "answerType": "stream",
    "options": {"max_tokens": 1900, "temperature": 0, "ignore_eos": True},
}
STALL = 5
"""STALL_TIMEOUT, in seconds."""


class Backend:
    """A worker in rpc mode, and the ggml-rpc-server below it."""

    def __init__(self, port: int | None = None) -> None:
        self.port = port or free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        environment = worker_environment(MODE_TO_RUN="rpc", RPC_PORT=str(self.port))
        self.process, self.output = start(WORKER, environment)
        eventually(
            lambda: self.output.find("serves llama.cpp's RPC") or self.process.poll() is not None,
            60,
            "a backend that listens",
        )
        assert self.process.poll() is None, self.output.text()
        (self.server,) = psutil.Process(self.process.pid).children()


@pytest.fixture
def backend() -> Iterator[Backend]:
    alone = Backend()
    yield alone
    stop(alone.process)


def test_it_tells_what_it_lends_and_ends_with_sigterm(backend: Backend) -> None:
    assert re.search(r"lends CPU: .+ \(\d+ MiB, \d+ MiB free\)", backend.output.text())
    assert backend.output.find(f"RPC on {backend.address} with ")
    warning = backend.output.find("private networks only")
    assert warning
    assert "knows no key and no encryption" in warning
    family = [backend.server]
    assert stop(backend.process) == 0
    eventually(lambda: not left(family), 5, "no process left")


def test_only_loopback_is_bound_unless_told_otherwise(backend: Backend) -> None:
    listening = [c.laddr for c in backend.server.net_connections("tcp") if c.status == "LISTEN"]
    assert [tuple(address) for address in listening] == [("127.0.0.1", backend.port)]


def test_a_dead_server_ends_the_worker(backend: Backend) -> None:
    backend.server.kill()
    assert backend.process.wait(10) == 1
    assert backend.output.find("ggml-rpc-server ended with code -9")


def test_a_taken_port_is_said_in_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environment = worker_environment(MODE_TO_RUN="rpc", RPC_PORT=str(port))
        ran = subprocess.run(WORKER, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 2
    said = f"RPC_HOST=127.0.0.1, RPC_PORT={port}: can't be bound: Address already in use\n"
    assert (ran.stdout, ran.stderr) == ("", said)


@contextmanager
def main(*backends: Backend) -> Iterator[Endpoint]:
    """An endpoint whose worker shares the bundled GGUF over those backends."""
    with endpoint(
        MODEL=str(GGUF),
        ENGINE_ARGS="",
        CONCURRENCY_MODIFIER="4",
        MAX_MODEL_LEN="2048",
        STALL_TIMEOUT=str(STALL),
        RPC_BACKENDS=",".join(one.address for one in backends),
    ) as served:
        yield served


def texts(served: Endpoint) -> list[str]:
    return [served.text({"prompt": prompt, "options": GREEDY}) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Backend]]:
    both = [Backend(), Backend()]
    yield both
    for one in both:
        stop(one.process)


@pytest.fixture(scope="module")
def before(pair: list[Backend]) -> list[int]:
    """Bytes of memory that each backend had when nobody used it."""
    return [one.server.memory_info().rss for one in pair]


@pytest.fixture(scope="module")
def shared(pair: list[Backend], before: list[int]) -> Iterator[Endpoint]:
    with main(*pair) as served:
        yield served


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """What llama.cpp says on this machine alone."""
    with main() as served:
        return texts(served)


def test_the_text_is_that_of_one_machine(shared: Endpoint, expected: list[str]) -> None:
    assert texts(shared) == expected


def test_each_backend_holds_its_share(
    shared: Endpoint, pair: list[Backend], before: list[int]
) -> None:
    line = shared.output.find("the weights lie in: ")
    assert line
    share = {name: float(size) for name, size in re.findall(r"\[(\S+)\] ([\d.]+) MiB", line)}
    assert share.keys() == {one.address for one in pair}
    assert sum(share.values()) > 0.75 * GGUF.stat().st_size / 2**20
    for one, empty in zip(pair, before, strict=True):
        grown = one.server.memory_info().rss - empty
        assert grown >= share[one.address] * 2**20 * 0.95


def answer_after_recovery(served: Endpoint) -> str:
    """While llama-server is being started again jobs fail, and are answered afterwards."""

    def answer() -> list[dict[str, Any]] | None:
        status = served.runsync({"prompt": PROMPTS[0], "options": GREEDY})
        return status["output"] if status["status"] == "COMPLETED" else None

    [chunk] = eventually(answer, 60, "a job that is answered")
    return chunk["text"]


def running_job(served: Endpoint) -> str:
    job = served.run(LONG)
    next(served.stream(job))
    return job


def test_a_killed_backend_fails_the_job_and_is_taken_back(
    shared: Endpoint, pair: list[Backend], expected: list[str]
) -> None:
    job = running_job(shared)
    pair[1].server.kill()
    try:
        status = shared.finished(job, timeout=5)
        assert pair[1].process.wait(10) == 1
        # What the poll that is still open brings fails; then nothing is taken any more.
        taken, waiting = (shared.run({"prompt": PROMPTS[0], "options": GREEDY}) for _ in range(2))
        assert shared.finished(taken, timeout=5)["error"].startswith("an RPC backend of ")
        assert shared.status(waiting)["status"] == "IN_QUEUE"
    finally:
        pair[1].start()
    assert status["status"] == "FAILED"
    assert status["error"].startswith("an RPC backend of ")
    assert shared.finished(waiting)["output"][0]["text"] == expected[0]


def test_a_frozen_backend_is_noticed(
    shared: Endpoint, pair: list[Backend], expected: list[str]
) -> None:
    job = running_job(shared)
    pair[0].server.suspend()
    try:
        status = shared.finished(job, timeout=STALL + 10)
    finally:
        pair[0].server.resume()
    assert status["status"] == "FAILED"
    assert status["error"].startswith("an RPC backend of ")
    assert answer_after_recovery(shared) == expected[0]


def test_a_backend_that_is_absent_at_the_start_is_named() -> None:
    absent = f"127.0.0.1:{free_port()}"
    environment = worker_environment(
        MODE_TO_RUN="api",
        PORT=str(free_port()),
        MODEL=str(GGUF),
        ENGINE_ARGS="",
        RPC_BACKENDS=absent,
        STARTUP_TIMEOUT="8",
    )
    process, output = start(WORKER, environment)
    try:
        assert process.wait(60) == 1
    finally:
        stop(process)
    assert output.find(f"not all RPC backends of {absent} serve")
    assert output.find("the engine was not ready after STARTUP_TIMEOUT=8 seconds")
