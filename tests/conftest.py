"""Fixtures that are started once for the whole run."""

from collections.abc import Iterator

import pytest

from tests.support import Endpoint, endpoint


@pytest.fixture(scope="session")
def local() -> Iterator[Endpoint]:
    """The emulator with one real worker, many jobs at once."""
    with endpoint(CONCURRENCY_MODIFIER="64") as served:
        yield served
