"""What is compared: a process that is started, given jobs, watched and stopped."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
from rich.console import Console

ROOT = Path(__file__).parents[1]
LOGS = ROOT / ".cache" / "bench"

START = 300.0
"""Seconds that a subject may take to become ready."""

console = Console(stderr=True, highlight=False)


class BenchmarkError(Exception):
    """One sentence about what ended a measurement."""


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU seconds so far: of the engine core and its threads, and of all other processes."""

    front: float
    core: float

    def since(self, before: Cpu) -> Cpu:
        return Cpu(self.front - before.front, self.core - before.core)


def environment(**variables: str) -> dict[str, str]:
    """This environment without what Runpod would set, and what is the same for all subjects."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RUNPOD_")}
    alike = {
        "PYTHONUNBUFFERED": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if len(os.sched_getaffinity(0)) > 1:
        alike["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "1"
    return clean | alike | variables


def jobs(count: int, tokens: int) -> list[dict[str, Any]]:
    """Jobs that no prefix cache can help, for Tripod's handler."""
    options = {"max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    return [
        {
            "id": uuid.uuid4().hex,
            "input": {
                "prompt": f"{number}: import os\n\ndef ",
                "answerType": "stream",
                "options": options,
            },
        }
        for number in range(count)
    ]


class Subject:
    """One process, with its children, that answers jobs.

    It stays in this session: Linux groups processes by session, and 6.18 lets a group whose
    processes spin, as vLLM's do, keep the other groups from both cores for seconds.
    """

    title: str
    distant = True
    """Whether it answers to a platform, so that a round trip matters."""

    def __init__(self, name: str, command: list[str], variables: dict[str, str]) -> None:
        LOGS.mkdir(parents=True, exist_ok=True)
        self.name, self.log = name, LOGS / f"{name}.log"
        self._command, self._variables = command, variables
        self._cwd = ROOT
        self._process: subprocess.Popen[str]

    def start(self) -> None:
        """Start it and wait until it can take jobs.

        Raises:
            BenchmarkError: it ended, or was not ready after START seconds.
        """
        with self.log.open("w") as log:
            self._process = self._spawn(log)
        end = time.monotonic() + START
        while not self._is_ready():
            if self._process.poll() is not None:
                raise BenchmarkError(
                    f"{self.name} ended with code {self._process.returncode} before it was "
                    f"ready: {self._last_words()}"
                )
            if time.monotonic() > end:
                raise BenchmarkError(
                    f"{self.name} was not ready after {START:g} s: {self._last_words()}"
                )
            time.sleep(0.2)

    def run(self, count: int, round_trip: float, tokens: int, limit: float) -> list[dict[str, Any]]:
        """Give it `count` jobs at once; one summary per job, as of benchmarks/endpoint.py.

        Raises:
            BenchmarkError: a job failed or did not end within `limit` seconds.
        """
        if self._process.poll() is not None:
            raise BenchmarkError(f"{self.name} is gone: {self._last_words()}")
        results = self._run(jobs(count, tokens), round_trip, limit)
        for result in results:
            if result["error"]:
                raise BenchmarkError(f"{self.name}: a job failed: {result['error']}")
            if result["end"] is None or result["first"] is None:
                raise BenchmarkError(f"{self.name}: a job did not end within {limit:g} s")
            if result["finish_reason"] != "length":  # then not all tokens have come
                raise BenchmarkError(
                    f"{self.name}: a job ended with {result['finish_reason']}, not with length"
                )
        return results

    def cpu(self) -> Cpu:
        """CPU seconds of its processes so far."""
        front = core = 0.0
        process = psutil.Process(self._process.pid)
        for member in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                used = sum(member.cpu_times()[:2])
                if member.name().startswith("VLLM::"):
                    core += used
                else:
                    front += used
        return Cpu(front, core)

    def stop(self) -> None:
        """SIGTERM, a few seconds, then SIGKILL for all that is left of it."""
        if not hasattr(self, "_process"):
            return
        family = []
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            family = [process, *process.children(recursive=True)]
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        self._process.wait()

    def _spawn(self, log: IO[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._command,
            cwd=self._cwd,
            env=environment(**self._variables),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )

    def _is_ready(self) -> bool:
        raise NotImplementedError

    def _run(
        self, given: list[dict[str, Any]], round_trip: float, limit: float
    ) -> list[dict[str, Any]]:
        """One summary per job, whether it failed or not."""
        raise NotImplementedError

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'it wrote nothing'} (all of it in {self.log})"


class Piped(Subject):
    """A program of ours that reads a run as a JSON line and answers with one."""

    distant = False

    def _spawn(self, log: IO[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=environment(**self._variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            process_group=0,
        )

    def _is_ready(self) -> bool:
        return self._line(0.1) == "ready\n"

    def ask(self, run: dict[str, Any], limit: float) -> list[dict[str, Any]]:
        """Send one run and wait up to `limit` seconds for its results.

        Raises:
            BenchmarkError: it ended, or did not answer in time.
        """
        assert self._process.stdin
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(run) + "\n")
            self._process.stdin.flush()
        if not (line := self._line(limit)):
            ended = self._process.poll() is not None
            what = "it ended" if ended else f"no answer within {limit:g} s"
            raise BenchmarkError(f"{self.name}: {what}: {self._last_words()}")
        results: list[dict[str, Any]] = json.loads(line)
        return results

    def _line(self, timeout: float) -> str:
        assert self._process.stdout
        readable, _, _ = select.select([self._process.stdout], [], [], timeout)
        return self._process.stdout.readline() if readable else ""


def start_all(subjects: list[Subject], stack: ExitStack, problems: list[str]) -> list[Subject]:
    """Start one after another; those that do not start are left out and named in `problems`."""
    started = []
    for subject in subjects:
        stack.callback(subject.stop)
        begin = time.monotonic()
        try:
            with console.status(f"starting {subject.title}"):
                subject.start()
        except BenchmarkError as error:
            problems.append(str(error))
            console.print(f"[red]✗[/] {error}")
            continue
        console.print(f"[green]✓[/] {subject.title}: ready after {time.monotonic() - begin:.0f} s")
        started.append(subject)
    return started
