"""Whether the first request of a kind waits longer than the second, and holds the others up.

For each kind a worker is started anew, with compiler caches that are empty, and answers the same
request twice over HTTP while a long stream runs beside it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from benchmarks import machine
from benchmarks.subject import LOGS, ROOT, START, BenchmarkError, console, environment
from benchmarks.subjects import MODEL
from models import lora
from worker.engines.servers.process import free_port

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
"""Where compilers keep what they made; an empty folder for each start."""

SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
CHOICE = {"type": "function", "function": {"name": "look"}}
TOOLS = {"tools": [TOOL], "tool_choice": CHOICE}


@dataclass(frozen=True)
class Kind:
    """A request that may be the first of its kind.

    Args:
        body: what it asks beside the prompt.
        engine_args: what the worker needs for it.
    """

    body: dict[str, Any] = field(default_factory=dict)
    route: str = "/v1/completions"
    engine_args: dict[str, Any] = field(default_factory=dict)


WHOLE = {"stream": False}
"""For what vLLM doesn't stream; its first token is the answer."""

KINDS = {
    "plain": Kind(),
    "logprobs": Kind({"logprobs": 3}),
    "prompt_logprobs": Kind({"prompt_logprobs": 2, **WHOLE}),
    "echo with logprobs": Kind({"echo": True, "logprobs": 1, **WHOLE}),
    "beam search": Kind({"use_beam_search": True, "n": 2, **WHOLE}),
    "penalties": Kind(
        {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2}
    ),
    "min_p, top_k, top_p": Kind({"temperature": 0.8, "min_p": 0.05, "top_k": 20, "top_p": 0.9}),
    "seed": Kind({"temperature": 0.8, "seed": 7}),
    "bad_words": Kind({"bad_words": ["def"]}),
    "logit_bias": Kind({"logit_bias": {"7": 5}}),
    "allowed_token_ids": Kind({"allowed_token_ids": [7, 8, 9]}),
    "min_tokens": Kind({"min_tokens": 4}),
    "stop": Kind({"stop": ["\n\n"]}),
    "n": Kind({"temperature": 0.8, "n": 4}),
    "JSON schema": Kind({"structured_outputs": {"json": SCHEMA}}),
    "JSON object": Kind({"response_format": {"type": "json_object"}}),
    "regex": Kind({"structured_outputs": {"regex": "[ab]+"}}),
    "choice": Kind({"structured_outputs": {"choice": ["yes", "no"]}}),
    "grammar": Kind({"structured_outputs": {"grammar": 'root ::= "a" | "b"'}}),
    "chat": Kind({}, "/v1/chat/completions"),
    "chat with logprobs": Kind({"logprobs": True, "top_logprobs": 2}, "/v1/chat/completions"),
    "tools": Kind(
        TOOLS,
        "/v1/chat/completions",
        {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"},
    ),
    "/v1/messages": Kind({}, "/v1/messages"),
    "/v1/embeddings": Kind({}, "/v1/embeddings", {"runner": "pooling"}),
    "LoRA": Kind({"model": "adapter"}, engine_args={"enable_lora": True, "max_lora_rank": 8}),
}


def asked(kind: Kind) -> dict[str, Any]:
    """The whole body of a request."""
    body = {"model": str(MODEL), "max_tokens": 8, "stream": True, "temperature": 0}
    if kind.route == "/v1/completions":
        body["prompt"] = "import os\n\ndef "
    elif kind.route == "/v1/embeddings":
        body = {"model": str(MODEL), "input": "Hello"}
    else:
        body["messages"] = [{"role": "user", "content": "Hello"}]
    return body | kind.body


@asynccontextmanager
async def worker(kind: Kind, folder: Path) -> AsyncIterator[tuple[httpx.AsyncClient, float]]:
    """A worker that is ready, and the seconds that its start took.

    Raises:
        BenchmarkError: it ended, or was not ready after START seconds.
    """
    args = json.loads(os.environ.get("ENGINE_ARGS", "{}")) | kind.engine_args
    if "enable_lora" in args:
        lora.make(folder)
        args["lora_modules"] = [{"name": "adapter", "path": str(folder)}]
    port = free_port()
    variables = {
        "MODE_TO_RUN": "api",
        "MODEL": str(MODEL),
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "ENGINE_ARGS": json.dumps({"kv_cache_memory_bytes": 256 << 20} | args),
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        **{name: str(folder / name.lower()) for name in CACHES},
    }
    LOGS.mkdir(parents=True, exist_ok=True)
    told = LOGS / "first-requests.log"
    begin = time.monotonic()
    with told.open("w", encoding="utf-8") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "worker"),
            cwd=ROOT,
            env=environment(**variables),
            stdout=log,
            stderr=log,
        )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            while not await is_ready(client):
                if process.returncode is not None or time.monotonic() > begin + START:
                    last = told.read_text(encoding="utf-8").splitlines()[-1:]
                    raise BenchmarkError(f"the worker did not become ready: {last}")
                await asyncio.sleep(0.1)
            yield client, time.monotonic() - begin
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def is_ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/ping")).status_code == 200
    except httpx.TransportError:
        return False


async def first_byte(client: httpx.AsyncClient, kind: Kind) -> float:
    """Seconds until the first text of an answer, which is read to its end.

    Raises:
        BenchmarkError: the answer is an error.
    """
    begin = time.monotonic()
    first = None
    async with client.stream("POST", kind.route, json=asked(kind)) as answer:
        async for piece in answer.aiter_bytes():
            first = first or time.monotonic() - begin
            if answer.status_code != 200:
                raise BenchmarkError(f"{kind.route}: {answer.status_code} {piece[:300]!r}")
    assert first
    return first


class Beside:
    """A stream that runs all the time, and when its pieces came."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []
        self.runs = asyncio.Event()

    async def run(self, client: httpx.AsyncClient) -> None:
        body = asked(Kind()) | {"max_tokens": 1500, "ignore_eos": True}
        while True:
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                async for _ in answer.aiter_bytes():
                    self.arrivals.append(time.monotonic())
                    self.runs.set()

    def longest_gap(self, begin: float) -> float:
        """Seconds without a piece since `begin`."""
        times = [begin, *(one for one in self.arrivals if one > begin), time.monotonic()]
        return max(after - before for before, after in pairwise(times))


async def measure(name: str) -> tuple[float, list[float], list[float]]:
    """Seconds of the start, until the first text of each request, and of the gaps beside them."""
    kind = KINDS[name]
    firsts, gaps = [], []
    with tempfile.TemporaryDirectory() as folder:
        async with worker(kind, Path(folder)) as (client, start):
            beside = Beside()
            running = None
            if kind.route != "/v1/embeddings":
                running = asyncio.create_task(beside.run(client))
                await beside.runs.wait()
            for _ in range(2):
                begin = time.monotonic()
                firsts.append(await first_byte(client, kind))
                await asyncio.sleep(0.2)
                gaps.append(beside.longest_gap(begin) if running else 0.0)
            if running:
                running.cancel()
                with suppress(asyncio.CancelledError):
                    await running
    return start, firsts, gaps


def main(
    kinds: Annotated[
        list[str] | None, typer.Option("--kind", help="Only this kind; repeatable.")
    ] = None,
) -> None:
    """Print a Markdown table, a row for each kind."""
    if unknown := [name for name in kinds or [] if name not in KINDS]:
        raise typer.BadParameter(f"--kind {unknown[0]}: one of {', '.join(KINDS)}")
    if warning := machine.busy():
        console.print(f"[yellow]![/] {warning}")
    print("| kind | first, s | second, s | gap beside it, s | beside the second, s | start, s |")
    print("|---|--:|--:|--:|--:|--:|")
    for name in kinds or KINDS:
        try:
            start, firsts, gaps = asyncio.run(measure(name))
        except BenchmarkError as error:
            print(f"| {name} | {error} | | | | |", flush=True)
            continue
        cells = [f"{seconds:.3f}" for seconds in (*firsts, *gaps)]
        print(f"| {name} | {' | '.join(cells)} | {start:.1f} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
