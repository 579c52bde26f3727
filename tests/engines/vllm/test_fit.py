"""MAX_MODEL_LEN and CONCURRENCY_MODIFIER=auto, fitted to the model and to the KV cache."""

import json
import re

import pytest

from tests.support import (
    START,
    TOKEN_BYTES,
    WORKER,
    platform,
    soon,
    start,
    stop,
    worker_environment,
)

pytestmark = pytest.mark.engine


async def test_a_small_kv_cache_shortens_the_context_and_counts_the_slots() -> None:
    async with platform() as served:
        environment = worker_environment(
            **served.environment(),
            CONCURRENCY_MODIFIER="auto",
            ENGINE_ARGS=json.dumps({"kv_cache_memory_bytes": 1024 * TOKEN_BYTES}),
        )
        process, output = start(WORKER, environment)
        try:
            await soon(lambda: served.polls or process.poll() is not None, START, "job-take")
            line = output.find("max_model_len is ")
            assert line, output.text()
            assert "(MAX_MODEL_LEN=25000)" in line
            fitted = int(re.search(r"max_model_len is (\d+)", line)[1])
            assert 128 <= fitted <= 1024
            assert output.find("taking jobs, 1 at once")

            job_input = {"prompt": "word " * 2000}
            end = await served.answer({"id": "long", "input": job_input})
            assert f"at most {fitted - 1}, one less than max_model_len" in end["error"]
            options = {"max_tokens": 50, "ignore_eos": True}
            end = await served.answer({"id": "ok", "input": {"prompt": "x", "options": options}})
            assert end["output"][0]["usage"]["completion_tokens"] == 50
        finally:
            assert stop(process) == 0
