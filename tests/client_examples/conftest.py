"""Endpoints without a model: one whose worker answers by canned text, one without a worker."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.client_examples.support import Running
from tests.support import Endpoint, endpoint, eventually, start, stop, worker_environment

CANNED_WORKER = [sys.executable, str(Path(__file__).with_name("canned_worker.py"))]


@pytest.fixture(scope="package")
def canned() -> Iterator[Endpoint]:
    """An endpoint that accepts only the key "test"."""
    with endpoint(command=CANNED_WORKER, EMULATOR_API_KEY="test") as served:
        yield served


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """`running(url, program, *arguments)` starts an example; the test's end kills it."""
    started: list[Running] = []

    def factory(url: str, program: str, *arguments: str) -> Running:
        started.append(Running(tmp_path, url, program, *arguments))
        return started[-1]

    yield factory
    for client in started:
        client.process.kill()
        client.process.wait()


@pytest.fixture(scope="package")
def idle() -> Iterator[Endpoint]:
    """An endpoint whose jobs nobody takes."""
    process, output = start([sys.executable, "-m", "emulator", "--port", "0"], worker_environment())
    try:
        line = eventually(lambda: output.find("listening on "), 30, "the emulator's first line")
        served = Endpoint(process, output, line.split("listening on ")[1].strip())
        yield served
        served.http.close()
    finally:
        stop(process)
