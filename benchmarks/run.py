"""What one run of an engine gave."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from benchmarks.figures import Spread


@dataclass(frozen=True, slots=True)
class Run:
    """`requests` at once on one engine.

    Args:
        decode: tokens per second of one request after its first token, of each request.
        speed: tokens per second of all requests together, from their sending to the last token.
        first_token: seconds, of each request.
    """

    engine: str
    requests: int
    round: int
    decode: list[float]
    speed: float
    first_token: list[float]


def spread(runs: list[Run], requests: int, value: Callable[[Run], float]) -> Spread:
    """Median, lowest and highest round of the runs with `requests` at once."""
    values = [value(run) for run in runs if run.requests == requests]
    return Spread(median(values), min(values), max(values))
