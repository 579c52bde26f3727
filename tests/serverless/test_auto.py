"""CONCURRENCY_MODIFIER=auto: jobs are taken as the engine would run them at once."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import (
    GGUF,
    START,
    TOKEN_BYTES,
    needs,
    platform,
    soon,
    start,
    stop,
    worker_environment,
)

pytestmark = pytest.mark.engine

WATCHED_WORKER = [sys.executable, "-m", "tests.serverless.watched_worker"]


def job(name: str, tokens: int) -> dict[str, Any]:
    options = {"max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    return {"id": name, "input": {"prompt": "import os\n\ndef ", "options": options}}


def lines_of(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


async def test_a_crowd_fills_the_cache_and_nobody_is_driven_out(tmp_path: Path) -> None:
    told = tmp_path / "told"
    async with platform() as served:
        environment = worker_environment(
            **served.environment(),
            CONCURRENCY_MODIFIER="auto",
            WATCHED=str(told),
            ENGINE_ARGS=json.dumps({"kv_cache_memory_bytes": 4096 * TOKEN_BYTES}),
        )
        process, output = start(WATCHED_WORKER, environment)
        try:
            await soon(lambda: served.polls or process.poll() is not None, START, "job-take")
            crowd = [job(f"j{i}", 200) for i in range(60)]
            crowd.insert(30, job("long", 1800))
            await served.give(*crowd)
            await asyncio.gather(*(served.end_of(each["id"], 200) for each in crowd))
            for each in crowd:
                [end] = served.done[each["id"]]
                usage = end["output"][-1]["usage"]
                assert usage["completion_tokens"] == each["input"]["options"]["max_tokens"]
        finally:
            assert stop(process) == 0
        seen = [json.loads(line) for line in lines_of(told)]
        assert sum(each["preempted"] for each in seen) == 0
        most = max(each["running"] for each in seen)
        assert 8 <= most <= 40, output.text()
        assert max(each["waiting"] for each in seen) <= 2
        assert output.find("jobs at once")


@needs("llama-server")
async def test_a_server_takes_as_many_as_it_has_slots() -> None:
    async with platform() as served:
        environment = worker_environment(
            **served.environment(),
            CONCURRENCY_MODIFIER="auto",
            MODEL=str(GGUF),
            ENGINE_ARGS="{}",
            MAX_MODEL_LEN="512",
        )
        process, output = start([sys.executable, "-m", "worker"], environment)
        try:
            await soon(lambda: served.polls or process.poll() is not None, START, "job-take")
            crowd = [job(f"j{i}", 40) for i in range(48)]
            await served.give(*crowd)
            await asyncio.gather(*(served.end_of(each["id"]) for each in crowd))
            assert max(served.batch_sizes) == 32
        finally:
            assert stop(process) == 0, output.text()
