"""The worker processes: started, watched, restarted, stopped with all they started."""

import asyncio
import contextlib
import json
import os
import signal
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from emulator.endpoint import Endpoint
from emulator.guardian import RUN_VARIABLE, Guardian, kill_groups
from emulator.web import ENDPOINT_ID
from emulator.worker import Worker

FIRST_BACKOFF, MAX_BACKOFF = 1.0, 30.0
OWN_EXIT = 1.0
"""Seconds that a worker has to exit by itself after it asked to be replaced."""
PING_INTERVAL_MS = 10_000
LOG_LINE = 64 * 1024
"""Bytes after which a log line without an end is shown as it is."""


def worker_environment(url: str, worker_id: str, api_key: str) -> dict[str, str]:
    """What the platform sets for a worker; `url` is the endpoint's base URL."""
    query = "gpu=emulated"
    return {
        "RUNPOD_ENDPOINT_ID": ENDPOINT_ID,
        "RUNPOD_POD_ID": worker_id,
        "RUNPOD_POD_HOSTNAME": worker_id,
        "RUNPOD_AI_API_KEY": api_key,
        "RUNPOD_WEBHOOK_GET_JOB": f"{url}/job-take/$ID?{query}",
        "RUNPOD_WEBHOOK_POST_STREAM": f"{url}/job-stream/$RUNPOD_POD_ID/$ID?{query}",
        "RUNPOD_WEBHOOK_POST_OUTPUT": f"{url}/job-done/$RUNPOD_POD_ID/$ID?{query}",
        "RUNPOD_WEBHOOK_PING": f"{url}/ping/$RUNPOD_POD_ID",
        "RUNPOD_PING_INTERVAL": str(PING_INTERVAL_MS),
    }


def readable(line: str) -> str:
    """The SDK's JSON log line as `LEVEL | request id | message`, any other line as it is."""
    if not line.startswith("{"):
        return line
    try:
        record = json.loads(line)
    except ValueError:
        return line
    if not isinstance(record, dict) or not {"message", "level"} <= record.keys():
        return line
    parts = [f"{record['level']:<5}", record.get("requestId"), record["message"]]
    return " | ".join(str(part) for part in parts if part)


@dataclass(slots=True)
class Slot:
    """One of the N workers, through all its restarts. `started_at` is seconds since 1970."""

    number: int
    worker_id: str = ""
    process: asyncio.subprocess.Process | None = None
    started_at: float | None = None
    lives: int = 0
    failures: int = 0
    last_exit_code: int | None = None
    asked_to_stop: bool = False
    stopping: asyncio.Task[None] | None = None
    last_line: str = ""

    def as_dict(self) -> dict[str, Any]:
        """What /emulator/workers tells of the process."""
        return {
            "pid": self.process.pid if self.process else None,
            "started_at": self.started_at,
            "restarts": self.lives - 1,
            "last_exit_code": self.last_exit_code,
        }


@dataclass(slots=True)
class Supervisor:
    """Keeps `count` processes of one command running as the endpoint's workers.

    `log(source, line)` gets every line of theirs and the supervisor's own (source "emulator").
    """

    endpoint: Endpoint
    command: Sequence[str]
    count: int
    url: str
    log: Callable[[str, str], None]
    api_key: str = "local"
    grace: float = 5.0
    slots: list[Slot] = field(default_factory=list)
    _run: str = field(default_factory=lambda: uuid.uuid4().hex)
    _guardian: Guardian | None = None
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)

    def start(self) -> None:
        self._guardian = Guardian(self._run)
        self.endpoint.on_stop_pod = self._replace
        self.slots = [Slot(number) for number in range(1, self.count + 1)]
        self._tasks = [asyncio.create_task(self._keep(slot)) for slot in self.slots]

    async def stop(self) -> None:
        """SIGTERM to every worker, SIGKILL after the grace; returns when all are gone."""
        self._stop.set()
        for slot in self.slots:
            self._stop_soon(slot, 0.0)
        await asyncio.gather(*self._tasks)
        if self._guardian:
            await asyncio.to_thread(self._guardian.close)

    def kill(self) -> None:
        """SIGKILL every worker now, while `stop()` waits."""
        for slot in self.slots:
            if slot.process:
                kill_groups({slot.process.pid}, self._life(slot))

    def list_workers(self) -> list[dict[str, Any]]:
        """The body of /emulator/workers: our own and those that connected from outside."""
        slots = {slot.worker_id: slot for slot in self.slots}
        return [
            worker.as_dict() | (slots[worker.id].as_dict() if worker.id in slots else {})
            for worker in self.endpoint.workers.values()
        ]

    async def _keep(self, slot: Slot) -> None:
        """Run the slot's worker again and again, with a back-off after a failed life."""
        delay, end = 0.0, ""
        while True:
            worker = self._register(slot)
            if delay:
                worker.unhealthy = end
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), delay)
            if self._stop.is_set():
                return
            worker.unhealthy = None
            end = await self._live(slot)
            self.endpoint.lose(worker.id, end)
            if self._stop.is_set():
                return
            if slot.asked_to_stop and worker.ready:
                slot.failures, delay = 0, 0.0
                self.log("emulator", f"{worker.id} {end} and is replaced, as it asked")
            else:
                slot.failures = 1 if worker.ready else slot.failures + 1
                delay = min(FIRST_BACKOFF * 2 ** (slot.failures - 1), MAX_BACKOFF)
                reason = worker.unhealthy or end
                self.log("emulator", f"{worker.id} {reason}; starting anew in {delay:g} s")

    def _register(self, slot: Slot) -> Worker:
        """Give the slot's next life its own id, so that nothing of the last one is mistaken."""
        slot.lives += 1
        life = f"-{slot.lives}" if slot.lives > 1 else ""
        slot.worker_id = f"worker-{slot.number}{life}"
        slot.asked_to_stop = False
        return self.endpoint.register(slot.worker_id, managed=True)

    async def _live(self, slot: Slot) -> str:
        """One life of the worker process, from start to exit; returns how it ended."""
        read_end, write_end = os.pipe()
        environment = worker_environment(self.url, slot.worker_id, self.api_key)
        try:
            process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                env={**os.environ, **self._extra_environment(slot), **environment},
                # Not a session of its own: Linux shares the cores out by sessions first, and vLLM's
                # processes, which spin, would keep the emulator from two cores for half a second.
                process_group=0,
            )
        except OSError as error:
            os.close(read_end)
            return f"could not be started: {error.strerror}"
        finally:
            os.close(write_end)
        if self._guardian:
            self._guardian.watch(process.pid)
        slot.process, slot.started_at, slot.stopping = process, time.time(), None
        if self._stop.is_set():
            self._stop_soon(slot, 0.0)
        output = asyncio.create_task(self._pass_through(slot, read_end))
        code = await process.wait()
        await asyncio.to_thread(kill_groups, {process.pid}, self._life(slot))
        if self._guardian:
            self._guardian.release(process.pid)
        await asyncio.wait((output,), timeout=1.0)
        output.cancel()
        slot.process, slot.last_exit_code = None, code
        if code < 0:
            return f"was killed by signal {-code} ({signal.Signals(-code).name})"
        return f"exited with code {code}"

    def _extra_environment(self, slot: Slot) -> dict[str, str]:
        """What makes a worker fit for this machine; the platform sets none of it."""
        loopback = "127.0.0.1,localhost"
        no_proxy = os.environ.get("NO_PROXY") or os.environ.get("no_proxy")
        no_proxy = f"{no_proxy},{loopback}" if no_proxy else loopback
        extra = {
            RUN_VARIABLE: self._life(slot),
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
            "PYTHONUNBUFFERED": "1",
        }
        # The SDK's checks of disk, memory and the way to the internet are made for data centres;
        # below WARN it logs every step of every job.
        defaults = {"RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true", "RUNPOD_LOG_LEVEL": "WARN"}
        if "RUNPOD_DEBUG_LEVEL" in os.environ:
            del defaults["RUNPOD_LOG_LEVEL"]
        return extra | {k: v for k, v in defaults.items() if k not in os.environ}

    def _life(self, slot: Slot) -> str:
        return f"{self._run}/{slot.worker_id}/"

    async def _pass_through(self, slot: Slot, read_end: int) -> None:
        """Show what the worker writes, line by line, until it closes its end."""
        worker_id, reader = slot.worker_id, asyncio.StreamReader()
        with os.fdopen(read_end, "rb", buffering=0) as pipe:
            transport, _ = await asyncio.get_running_loop().connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(reader), pipe
            )
            try:
                rest = b""
                while data := await reader.read(LOG_LINE):
                    *lines, rest = (rest + data).split(b"\n")
                    if len(rest) > LOG_LINE:
                        lines, rest = [*lines, rest], b""
                    for line in lines:
                        self._show(slot, worker_id, line)
                if rest:
                    self._show(slot, worker_id, rest)
            finally:
                transport.close()

    def _show(self, slot: Slot, worker_id: str, line: bytes) -> None:
        # A progress bar redraws itself after each carriage return: its last state is enough.
        text = line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace")
        if text:
            slot.last_line = readable(text)
            self.log(worker_id, slot.last_line)

    def _replace(self, worker_id: str) -> None:
        for slot in self.slots:
            if slot.worker_id == worker_id:
                slot.asked_to_stop = True
                self._stop_soon(slot, OWN_EXIT)

    def _stop_soon(self, slot: Slot, own_exit: float) -> None:
        if slot.process and slot.stopping is None:
            slot.stopping = asyncio.create_task(self._terminate(slot, slot.process, own_exit))

    async def _terminate(
        self, slot: Slot, process: asyncio.subprocess.Process, own_exit: float
    ) -> None:
        """Wait for the process's own exit, then SIGTERM, and after the grace SIGKILL to all."""
        worker_id, life = slot.worker_id, self._life(slot)
        if own_exit and await _exits_within(process, own_exit):
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        self.endpoint.end_polls(worker_id)
        if not await _exits_within(process, self.grace):
            self.log("emulator", f"{worker_id} did not exit within {self.grace:g} s: killed")
            await asyncio.to_thread(kill_groups, {process.pid}, life)


async def _exits_within(process: asyncio.subprocess.Process, seconds: float) -> bool:
    try:
        await asyncio.wait_for(process.wait(), seconds)
    except TimeoutError:
        return False
    return True
