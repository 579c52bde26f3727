"""The way of a job, side by side: bare engine, Tripod, Tripod on the SDK's loop, worker-vllm.

All subjects load the same model with the same engine settings and stay loaded; in each round one
after the other gets all cases while the rest are idle.
`python -m benchmarks.job_path --quick` takes a few minutes.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import machine
from benchmarks.figures import Figures, Sample, promises, promises_table, table
from benchmarks.readme import RESULTS
from benchmarks.subject import LOGS, BenchmarkError, Subject, console, start_all
from benchmarks.subjects import BareEngine, WorkerVllm, tripod

TOKENS = 128
"""Tokens of every answer."""

ENOUGH_JOBS, ENOUGH_SECONDS = 16, 4.0
"""A case of few jobs is repeated within its round until it had so many, or took so long."""

QUIET, QUIET_LIMIT = 0.05, 10.0
"""Of a core, what all subjects together may use before a case begins; seconds to wait for that."""

LIMIT = 120.0
"""Seconds that the jobs of one case may take."""


def measure(subject: Subject, jobs: int, round_trip: float, number: int) -> Sample:
    """One case in one round.

    Raises:
        BenchmarkError: a job failed, or the subject did.
    """
    first_token: list[float] = []
    seconds: list[float] = []
    chunks = size = 0
    before = subject.cpu()
    while len(first_token) < ENOUGH_JOBS and sum(seconds) < ENOUGH_SECONDS:
        results = subject.run(jobs, round_trip, TOKENS, LIMIT)
        first_token += [result["first"] for result in results]
        seconds.append(max(result["end"] for result in results))
        chunks += sum(result["chunks"] for result in results)
        size += sum(result["bytes"] for result in results)
    used = subject.cpu().since(before)
    return Sample(
        subject=subject.name,
        jobs=jobs,
        round_trip=round_trip,
        round=number,
        first_token=first_token,
        seconds=seconds,
        tokens=len(first_token) * TOKENS,
        chunks=chunks,
        bytes=size,
        front_cpu=used.front,
        core_cpu=used.core,
    )


def rounds(
    subjects: list[Subject],
    cases: list[tuple[int, float]],
    count: int,
    samples: list[Sample],
    problems: list[str],
) -> None:
    """Measure, `samples` growing as it goes; a subject that fails is left out from then on."""
    columns = (
        TextColumn("{task.description:42}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    blocks = [(number, s) for number in range(1, count + 1) for s in _rotated(subjects, number)]
    most = max(jobs for jobs, _ in cases)
    failed: set[str] = set()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(blocks) * (1 + len(cases)))
        for number, subject in blocks:
            wait_for_quiet([one for one in subjects if one.name not in failed])
            for jobs, round_trip in [(most, None), *cases]:
                what = "warm-up" if round_trip is None else f"{round_trip * 1000:.0f} ms"
                text = f"round {number} of {count}: {subject.name}, {jobs} jobs, {what}"
                progress.update(bar, description=text, advance=1)
                if subject.name in failed or (round_trip and not subject.distant):
                    continue
                try:
                    if round_trip is None:  # its memory may have been given up meanwhile
                        subject.run(jobs, 0, TOKENS, LIMIT)
                    else:
                        samples.append(measure(subject, jobs, round_trip, number))
                except BenchmarkError as error:
                    failed.add(subject.name)
                    problems.append(f"{error} ({text})")
                    progress.console.print(f"[red]✗[/] {problems[-1]}")


def wait_for_quiet(subjects: list[Subject]) -> None:
    """Wait until no subject computes: vLLM's processes spin for a second after their last step."""
    end = time.monotonic() + QUIET_LIMIT
    while time.monotonic() < end:
        before = [subject.cpu() for subject in subjects]
        time.sleep(0.25)
        used = (subject.cpu().since(was) for subject, was in zip(subjects, before, strict=True))
        if sum(cpu.front + cpu.core for cpu in used) < 0.25 * QUIET:
            return


def _rotated(subjects: list[Subject], by: int) -> list[Subject]:
    by %= len(subjects)
    return subjects[by:] + subjects[:by]


def report(figures: Figures, count: int, peer: str, problems: list[str], out: Path) -> str:
    """Write job_path.md, job_path.json and job_path.png into `out`; returns the Markdown."""
    try:
        from benchmarks.plots import job_path as plot
    except ModuleNotFoundError as error:
        console.print(f"no plot: {error.name} is not installed; `make bench` installs it")
    else:
        plot(figures, out / "job_path.png")
    parts = [
        "### The way of a job",
        f"On {machine.describe()}. The bundled model in bfloat16, {TOKENS} tokens a job, all jobs "
        f"handed out at once; medians of {count} interleaved rounds, in parentheses the lowest and "
        "the highest round. *Bare engine* is vLLM's `AsyncLLM` with nothing around it. Times run "
        "from the answer that hands the jobs out to the arrival of the first text and of the end; "
        "every answer of the platform takes the round trip. Bytes are the bodies of the streamed "
        f"chunks. CPU is the worker's process without the engine's core{peer}.",
        *(f"**Not complete:** {problem}" for problem in problems),
        "![First token and throughput by jobs at once](job_path.png)",
        promises_table(promises(figures)),
        table(figures),
    ]
    text = "\n\n".join(filter(None, parts)) + "\n"
    (out / "job_path.md").write_text(text, encoding="utf-8")
    return text


def save(samples: list[Sample], problems: list[str], out: Path) -> None:
    """The raw samples, also when the run was cut short."""
    raw = {
        "machine": machine.describe(),
        "tokens": TOKENS,
        "problems": problems,
        "samples": [asdict(sample) for sample in samples],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "job_path.json").write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")


def main(
    worker_vllm: Annotated[
        Path | None, typer.Option(help="A checkout of runpod-workers/worker-vllm.")
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="Two rounds, without 128 jobs; into .cache/bench/quick.")
    ] = False,
    count: Annotated[int, typer.Option("--rounds", min=1, help="Rounds.")] = 3,
    jobs: Annotated[str, typer.Option(help="Jobs at once, each a case.")] = "1,16,64,128",
    round_trips: Annotated[str, typer.Option(help="Milliseconds, each a case.")] = "0,50",
    only: Annotated[
        str, typer.Option(help="Subjects: bare, tripod, stock, worker-vllm.")
    ] = "bare,tripod,stock,worker-vllm",
    out: Annotated[Path, typer.Option(help="Where the results go.")] = RESULTS,
) -> None:
    """Measure and report; exits with 1 when a subject failed."""
    if quick:
        count, out = 2, LOGS / "quick"
        jobs = "1,16,64"
    cases = [
        (int(number), float(delay) / 1000)
        for delay in round_trips.split(",")
        for number in jobs.split(",")
    ]
    # SIGTERM ends it like Ctrl-C: subjects are stopped, and what was measured is kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if warning := machine.busy():
        console.print(f"[yellow]![/] {warning}")
    samples: list[Sample] = []
    problems: list[str] = []
    with ExitStack() as stack:
        endpoint = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.endpoint"], stdout=subprocess.PIPE, text=True
        )
        stack.callback(endpoint.wait)
        stack.callback(endpoint.terminate)
        assert endpoint.stdout
        url = endpoint.stdout.readline().strip()
        wanted: list[Subject] = [BareEngine(TOKENS), tripod(url), tripod(url, stock=True)]
        if worker_vllm:
            wanted.append(WorkerVllm(url, worker_vllm))
        wanted = [subject for subject in wanted if subject.name in only.split(",")]
        try:
            subjects = start_all(wanted, stack, problems)
            rounds(subjects, cases, count, samples, problems)
        except KeyboardInterrupt:
            problems.append("interrupted")
        finally:
            if samples:
                save(samples, problems, out)
    if not samples:
        console.print("[red]nothing was measured[/]")
        raise typer.Exit(1)
    figures = Figures(samples, {subject.name: subject.title for subject in wanted})
    peer = f"; {_version_of(worker_vllm)}" if worker_vllm else ""
    print(report(figures, count, peer, problems, out))
    console.print(f"results: {out}")
    if problems:
        raise typer.Exit(1)


def _version_of(checkout: Path) -> str:
    """How the text names the peer."""
    asked = ["git", "-C", str(checkout), "log", "-1", "--format=%h of %cs"]
    ran = subprocess.run(asked, capture_output=True, text=True, check=False)
    version = ran.stdout.strip() or "a checkout without git"
    return (
        f"of [worker-vllm](https://github.com/runpod-workers/worker-vllm) ({version}, as it "
        "ships, called by `openai_route`) it is that of the worker and of `vllm serve`"
    )


if __name__ == "__main__":
    typer.run(main)
