"""A short `make chaos`, on the table's own worker."""

from tests.chaos import Chaos
from tests.faults.client import Client
from tests.support import Endpoint


async def test_a_short_chaos(served: Endpoint, client: Client) -> None:
    chaos = Chaos(client, served, seed=1)
    await chaos.run(20)
    assert not chaos.problems, "\n".join(chaos.problems)
    assert chaos.outcomes.total() == chaos.sent
    assert chaos.outcomes["completed"]
