"""No request is the one that pays for what all of its kind need."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from benchmarks.first_requests import KINDS, asked
from models import lora
from tests.support import MODEL, Endpoint, endpoint, worker_environment
from worker.engines.vllm.warmup import warm
from worker.errors import EngineStartError


def served(folder: Path, **variables: str) -> Any:
    """A worker for every kind of request, whose compilers start from nothing and leave traces."""
    lora.make(folder)
    args = json.loads(worker_environment()["ENGINE_ARGS"])
    args |= {"enable_lora": True, "max_lora_rank": 8}
    args["lora_modules"] = [{"name": "adapter", "path": str(folder)}]
    made = {
        name: str(folder / "made" / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TORCH_TRACE")
    }
    return endpoint(ENGINE_ARGS=json.dumps(args), **made, **variables)


def compiled(folder: Path) -> set[tuple[str, int]]:
    """What compilers have written: their caches, and a trace of all that they did."""
    made = (folder / "made").rglob("*")
    return {(str(path), path.stat().st_size) for path in made if path.is_file()}


def ask_for_everything(worker: Endpoint) -> None:
    for kind in KINDS.values():
        if kind.route == "/v1/embeddings":  # another engine's
            continue
        body = asked(kind)
        if "model" not in kind.body:
            body["model"] = MODEL
        worker_input = {"openai_route": kind.route, "openai_input": body}
        status = worker.runsync(worker_input)
        assert status["status"] == "COMPLETED", status
        assert "error" not in str(status["output"]), body


@pytest.mark.engine
def test_neither_the_start_nor_a_request_compiles_anything(tmp_path: Path) -> None:
    with served(tmp_path) as worker:
        ask_for_everything(worker)
        assert not compiled(tmp_path)


@pytest.mark.engine
def test_where_something_is_compiled_the_start_has_done_it(tmp_path: Path) -> None:
    with served(tmp_path, TORCHDYNAMO_DISABLE="0") as worker:
        before = compiled(tmp_path)
        assert before
        assert not worker.output.find("no warm-up")
        ask_for_everything(worker)
        assert compiled(tmp_path) == before


@pytest.mark.engine
def test_an_engine_without_a_tokenizer_starts_and_serves_tokens() -> None:
    with endpoint(ENGINE_ARGS=json.dumps({"skip_tokenizer_init": True})) as worker:
        body = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": True}
        status = worker.runsync({"openai_route": "/v1/completions", "openai_input": body})
        assert status["status"] == "COMPLETED", status
        assert status["output"][0]["usage"]["completion_tokens"] == 3


Answer = Callable[[dict[str, Any]], httpx.Response]


def error(status: int, message: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"message": message}})


async def warmed(
    answer: Answer, *, device: str = "cuda", backend: str = "auto", lora: object = None
) -> list[str]:
    """Warm an engine that gives these answers; what it was asked for beside the plain request."""
    asked_for = []

    def handle(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        asked_for.extend(body.keys() - {"prompt", "max_tokens", "ignore_eos"})
        return answer(body)

    config = SimpleNamespace(
        model_config=SimpleNamespace(skip_tokenizer_init=False),
        device_config=SimpleNamespace(device_type=device),
        lora_config=lora,
        structured_outputs_config=SimpleNamespace(backend=backend),
    )
    transport = httpx.MockTransport(handle)
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
        await warm(client, config)
    return asked_for


async def test_on_a_gpu_all_that_has_kernels_is_asked_for() -> None:
    found = await warmed(lambda _: httpx.Response(200), backend="xgrammar")
    assert {"logprobs", "prompt_logprobs", "min_p", "seed", "structured_outputs"} <= set(found)


async def test_the_backend_of_structured_outputs_is_left_open() -> None:
    found = await warmed(lambda _: httpx.Response(200))
    assert "logprobs" in found
    assert "structured_outputs" not in found


async def test_with_adapters_no_prompt_logprobs_meet_a_batch() -> None:
    found = await warmed(lambda _: httpx.Response(200), lora=SimpleNamespace())
    assert "logprobs" in found
    assert "prompt_logprobs" not in found


async def test_where_nothing_is_compiled_one_request_is_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert await warmed(lambda _: httpx.Response(200), device="cpu") == []
    assert "logprobs" in await warmed(lambda _: httpx.Response(200))


@pytest.mark.parametrize(("status", "level"), [(400, "INFO"), (500, "WARNING")])
async def test_a_kind_that_fails_is_told_and_the_start_goes_on(
    caplog: pytest.LogCaptureFixture, status: int, level: str
) -> None:
    caplog.set_level(logging.INFO)
    found = await warmed(
        lambda body: error(status, "no minimum") if "min_p" in body else httpx.Response(200)
    )
    assert "bad_words" in found
    told = [(one.levelname, one.message) for one in caplog.records if "warm-up" in one.message]
    assert told == [(level, "no warm-up of min_p: no minimum")]


async def test_an_engine_that_generates_nothing_does_not_start() -> None:
    with pytest.raises(EngineStartError, match="generates nothing: out of memory"):
        await warmed(lambda _: error(500, "out of memory"))


async def test_a_model_that_takes_no_plain_prompt_starts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert await warmed(lambda _: error(400, "it needs a picture")) == []
    assert "no warm-up generation: it needs a picture" in caplog.text
