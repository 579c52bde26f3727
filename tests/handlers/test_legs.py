"""One handler's file in the queue, over HTTP and in `try`, over a real engine."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.test_api import Served, api
from tests.support import (
    GGUF,
    ROOT,
    START,
    WORKER,
    Endpoint,
    Output,
    endpoint,
    eventually,
    needs,
    start,
    stop,
    worker_environment,
)

pytestmark = [pytest.mark.engine, needs("llama-server")]

CODE = """
from pydantic import BaseModel, Field
from worker.job.chunks import text_of
from worker.job.input import parse

class Input(BaseModel):
    text: str = Field(min_length=1)
    does: str = ""

made = []

async def setup(engine):
    made.append(await text_of(engine.generate(asked("import os"))))

async def handler(job, engine):
    wanted = job["input"]
    if wanted.does == "raise":
        raise RuntimeError("the bug of\\nmany lines")
    if wanted.does == "refuse":
        yield {"text": "so far"}
        yield {"error": "no such voice"}
    if wanted.does == "wait":
        await text_of(engine.generate(asked(wanted.text, 1900)))
    yield [made[0], len(made)]
    async for delta in engine.generate(asked(wanted.text)):
        yield {"text": delta.text, "usage": "its own"}
    yield 7
    yield None

def asked(prompt, max_tokens=8):
    options = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return parse({"prompt": prompt, "options": options})
"""

ENGINE = {"MODEL": str(GGUF), "ENGINE_ARGS": "{}"}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("handlers") / "my_handler.py"
    file.write_text(CODE)
    return file


@pytest.fixture(scope="module")
def queue(file: Path) -> Iterator[Endpoint]:
    with endpoint(HANDLER=str(file), CONCURRENCY_MODIFIER="4", **ENGINE) as served:
        yield served


@pytest.fixture(scope="module")
def http(file: Path) -> Iterator[Served]:
    with api(HANDLER=str(file), **ENGINE) as served:
        eventually(lambda: served.ping() == 200, START, "a ready engine")
        yield served


def text(chunks: list[Any]) -> str:
    return "".join(chunk["text"] for chunk in chunks if isinstance(chunk, dict))


def test_the_queue_and_http_answer_alike(queue: Endpoint, http: Served) -> None:
    asked = {"text": "import os\n\ndef "}
    status = queue.runsync(asked)
    assert status["status"] == "COMPLETED", status
    output = status["output"]
    assert output[0][1] == 1, "setup ran once"
    assert output[-2:] == [7, None]
    assert text(output)
    answered = http.http.post("/predict", json=asked)
    assert answered.status_code == 200
    assert answered.headers["content-type"] == "application/json"
    assert text(answered.json()) == text(output)
    assert answered.json()[0] == output[0]
    headers = {"Accept": "text/event-stream"}
    with http.http.stream("POST", "/predict", json=asked, headers=headers) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert text([json.loads(event) for event in events]) == text(output)
    assert json.loads(events[-2]) == 7


def test_the_start_names_the_setup(queue: Endpoint, http: Served) -> None:
    for output in (queue.output, http.output):
        [line] = [line for line in output.lines if "ready after" in line]
        assert ", setup " in line


@pytest.mark.parametrize(
    ("given", "code", "sentence"),
    [
        ({"text": ""}, 400, 'text: "" is not allowed; it must be at least 1 character'),
        ({"text": "x", "does": "refuse"}, 500, "no such voice"),
        ({"text": "x", "does": "raise"}, 500, "the handler raised RuntimeError: the bug of"),
    ],
)
def test_what_fails_is_one_sentence(
    queue: Endpoint, http: Served, given: dict[str, str], code: int, sentence: str
) -> None:
    assert queue.error(given) == sentence
    answer = http.http.post("/predict", json=given)
    assert answer.status_code == code
    assert answer.json()["error"]["message"] == sentence


def test_the_traceback_is_in_the_log_only(queue: Endpoint) -> None:
    queue.error({"text": "x", "does": "raise"})
    assert queue.output.find('raise RuntimeError("the bug of')


def test_an_error_after_the_first_chunk_is_an_event(http: Served) -> None:
    headers = {"Accept": "text/event-stream"}
    answer = http.http.post("/predict", json={"text": "x", "does": "refuse"}, headers=headers)
    first, last = answer.text.strip().split("\n\n")
    assert json.loads(first.removeprefix("data: ")) == {"text": "so far"}
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "no such voice"


def test_openais_routes_are_the_engines_own(queue: Endpoint, http: Served) -> None:
    body = {"prompt": "import os", "max_tokens": 4}
    status = queue.runsync({"openai_route": "/v1/completions", "openai_input": body})
    assert status["output"][0]["usage"]["completion_tokens"] == 4
    assert http.openai.completions.create(model=str(GGUF), **body).usage.completion_tokens == 4


def test_predict_asks_for_the_key_and_for_json(http: Served) -> None:
    url = f"{http.url}/predict"
    assert httpx.post(url, json={"text": "x"}).status_code == 401
    assert http.http.post("/predict", content=b"{").status_code == 400
    assert http.http.get("/predict").status_code in {404, 405}


async def test_a_client_that_goes_away_frees_its_request(http: Served) -> None:
    headers = {"Authorization": f"Bearer {http.openai.api_key}"}
    async with httpx.AsyncClient(base_url=http.url, headers=headers) as client:
        waiting = {"text": "x", "does": "wait"}
        call = asyncio.create_task(client.post("/predict", json=waiting, timeout=60))
        busy = "tripod_requests_in_flight"
        await asyncio.to_thread(eventually, lambda: http.metric(busy) == 1, 30, "a call")
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    eventually(lambda: http.metric(busy) == 0, 5, "a freed request")


def test_a_setup_that_raises_is_a_failed_start(tmp_path: Path) -> None:
    file = tmp_path / "failing.py"
    file.write_text(
        CODE.replace("    made.append(", "    raise OSError('no voice')\n    made.append(")
    )
    queue = {"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1:1/job-take/$ID?"}
    process, output = start(WORKER, worker_environment(HANDLER=str(file), **ENGINE, **queue))
    try:
        assert process.wait(START) == 1
        eventually(
            lambda: output.find(f"the handler's setup failed: {file}:13: OSError: no voice"),
            5,
            "the sentence",
        )
    finally:
        stop(process)


def test_try_reads_it_anew_and_keeps_what_setup_made(file: Path) -> None:
    command = [sys.executable, "-m", "worker", "try", "--reload"]
    process = subprocess.Popen(
        [*command, "--input", '{"text": "import os"}'],
        cwd=ROOT,
        env=worker_environment(HANDLER=str(file), MODE_TO_RUN="pod", **ENGINE),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = Output(process)
    assert process.stdin

    def say(line: str) -> None:
        process.stdin.write(f"{line}\n")
        process.stdin.flush()

    try:
        eventually(lambda: output.find("✓ finished") or process.poll() is not None, START, "7")
        assert output.find('", 1]'), output.text()
        file.write_text(CODE.replace("yield 7", "yield 'edited'"))
        say("")
        eventually(lambda: output.find('"edited"'), 30, "the edited answer")
        say('{"text": ""}')
        eventually(lambda: output.find("✗ failed: text: "), 30, "the refusal of the whole input")
        assert len([line for line in output.lines if '", 1]' in line]) == 2, output.text()
        assert sum("ready after" in line for line in output.lines) == 1
        process.stdin.close()
        assert process.wait(30) == 1, "the last job failed"
    finally:
        file.write_text(CODE)
        if process.poll() is None:
            stop(process)
