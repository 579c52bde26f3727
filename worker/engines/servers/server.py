"""A server as it runs: its address, its process where Tripod started it, and its models."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import httpx

from worker.engines.servers import dialects
from worker.engines.servers.answers import WRONG_KEY
from worker.engines.servers.kind import ServerKind
from worker.engines.servers.process import ServerProcess, free_port, is_taken
from worker.errors import EngineStartError
from worker.processes import find_program
from worker.settings import Settings

log = logging.getLogger(__name__)

PROBE_TIMEOUT = 2.0
"""Seconds that a server that starts has to answer one probe; some listen before they can."""

PORTS_TRIED = 5
"""Free ports that may turn out to be somebody else's before the start is given up."""


class BackendGone(EngineStartError):
    """llama.cpp aborted or hung at its start, as it does when an RPC backend is not there."""


class Server:
    """One server of a kind; started once, or with RPC backends again and again."""

    def __init__(self, kind: ServerKind, settings: Settings) -> None:
        self.kind = kind
        self.name = kind.name
        self.model_name = kind.model_name
        self.max_model_len = kind.max_model_len
        self.dialect = kind.dialect or dialects.OPENAI
        self.models: dict[str, dict[str, Any]] = {}
        self.process: ServerProcess | None = None
        key = {"Authorization": f"Bearer {kind.key}"} if kind.key else {}
        self.http = httpx.AsyncClient(
            headers={"Accept-Encoding": "identity", **key},
            timeout=httpx.Timeout(None, connect=10),
            # Many servers close a connection that was idle for 5 s.
            limits=httpx.Limits(max_connections=None, keepalive_expiry=2),
        )
        self._settings = settings
        self._program: str | None = None

    def find_program(self) -> None:
        """Find what starts it.

        Raises:
            EngineStartError: it is not installed.
        """
        wanted = self.kind.program
        if wanted is None:
            return
        self._program = find_program(wanted)
        if self._program is None:
            raise EngineStartError(
                f"ENGINE={self.name}: the program {wanted} is not on PATH; install it, or take an "
                "image that holds it"
            )

    async def start(self) -> None:
        """Start it, wait until it is ready, and ask what it serves.

        Raises:
            EngineStartError: it ended, or does not serve as OpenAI does.
            BackendGone: an RPC backend of it may be away.
        """
        for _ in range(PORTS_TRIED):
            url = self._settings.engine_url or ""
            if self._program:
                port = free_port()
                url = f"http://127.0.0.1:{port}"
                self.process = ServerProcess(
                    self.name,
                    self.kind.command(self._program, port),
                    self.kind.variables(),
                    port,
                    noise=f"GET {self.kind.ready} ",
                )
                try:
                    self.process.start()
                except OSError as error:
                    raise EngineStartError(f"{self._program} can't be run: {error}") from None
            self.http.base_url = httpx.URL(url)
            if await self._becomes_ready():
                break
            log.warning("port %d is somebody else's; %s gets another", port, self.name)
            assert self.process
            await asyncio.to_thread(self.process.stop)
        else:
            raise EngineStartError(f"{self.name}: {PORTS_TRIED} ports in turn were taken by others")
        if self.process:
            self.kind.report(list(self.process.lines))
        await self._ask_for_models()

    def has_ended(self) -> bool:
        """Whether its process is gone."""
        return self.process is not None and self.process.ended.is_set()

    def last_lines(self) -> str:
        """The end of its output, for an error message; empty where Tripod did not start it."""
        return f"; its last lines:{self.process.last_lines()}" if self.process else ""

    async def probe(self, timeout: float = PROBE_TIMEOUT) -> int | None:
        """The status of one probe; None when nobody listens, 0 when there is no answer in time."""
        try:
            response = await self.http.get(self.kind.ready, timeout=timeout)
        except httpx.ConnectError:
            return None
        except httpx.TransportError:
            return 0
        return response.status_code

    async def steps(self) -> object:
        """Something that changes with every step of the model; None where there is no answer."""
        try:
            if self.dialect.steps:
                lines = (await self.http.get("/metrics")).text.splitlines()
                return next((line for line in lines if line.startswith(self.dialect.steps)), None)
            model = self.models[self.model_name]["id"]
            body = {"model": model, "prompt": "Hello", "max_tokens": 1}
            answer = await self.http.post("/v1/completions", json=body)
        except httpx.HTTPError:
            return None
        return object() if answer.status_code < 500 else None

    async def _becomes_ready(self) -> bool:
        """Wait for the server; False when its port turns out to be another program's."""
        process = self.process
        used, since = 0.0, time.monotonic()
        pause = 0.05
        while True:
            if process and process.ended.is_set():
                if is_taken(process.port):
                    return False
                code = process.code or 0
                aborted = self.kind.backends and (code < 0 or code >= 128)
                raise (BackendGone if aborted else EngineStartError)(
                    f"{self.name} ended with code {code} before it was ready" + self.last_lines()
                )
            status = await self.probe()
            if process and status is not None and not process.listens():
                if not process.ended.is_set():
                    return False
                continue
            if status == 200:
                return True
            if not process and status and 400 <= status < 500:
                raise EngineStartError(
                    WRONG_KEY
                    if status in {401, 403}
                    else f"ENGINE_URL: the server answers {status} to {self.kind.ready}"
                )
            if process and self.kind.backends:
                if (now_used := process.cpu_seconds()) > used + 0.01:
                    used, since = now_used, time.monotonic()
                if time.monotonic() - since > self._settings.stall_timeout:
                    raise BackendGone(f"{self.name} hangs at its start")
            with suppress(TimeoutError):
                await asyncio.wait_for(process.ended.wait() if process else asyncio.sleep(1), pause)
            pause = min(pause * 1.2, 1)

    async def _ask_for_models(self) -> None:
        """What the server calls its models, and how long a request may be there."""
        try:
            listed = (await self.http.get("/v1/models", timeout=30)).json()["data"]
            entries = {str(entry["id"]): dict(entry) for entry in listed}
            first = entries.get(self.model_name) or next(iter(entries.values()))
        except (httpx.HTTPError, ValueError, KeyError, TypeError, StopIteration) as error:
            raise EngineStartError(
                f"{self.name} does not list its models at /v1/models as OpenAI does: {error!r}"
            ) from None
        if self.kind.dialect is None:
            owner = str(first.get("owned_by"))
            self.dialect = dialects.BY_OWNER.get(owner, dialects.OPENAI)
            await self._see_what_is_passed_on()
            log.info("%s serves %s, owned by %s", self.name, ", ".join(entries), owner)
        if self.kind.program is None and not self._settings.served_model_name:
            self.model_name = str(first["id"])
            self.models = entries
        else:
            self.models = {self.model_name: first}
        limit = first.get("max_model_len") or (first.get("meta") or {}).get("n_ctx")
        if limit and int(limit) < self.max_model_len:
            self.max_model_len = int(limit)
            log.info("max_model_len is %d tokens, as the server says", self.max_model_len)

    async def _see_what_is_passed_on(self) -> None:
        """What stands before the server, a bento say, may pass on OpenAI's routes only."""
        if self.dialect.steps and await self.steps() is None:
            self.dialect = replace(self.dialect, steps=None)
        if self.dialect.counts and not await self._counts():
            log.info("%s has no /tokenize: prompts are not counted beforehand", self.name)
            self.dialect = replace(self.dialect, counts=None)

    async def _counts(self) -> bool:
        try:
            answer = await self.http.post("/tokenize", json={}, timeout=30)
        except httpx.HTTPError:
            return False
        return answer.status_code not in {404, 405}
