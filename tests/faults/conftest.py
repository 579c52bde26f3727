"""One worker and one emulator for every row of the table."""

import sys
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.faults.client import Client
from tests.support import Endpoint, endpoint

SHUTDOWN_TIMEOUT = 8
CLOCKED_WORKER = [sys.executable, "-m", "tests.faults.clocked_worker"]


@pytest.fixture(scope="module")
def served() -> Iterator[Endpoint]:
    with endpoint(
        command=CLOCKED_WORKER, CONCURRENCY_MODIFIER="64", SHUTDOWN_TIMEOUT=str(SHUTDOWN_TIMEOUT)
    ) as served:
        yield served


@pytest.fixture(scope="module")
async def client(served: Endpoint) -> AsyncIterator[Client]:
    client = Client(served.url)
    async with client.http:
        yield client
