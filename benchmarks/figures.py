"""Samples of the job path → the table and the promises, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median, quantiles

BARE, TRIPOD, STOCK, PEER = "bare", "tripod", "stock", "worker-vllm"


@dataclass(frozen=True, slots=True)
class Sample:
    """One subject with `jobs` jobs at once, once or several times in one round.

    Args:
        round_trip: seconds that each call to the platform takes; of the bare engine always 0.
        first_token: seconds to the first text, of each job.
        seconds: from handing out to the end of the last job, of each repetition.
        tokens, chunks, bytes: of all repetitions together.
        front_cpu, core_cpu: CPU seconds of all repetitions, of the worker's process and of the
            engine's core.
    """

    subject: str
    jobs: int
    round_trip: float
    round: int
    first_token: list[float]
    seconds: list[float]
    tokens: int
    chunks: int
    bytes: int
    front_cpu: float
    core_cpu: float


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of several rounds, and the lowest and the highest of them."""

    median: float
    low: float
    high: float

    def text(self, digits: int = 0) -> str:
        middle, low, high = (f"{x:,.{digits}f}" for x in (self.median, self.low, self.high))
        return middle if low == high else f"{middle} ({low} to {high})"


class Figures:
    """All samples of one run.

    Subjects are named as in the samples; `titles` says how the tables call them, in their order.
    """

    def __init__(self, samples: Iterable[Sample], titles: dict[str, str]) -> None:
        self.samples = list(samples)
        self.titles = titles
        self.jobs = sorted({sample.jobs for sample in self.samples})
        self.round_trips = sorted({sample.round_trip for sample in self.samples})

    def of(self, subject: str, jobs: int, round_trip: float) -> list[Sample]:
        """The samples of one case, one per round; the bare engine knows no round trip."""
        wanted = (subject, jobs, 0.0 if subject == BARE else round_trip)
        return [s for s in self.samples if (s.subject, s.jobs, s.round_trip) == wanted]

    def first_token(self, subject: str, jobs: int, round_trip: float) -> Spread | None:
        """Milliseconds; the spread is that of the rounds' medians."""
        return self._spread(subject, jobs, round_trip, lambda s: median(s.first_token) * 1000)

    def first_token_p99(self, subject: str, jobs: int, round_trip: float) -> float | None:
        """Milliseconds, over the jobs of all rounds."""
        samples = self.of(subject, jobs, round_trip)
        return percentile_99(x for s in samples for x in s.first_token) * 1000 if samples else None

    def tokens_per_second(self, subject: str, jobs: int, round_trip: float) -> Spread | None:
        return self._spread(subject, jobs, round_trip, lambda s: s.tokens / sum(s.seconds))

    def seconds(self, subject: str, jobs: int, round_trip: float) -> Spread | None:
        """From handing out to the end of the last job."""
        return self._spread(subject, jobs, round_trip, lambda s: median(s.seconds))

    def chunks_per_token(self, subject: str, jobs: int, round_trip: float) -> Spread | None:
        return self._spread(subject, jobs, round_trip, lambda s: s.chunks / s.tokens)

    def bytes_per_token(self, subject: str, jobs: int, round_trip: float) -> Spread | None:
        return self._spread(subject, jobs, round_trip, lambda s: s.bytes / s.tokens)

    def cpu_per_1000_tokens(self, subject: str, jobs: int, round_trip: float) -> Spread | None:
        """CPU seconds of the worker's process, without the engine's core."""
        return self._spread(subject, jobs, round_trip, lambda s: 1000 * s.front_cpu / s.tokens)

    def _spread(
        self, subject: str, jobs: int, round_trip: float, value: Callable[[Sample], float]
    ) -> Spread | None:
        values = [value(sample) for sample in self.of(subject, jobs, round_trip)]
        return Spread(median(values), min(values), max(values)) if values else None


def percentile_99(values: Iterable[float]) -> float:
    """The 99th percentile, interpolated; of few values it is close to the highest."""
    given = sorted(values)
    return quantiles(given, n=100, method="inclusive")[98] if len(given) > 1 else given[0]


def table(figures: Figures) -> str:
    """A row for each case that was measured."""
    lines = [
        "| round trip | jobs at once | subject | first token, ms: median | p99 | tok/s "
        "| chunks per token | bytes per token | CPU s per 1,000 tokens |",
        "|--:|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for round_trip in figures.round_trips:
        for jobs in figures.jobs:
            for subject, title in figures.titles.items():
                case = (subject, jobs, round_trip)
                first, p99 = figures.first_token(*case), figures.first_token_p99(*case)
                speed, chunks = figures.tokens_per_second(*case), figures.chunks_per_token(*case)
                size, cpu = figures.bytes_per_token(*case), figures.cpu_per_1000_tokens(*case)
                if not (first and p99 is not None and speed and chunks and size and cpu):
                    continue
                if subject == BARE and round_trip != figures.round_trips[0]:
                    continue
                cells = [
                    "" if subject == BARE else f"{round_trip * 1000:.0f} ms",
                    str(jobs),
                    title,
                    first.text(),
                    f"{p99:,.0f}",
                    speed.text(),
                    f"{chunks.median:.2f}",
                    f"{size.median:.1f}",
                    f"{cpu.median:.2f}",
                ]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Promise:
    """What must hold, and what was measured; `value` is None where it could not be."""

    what: str
    limit: str
    value: float | None
    kept: bool
    unit: str = ""

    def row(self) -> str:
        measured = "not measured" if self.value is None else f"{self.value:z.2f}{self.unit}"
        verdict = "" if self.value is None else "pass" if self.kept else "**miss**"
        return f"| {self.what} | {self.limit} | {measured} | {verdict} |"


def promises(figures: Figures) -> list[Promise]:
    """Differences and ratios of the rounds' medians, at a round trip of 0 unless they say 50 ms."""

    def first(subject: str, jobs: int) -> float | None:
        found = figures.first_token(subject, jobs, 0.0)
        return found.median if found else None

    def speed(subject: str, jobs: int) -> float | None:
        found = figures.tokens_per_second(subject, jobs, 0.0)
        return found.median if found else None

    def ratio(numerator: float | None, denominator: float | None) -> float | None:
        return numerator / denominator if numerator is not None and denominator else None

    ours, bare = first(TRIPOD, 1), first(BARE, 1)
    over = ours - bare if ours is not None and bare is not None else None
    size = figures.bytes_per_token(TRIPOD, 64, 0.0)
    cpu = figures.cpu_per_1000_tokens(TRIPOD, 64, 0.0)
    single = figures.seconds(TRIPOD, 1, 0.05) if 0.05 in figures.round_trips else None
    alone = figures.seconds(BARE, 1, 0.0)
    trips = (single.median - alone.median) / 0.05 if single and alone else None

    def at_most(what: str, limit: float, text: str, value: float | None, unit: str = "") -> Promise:
        return Promise(what, text, value, value is not None and value <= limit, unit)

    def at_least(what: str, limit: float, text: str, value: float | None) -> Promise:
        return Promise(what, text, value, value is not None and value >= limit, " times")

    return [
        at_most("first token of 1 job, over the bare engine's", 15, "at most 15 ms", over, " ms"),
        *(
            at_most(
                f"first token at {jobs} jobs, of worker-vllm's",
                1 / 3,
                "at most a third",
                ratio(first(TRIPOD, jobs), first(PEER, jobs)),
            )
            for jobs in (16, 64)
        ),
        *(
            at_most(
                f"first token at {jobs} jobs, of the bare engine's",
                1.25,
                "at most 1.25 times",
                ratio(first(TRIPOD, jobs), first(BARE, jobs)),
                " times",
            )
            for jobs in (16, 64, 128)
        ),
        *(
            at_least(
                f"tok/s at {jobs} jobs, of the bare engine's",
                0.9,
                "at least 0.9 times",
                ratio(speed(TRIPOD, jobs), speed(BARE, jobs)),
            )
            for jobs in (16, 64, 128)
        ),
        at_most(
            "CPU of the worker's process at 64 jobs, without the engine's core",
            0.03,
            "at most 0.03 s per 1,000 tokens",
            cpu.median if cpu else None,
            " s",
        ),
        at_most(
            "end of 1 job at a round trip of 50 ms, after the bare engine's",
            2,
            "at most 2 round trips",
            trips,
            " round trips",
        ),
        at_most(
            "streamed for plain text at 64 jobs",
            12,
            "at most 12 bytes per token",
            size.median if size else None,
            " bytes per token",
        ),
    ]


def promises_table(given: list[Promise]) -> str:
    """One row per promise, with pass or miss."""
    lines = ["| promise | limit | measured | |", "|---|---|--:|---|"]
    return "\n".join([*lines, *(promise.row() for promise in given)])
