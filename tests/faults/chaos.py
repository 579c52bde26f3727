"""`make chaos`: a seeded mix of jobs and faults with the real worker, and a balance at the end.

Every job has to be accounted for: completed with the right answer, or ended for a cause that the
mix explains. None may be lost, none may be doubled; memory and file descriptors stay flat.
"""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.table import Table

from tests.faults.client import CODE, Ask, Client, answer_of, chat, normal, stream
from tests.support import START, Endpoint, endpoint, soon

MIX = [
    "all:latency=80ms,for={seconds}s",
    "job-stream:status=503,probability=0.5,for={seconds}s",
    "job-done:status=502,probability=0.7,for={seconds}s",
    "job-done:status=400,probability=0.3,for={seconds}s",
    "job-take:status=500,probability=0.7,for={seconds}s",
    "job-take:status=429,count=1,for={seconds}s",
    "job-stop:status=503,probability=0.5,for={seconds}s",
    "all:drop=before,probability=0.3,for={seconds}s",
    "all:drop=after,probability=0.3,for={seconds}s",
    "all:half,probability=0.3,for={seconds}s",
    "all:outage={seconds}s",
    "all:outage={seconds}s",
    "job-take:duplicate,for={seconds}s",
    "job-take:duplicate=other,probability=0.5,for={seconds}s",
    "job-stop:stop-signal,count=3,for={seconds}s",
    "job-done:stop-signal,for={seconds}s",
    "job-take:stop-signal,probability=0.3,for={seconds}s",
    "ping:drop,for={seconds}s",
    "all:clock=+5s",
    "all:clock=-5s",
    "run:status=500,probability=0.3,for={seconds}s",
    "status:status=503,probability=0.5,for={seconds}s",
]
LONGEST_FAULT = 12.0
"""Seconds."""

CUSTOMERS = 16
LONG = {"max_tokens": 1500, "ignore_eos": True}

CAUSES = {
    'prompt: "" is not allowed': "bad input",
    "the platform refused the job's result": "result refused",
    "while this job was in progress": "worker ended",
    "the worker was told to stop": "worker told to stop",
}
"""What a job may fail for, by a part of its error."""

LOST, DOUBLED, WRONG = "LOST", "DOUBLED", "WRONG"


@dataclass
class Chaos:
    """Customers and trouble on one endpoint. `kills`: workers are ended as well.

    `run_limit`: seconds that the platform lets a job run; ends those whose end never arrives. A
    client waits twice as long, since the platform's clock may be set back.
    """

    client: Client
    served: Endpoint
    seed: int
    run_limit: float
    kills: bool = False
    console: Console = field(default_factory=Console)
    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    sent: int = 0

    async def run(self, seconds: float) -> None:
        """Make trouble for so long, then let everything come to its end."""
        self._begin = time.monotonic()
        self._end = self._begin + seconds
        customers = [self._customer(random.Random(f"{self.seed}/{i}")) for i in range(CUSTOMERS)]
        trouble = asyncio.create_task(self._trouble(random.Random(self.seed)))
        everybody = asyncio.gather(*customers)
        try:
            while not everybody.done():
                await asyncio.wait([everybody], timeout=10)
                self._say(f"{self.sent} jobs sent, {self.outcomes.total()} ended")
            everybody.result()
            await trouble
        finally:
            trouble.cancel()
            everybody.cancel()
            await self.client.end_faults()

    async def _customer(self, chance: random.Random) -> None:
        while time.monotonic() < self._end:
            self.sent += 1
            outcome = await self._job(self.sent, chance)
            self.outcomes[outcome] += 1

    async def _job(self, number: int, chance: random.Random) -> str:
        """Send one job and see it through; returns what became of it."""
        kind = chance.choice(["normal", "stream", "stream", "openai", "cancelled", "bad"])
        asks: dict[str, Any] = {"normal": normal, "stream": stream, "openai": chat}
        # Ever new texts would fill the engine's cache of grammars, which is not our memory.
        ask: Ask | None = asks[kind](number % 100) if kind in asks else None
        job_input: Any = ask.input if ask else {"prompt": "", "options": LONG}
        if kind == "cancelled":
            job_input = {"prompt": CODE, "answerType": "stream", "options": LONG}
        policy = {"executionTimeout": int(self.run_limit * 1000)}
        job = await self.client.run(job_input, policy=policy)
        chunks = []
        try:
            if kind == "cancelled":
                async for _ in self.client.chunks(job):
                    await self.client.cancel(job)
            elif kind == "stream":
                chunks = await self.client.streamed(job, 2 * self.run_limit)
            end = await self.client.finished(job, 2 * self.run_limit)
        except TimeoutError:
            return self._problem(LOST, job, "it never ended")
        outcome = self._outcome(kind, job, end)
        if outcome != "completed" or not ask:
            return outcome
        if (result := answer_of(ask, end["output"])) != ask.text:
            return self._problem(WRONG, job, f"the result is {result!r}")
        if kind == "stream" and (streamed := answer_of(ask, chunks)) != ask.text:
            what = DOUBLED if len(streamed) > len(ask.text) else LOST
            return self._problem(what, job, f"streamed was {streamed!r}")
        return outcome

    def _outcome(self, kind: str, job: str, end: dict[str, Any]) -> str:
        status, error = end["status"], end.get("error", "")
        log = [line for line in self.served.output.lines if job in line]
        if sum("✓ finished" in line for line in log) > 1:
            return self._problem(DOUBLED, job, "it ran twice")
        if status == "COMPLETED":
            return "completed"
        if status == "CANCELLED":
            return "cancelled" if kind == "cancelled" else "cancelled by the platform"
        if status == "TIMED_OUT" and any("lost: " in line for line in log):
            return "timed out: result and error refused"
        for part, cause in CAUSES.items():
            if part in error and (cause != "bad input" or kind == "bad"):
                return f"failed: {cause}"
        return self._problem(WRONG, job, f"{status} {error}")

    def _problem(self, what: str, job: str, sentence: str) -> str:
        lines = [line for line in self.served.output.lines if job in line]
        self.problems.append("\n    ".join([f"{what} {job}: {sentence}", *lines]))
        self._say(self.problems[-1])
        return what

    async def _trouble(self, chance: random.Random) -> None:
        """One fault after the other, often two at once; now and then a worker is ended."""
        next_kill = time.monotonic() + 40
        while (left := self._end - time.monotonic()) > 1:
            seconds = round(chance.uniform(1, min(LONGEST_FAULT, left)), 1)
            for template in chance.sample(MIX, chance.choice([1, 1, 2, 3])):
                fault = template.format(seconds=seconds)
                self._say(fault)
                await self.client.add_fault(fault)
            if self.kills and time.monotonic() > next_kill and await self._end_a_worker(chance):
                next_kill = time.monotonic() + 100
            await asyncio.sleep(seconds * chance.uniform(0.5, 1.3))
            if chance.random() < 0.3:
                self._say("no fault")
                await self.client.end_faults()
                await asyncio.sleep(chance.uniform(0.5, 3))

    async def _end_a_worker(self, chance: random.Random) -> bool:
        """End one, unless the one that was ended before is not back yet."""
        workers = await self.client.workers()
        name = chance.choice([signal.SIGTERM, signal.SIGKILL])
        worker = chance.choice(workers)
        if any(other["state"] not in ("idle", "running") for other in workers):
            return False
        self._say(f"{name.name} to {worker['id']}")
        os.kill(worker["pid"], name)
        return True

    def _say(self, text: str) -> None:
        self.console.print(f"{time.monotonic() - self._begin:6.1f} s  {text}", highlight=False)


@dataclass
class Watch:
    """Memory and file descriptors of the emulator, and of each worker that takes jobs with all its
    processes."""

    client: Client
    emulator: int
    samples: dict[str, list[tuple[float, int, int]]] = field(default_factory=dict)

    async def run(self) -> None:
        while True:
            await self.sample()
            await asyncio.sleep(5)

    async def sample(self) -> None:
        workers = [w for w in await self.client.workers() if w["state"] in ("idle", "running")]
        pids = {worker["id"]: worker["pid"] for worker in workers}
        for name, pid in ({"emulator": self.emulator} | pids).items():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                family = [process] if name == "emulator" else [process, *process.children(True)]
                memory = sum(member.memory_info().rss for member in family)
                descriptors = sum(member.num_fds() for member in family)
                self.samples.setdefault(name, []).append((time.monotonic(), memory, descriptors))


def table_of(chaos: Chaos) -> Table:
    table = Table("outcome", "jobs", title=f"seed {chaos.seed}: {chaos.sent} jobs sent")
    for outcome, count in sorted(chaos.outcomes.items()):
        table.add_row(outcome, str(count))
    for outcome in (LOST, DOUBLED, WRONG):
        if outcome not in chaos.outcomes:
            table.add_row(outcome, "0")
    table.add_row("not accounted for", str(chaos.sent - chaos.outcomes.total()))
    return table


def growth(watch: Watch) -> tuple[Table, list[str]]:
    """What each process held after it had warmed up and at the end, and what grew."""
    table = Table("process", "for", "memory", "", "descriptors", "", title="flat?")
    grown = []
    for name, samples in watch.samples.items():
        begin, end = samples[0][0], samples[-1][0]
        warm = [sample for sample in samples if sample[0] >= begin + min(90, (end - begin) / 3)]
        (_, memory, descriptors), (_, last_memory, last_descriptors) = warm[0], warm[-1]
        table.add_row(
            name,
            f"{end - begin:.0f} s",
            f"{memory >> 20} MiB",
            f"{last_memory >> 20} MiB",
            str(descriptors),
            str(last_descriptors),
        )
        if last_memory > memory * 1.1 + (32 << 20):
            grown.append(f"{name}: memory grew from {memory >> 20} to {last_memory >> 20} MiB")
        if last_descriptors > descriptors + 2 * CUSTOMERS:
            grown.append(f"{name}: descriptors grew from {descriptors} to {last_descriptors}")
    return table, grown


async def chaos(served: Endpoint, seconds: float, seed: int, workers: int) -> list[str]:
    """Run it, print the balance, and return what is wrong with it."""
    console = Console()
    client = Client(served.url)
    async with client.http:
        watch = Watch(client, served.process.pid)

        def ready() -> bool:
            return bool(served.http.get("/health").json()["workers"]["ready"] == workers)

        await soon(ready, START, "workers that take jobs")
        run = Chaos(client, served, seed, run_limit=90, kills=True, console=console)
        watching = asyncio.create_task(watch.run())
        try:
            await run.run(seconds)
        finally:
            watching.cancel()
        await asyncio.sleep(2)
        await watch.sample()
        completed = served.http.get("/health").json()["jobs"]["completed"]
    table, grown = growth(watch)
    console.print(table_of(run), table)
    problems = [*run.problems, *grown]
    if run.outcomes.total() != run.sent:
        problems.append(f"{run.sent} jobs were sent and {run.outcomes.total()} ended")
    ours = sum(run.outcomes[outcome] for outcome in ("completed", WRONG, DOUBLED, LOST))
    if not run.outcomes["completed"] <= completed <= ours:
        problems.append(f"the platform counts {completed} completed jobs, the clients {ours}")
    return problems


def main(
    seconds: Annotated[float, typer.Option(min=10, help="How long trouble is made.")] = 600,
    seed: Annotated[int | None, typer.Option(help="Of the mix; default: a random one.")] = None,
    workers: Annotated[int, typer.Option(min=1, max=8)] = 2,
) -> None:
    """A seeded mix of jobs and faults with real workers, and a balance at the end."""
    seed = random.randrange(10**6) if seed is None else seed
    print(f"seed {seed}, {seconds:g} s, {workers} workers; starting them", flush=True)
    # What has ended is soon let go, so that the emulator's memory has to be flat as well.
    options = ["--workers", str(workers), "--retention", "60"]
    with endpoint(options=options, CONCURRENCY_MODIFIER="16", SHUTDOWN_TIMEOUT="8") as served:
        problems = asyncio.run(chaos(served, seconds, seed, workers))
    if problems:
        print("The balance is off:", *problems, sep="\n")
        raise typer.Exit(1)
    print("The balance is right: nothing lost, nothing doubled.")


if __name__ == "__main__":
    typer.run(main)
