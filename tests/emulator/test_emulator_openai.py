"""The OpenAI face: the official client with a worker on the real SDK, then every odd answer."""

import asyncio
import http.client
import json
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from emulator.app import build_app
from emulator.client_api import ClientApi
from emulator.endpoint import Endpoint
from emulator.jobs import Job, Policy, Status
from emulator.store import Limits
from emulator.web import MB
from tests.emulator.conftest import start

TEXT = "naïve 日本語 🦙👩‍🚀"
CHAT: Any = {"model": "org/echo", "messages": [{"role": "user", "content": TEXT}]}


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    worker = [sys.executable, str(Path(__file__).parent / "openai_worker.py")]
    emulator = start(tmp_path_factory.mktemp("openai"), ["--api-key", "right", "--", *worker], None)
    try:
        yield emulator.ready()
    finally:
        emulator.stop()


@pytest.fixture(scope="module")
def client(emulator: Any) -> Iterator[openai.OpenAI]:
    with openai_client(emulator, "right") as client:
        yield client


def openai_client(emulator: Any, key: str) -> openai.OpenAI:
    transport = openai.DefaultHttpxClient(trust_env=False)
    base_url = f"{emulator.url}/openai/v1"
    return openai.OpenAI(base_url=base_url, api_key=key, http_client=transport)


class Gate:
    """Holds a job of the worker until `open`."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener, self.port = listener, listener.getsockname()[1]

    def reached(self) -> str:
        """Wait for the job; returns its id."""
        self.connection, _ = self.listener.accept()
        self.connection.settimeout(30)
        self.words = self.connection.makefile()
        return self.words.readline().strip()

    def open(self) -> None:
        self.connection.sendall(b"x")

    def rest(self) -> str:
        """What the worker says until it lets go."""
        return self.words.read().strip()


@pytest.fixture
def gate() -> Iterator[Gate]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        gate = Gate(listener)
        yield gate
        gate.words.close()
        gate.connection.close()


@contextmanager
def raw_stream(emulator: Any, **body: Any) -> Iterator[tuple[httpx.Response, Iterator[bytes]]]:
    url, headers = f"{emulator.url}/openai/v1/chat/completions", {"Authorization": "Bearer right"}
    with (
        httpx.Client(trust_env=False, timeout=60, headers=headers) as http,
        http.stream("POST", url, json={**CHAT, "stream": True, **body}) as response,
    ):
        yield response, response.iter_raw()


# ---- the official client and the real SDK ---------------------------------------------------


def test_whole_answers(client: openai.OpenAI) -> None:
    assert client.chat.completions.create(**CHAT).choices[0].message.content == TEXT
    completion = client.completions.create(model="org/echo", prompt=TEXT)
    assert completion.choices[0].text == TEXT
    vectors = client.embeddings.create(model="org/echo", input="a", encoding_format="float")
    assert vectors.data[0].embedding == [0.5, -1.0]
    response = client.responses.create(model="org/echo", input="a")
    assert (response.object, response.error) == ("response", None)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["org/echo"]
    assert client.models.retrieve("org/echo").owned_by == "test"


@pytest.mark.parametrize("how", [{}, {"objects": True}])
def test_stream(client: openai.OpenAI, how: dict[str, bool]) -> None:
    with client.chat.completions.create(**CHAT, stream=True, extra_body=how) as stream:
        pieces = [chunk.choices[0].delta.content for chunk in stream]
    assert "".join(pieces) == TEXT
    assert len(pieces) == (len(TEXT) + 1) // 2 if how else len(TEXT)


@pytest.mark.parametrize("how", [{}, {"objects": True}])
def test_chunks_arrive_at_once_and_as_they_were_sent(
    emulator: Any, gate: Gate, how: dict[str, bool]
) -> None:
    ask = {"gate": gate.port, "chunks_before": 1, **how}
    with raw_stream(emulator, **ask) as (response, chunks):
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        job_id = gate.reached()
        assert response.headers["x-request-id"] == job_id
        first = next(chunks)
        gate.open()
        whole = first + b"".join(chunks)
    assert first.count(b"data: {") == (1 if how else 2)
    *events, done, end = whole.decode().split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
    assert "".join(delta["content"] for delta in deltas) == TEXT
    assert "🦙".encode() in whole


def test_job_is_one_like_any_other(
    emulator: Any, client: openai.OpenAI, gate: Gate, eventually: Callable[..., Any]
) -> None:
    """The stream ends with [DONE], after which the client hangs up, and the job goes on."""
    before = emulator.call("GET", "health", key="right")["jobs"]["completed"]
    ask = {"gate": gate.port, "chunks_before": 1000}
    list(client.chat.completions.create(**CHAT, stream=True, extra_body=ask))
    job_id = gate.reached()
    assert job_id.startswith("sync-")

    def job() -> Any:
        return emulator.call("GET", f"status/{job_id}", key="right")

    assert job()["status"] == "IN_PROGRESS"
    gate.open()
    assert gate.rest() == ""
    eventually(lambda: job()["status"] == "COMPLETED")
    assert job()["output"][-1] == "data: [DONE]\n\n"
    assert emulator.call("GET", "health", key="right")["jobs"]["completed"] > before


def error_of(code: int, kind: str, message: str) -> str:
    return json.dumps({"message": message, "type": kind, "param": "max_tokens", "code": code})


@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_worker(client: openai.OpenAI, stream: bool) -> None:
    fail = {"fail": error_of(400, "BadRequestError", "max_tokens is zu groß")}
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(**CHAT, stream=stream, extra_body=fail)
    assert bad.value.body == json.loads(fail["fail"])
    assert bad.value.param == "max_tokens"
    assert (bad.value.request_id or "").startswith("sync-")
    with pytest.raises(openai.InternalServerError) as broken:
        client.with_options(max_retries=0).chat.completions.create(
            **CHAT, stream=stream, extra_body={"fail": "the engine died while this job was running"}
        )
    message = "the engine died while this job was running"
    error = {"message": message, "type": "server_error", "param": None, "code": None}
    assert (broken.value.status_code, broken.value.body) == (500, error)


def test_route_that_the_worker_does_not_serve(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="/v1/audio/speech is not served here"):
        client.audio.speech.create(model="org/echo", voice="alloy", input="a")


def test_error_after_the_first_chunk_ends_the_stream(client: openai.OpenAI, emulator: Any) -> None:
    ask = {"chunks_before": 1, "fail": error_of(400, "BadRequestError", "too late")}
    with client.chat.completions.create(**CHAT, stream=True, extra_body=ask) as stream:
        texts = []
        with pytest.raises(openai.APIError, match="too late") as error:
            texts += [chunk.choices[0].delta.content for chunk in stream]
    assert error.value.body == json.loads(str(ask["fail"]))
    with raw_stream(emulator, **ask) as (response, chunks):
        whole = b"".join(chunks)
    assert response.status_code == 200
    assert whole.endswith(b'data: {"error":%b}\n\n' % compact(str(ask["fail"])))
    assert whole.count(b"data: ") == 3


def compact(text: str) -> bytes:
    return json.dumps(json.loads(text), separators=(",", ":")).encode()


def test_wrong_key(emulator: Any) -> None:
    with (
        openai_client(emulator, "wrong") as client,
        pytest.raises(openai.AuthenticationError, match="this endpoint's API key") as error,
    ):
        client.models.list()
    assert (error.value.code, error.value.type) == ("invalid_api_key", "invalid_request_error")


def test_leaving_a_stream_cancels_the_job(emulator: Any, client: openai.OpenAI, gate: Gate) -> None:
    ask = {"gate": gate.port, "chunks_before": 1}
    stream = client.chat.completions.create(**CHAT, stream=True, extra_body=ask)
    job_id = gate.reached()
    next(iter(stream))
    stream.close()
    assert gate.rest() == "cancelled"
    assert emulator.call("GET", f"status/{job_id}", key="right")["status"] == "CANCELLED"


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_before_the_answer_cancels_the_job(emulator: Any, gate: Gate, stream: bool) -> None:
    url = httpx.URL(emulator.url)
    connection = http.client.HTTPConnection(url.host, url.port)
    body = json.dumps({**CHAT, "gate": gate.port, "stream": stream})
    headers = {"Authorization": "Bearer right"}
    connection.request("POST", f"{url.path}/openai/v1/chat/completions", body, headers)
    job_id = gate.reached()
    connection.close()
    assert gate.rest() == "cancelled"
    assert emulator.call("GET", f"status/{job_id}", key="right")["status"] == "CANCELLED"


@pytest.mark.parametrize("chunks_before", [0, 1])
def test_cancelled_job_is_not_sent_again(
    emulator: Any, client: openai.OpenAI, gate: Gate, chunks_before: int
) -> None:
    """The client's second try, were there one, would wait at the gate for ever."""

    def cancel() -> None:
        emulator.call("POST", f"cancel/{gate.reached()}", key="right")

    ask = {"gate": gate.port, "chunks_before": chunks_before}
    with ThreadPoolExecutor(1) as pool:
        cancelling = pool.submit(cancel)
        with pytest.raises(openai.APIError, match="was cancelled"):
            list(client.chat.completions.create(**CHAT, stream=True, extra_body=ask))
        cancelling.result()
    assert gate.rest() == "cancelled"


# ---- this process, with the test as the worker ----------------------------------------------


class Asking:
    """One request whose job the test answers."""

    def __init__(self, http: httpx.AsyncClient, endpoint: Endpoint) -> None:
        self.http, self.endpoint = http, endpoint

    async def job(self, **ask: Any) -> Job:
        post = self.http.post("openai/v1/chat/completions", json=ask)
        self.answering = asyncio.create_task(post)
        (job,) = await self.endpoint.take("w", 1, 10)
        return job

    def chunk(self, job: Job, output: Any) -> None:
        self.endpoint.add_chunk("w", job.id, json.dumps({"output": output}).encode())

    async def end(self, job: Job, output: Any = None, error: str | None = None) -> httpx.Response:
        self.endpoint.finish("w", job.id, output=output, error=error, size=0)
        return await self.answering


@pytest_asyncio.fixture
async def asking(http: httpx.AsyncClient, endpoint: Endpoint) -> AsyncIterator[Asking]:
    asking = Asking(http, endpoint)
    yield asking
    asking.answering.cancel()


async def test_what_the_worker_gets(http: httpx.AsyncClient, endpoint: Endpoint) -> None:
    sent = [
        http.post("openai/v1/chat/completions?a=b", json={"é": [1]}),
        http.post("openai/v1/any/other", json={}),
        http.get("openai/v1/models/org%2Fecho"),
    ]
    for request, job_input in zip(
        sent,
        [
            {"openai_route": "/v1/chat/completions", "openai_input": {"é": [1]}},
            {"openai_route": "/v1/any/other", "openai_input": {}},
            {"openai_route": "/v1/models/org/echo", "openai_input": None},
        ],
        strict=True,
    ):
        answering = asyncio.create_task(request)
        (job,) = await endpoint.take("w", 1, 10)
        assert job.input == job_input
        assert job.sync
        endpoint.finish("w", job.id, output={"a": "ü"}, error=None, size=0)
        answer = await answering
        assert (answer.status_code, answer.json()) == (200, {"a": "ü"})
        assert answer.headers["x-request-id"] == job.id


@pytest.mark.parametrize("output", [{"a": 1}, [{"a": 1}]])
async def test_object_and_list_of_one(asking: Asking, output: Any) -> None:
    job = await asking.job(stream=False)
    assert (await asking.end(job, output)).json() == {"a": 1}


async def test_generator_that_does_not_aggregate(asking: Asking) -> None:
    job = await asking.job(stream=None)
    asking.chunk(job, {"a": 1})
    assert (await asking.end(job, [])).json() == {"a": 1}


@pytest.mark.parametrize("output", [None, [], "text", [{}, {}], [1]])
async def test_answer_that_is_not_one_object(asking: Asking, output: Any) -> None:
    answer = await asking.end(await asking.job(), output)
    assert answer.status_code == 500
    assert "the worker's answer is not one object but" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("outputs", "text"),
    [
        ({"a": "ü"}, 'data: {"a":"ü"}\n\ndata: [DONE]\n\n'),
        ([{"a": 1}, {"b": 2}], 'data: {"a":1}\n\ndata: {"b":2}\n\ndata: [DONE]\n\n'),
        (["data: 1\n", "\ndata: 2\r\n\r\n"], "data: 1\n\ndata: 2\r\n\r\n"),
        (["a \ud83e"], "a ?"),
    ],
)
async def test_stream_of_a_worker_that_answers_at_once(
    asking: Asking, outputs: Any, text: str
) -> None:
    answer = await asking.end(await asking.job(stream=True), outputs)
    assert (answer.status_code, answer.content.decode()) == (200, text)


async def test_stream_without_a_chunk(asking: Asking) -> None:
    answer = await asking.end(await asking.job(stream=True), [])
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the worker's answer is empty"


FLAT = {"object": "error", "message": "no", "type": "NotFoundError", "param": None, "code": 404}
NESTED = {"error": {"message": "no", "type": "NotFoundError", "param": None, "code": 404}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("output", [FLAT, NESTED, [FLAT], [NESTED]])
async def test_output_that_is_an_error(asking: Asking, output: Any, stream: bool) -> None:
    answer = await asking.end(await asking.job(stream=stream), output)
    assert answer.status_code == 404
    assert answer.json()["error"].items() >= NESTED["error"].items()


async def test_chunk_that_is_an_error_ends_the_job(asking: Asking) -> None:
    for chunks, status in (([NESTED], 404), (["data: 1\n\n", NESTED], 200)):
        job = await asking.job(stream=True)
        for chunk in chunks:
            asking.chunk(job, chunk)
        answer = await asking.answering
        assert answer.status_code == status
        body = json.dumps(NESTED, separators=(",", ":"))
        text = body if status == 404 else f"data: 1\n\ndata: {body}\n\n"
        assert answer.text == text
        assert job.status is Status.CANCELLED


@pytest.mark.parametrize(
    "output", [{"object": "response", "error": {"message": "no"}}, {"error": None}]
)
async def test_answer_with_an_error_field(asking: Asking, output: Any) -> None:
    answer = await asking.end(await asking.job(), output)
    assert (answer.status_code, answer.json()) == (200, output)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        ('{"message": "m", "code": 422}', 422, {"type": "invalid_request_error", "code": 422}),
        ('{"error": {"message": "m", "code": 503}}', 503, {"type": "server_error", "code": 503}),
        ('{"message": "m", "code": 200}', 500, {"type": "server_error", "code": 200}),
        ('{"message": "m", "code": true}', 500, {"code": True}),
        ('{"message": "m", "code": "model_not_found"}', 500, {"code": "model_not_found"}),
        ('{"message": "m", "param": "n"}', 500, {"param": "n", "code": None}),
        ("m", 500, {"type": "server_error", "code": None}),
        ("", 500, {"message": ""}),
        ("12", 500, {"message": "12"}),
        ('"m"', 500, {"message": '"m"'}),
        ('{"message": 1}', 500, {"message": '{"message": 1}'}),
        ('{"error": "m"}', 500, {"message": '{"error": "m"}'}),
        ("\ud83e", 500, {"message": "\ud83e"}),
    ],
)
async def test_error_texts(
    asking: Asking, error: str, status: int, said: dict[str, Any], stream: bool
) -> None:
    answer = await asking.end(await asking.job(stream=stream), error=error)
    body = answer.json()["error"]
    assert (answer.status_code, body.keys()) == (status, {"message", "type", "param", "code"})
    assert body.items() >= ({"message": "m"} | said).items()
    assert "x-should-retry" not in answer.headers


@pytest.mark.parametrize("stream", [False, True])
async def test_cancelled_and_timed_out(asking: Asking, stream: bool) -> None:
    job = await asking.job(stream=stream)
    asking.endpoint.cancel(job)
    answer = await asking.answering
    assert (answer.status_code, answer.headers["x-should-retry"]) == (409, "false")
    assert answer.json()["error"]["message"] == f"job {job.id} was cancelled"
    job = await asking.job(stream=stream)
    job.policy = Policy(execution_timeout=0)
    asking.endpoint.give_back([job])
    assert await asking.endpoint.take("w", 1, 10) == [job]
    answer = await asking.answering
    assert (answer.status_code, answer.headers["x-should-retry"]) == (504, "false")
    sentence = "job ran longer than its executionTimeout of 0 s"
    assert answer.json()["error"]["message"] == sentence


@pytest.mark.parametrize("stream", [False, True])
async def test_shutdown_ends_what_waits(asking: Asking, stream: bool) -> None:
    job = await asking.job(stream=stream)
    asking.endpoint.close()
    answer = await asking.answering
    error = answer.json()["error"]
    assert (answer.status_code, error["message"]) == (503, "the emulator is shutting down")
    assert not job.final
    answer = await asking.http.get("openai/v1/models")
    assert (answer.status_code, answer.json()["error"]) == (503, error)


async def test_shutdown_ends_a_stream(asking: Asking) -> None:
    asking.chunk(await asking.job(stream=True), "data: 1\n\n")
    asking.endpoint.close()
    answer = await asking.answering
    first, last, end = answer.text.split("\n\n")
    assert (answer.status_code, first, end) == (200, "data: 1", "")
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["message"] == "the emulator is shutting down"


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "sentence"),
    [
        ("POST", "v1/completions", b"{", 400, "the body is not JSON: "),
        ("POST", "v1/completions", b"", 400, "the body is not JSON: "),
        ("POST", "v1/completions", b"[]", 400, "the body is not a JSON object"),
        (
            "POST",
            "v1/completions",
            b'{"stream": "yes"}',
            400,
            "stream is 'yes': it must be true or false",
        ),
        ("POST", "v1/completions", b" " * (20 * MB + 1), 413, "is larger than 20 MB"),
        ("POST", "v2/completions", b"{}", 404, "/v2/local/openai/v2/completions does not exist"),
        ("GET", "", b"", 404, "/v2/local/openai/ does not exist"),
        ("DELETE", "v1/models/a", b"", 405, "DELETE is not allowed on /v2/local/openai/v1/models"),
        (
            "POST",
            "http://emulator/v2/other/openai/v1/completions",
            b"{}",
            404,
            "endpoint 'other' does not exist: there is only 'local'",
        ),
    ],
)
async def test_refusals(
    http: httpx.AsyncClient, method: str, path: str, content: bytes, status: int, sentence: str
) -> None:
    url = path if path.startswith("http") else f"openai/{path}"
    answer = await http.request(method, url, content=content)
    error = answer.json()["error"]
    assert answer.status_code == status
    assert sentence in error.pop("message")
    assert error == {"type": "invalid_request_error", "param": None, "code": None}


async def test_no_key_and_full_queue() -> None:
    endpoint = Endpoint(Limits(queued_jobs_per_worker=0))
    transport = httpx.ASGITransport(build_app(endpoint, client=ClientApi(endpoint)))
    async with httpx.AsyncClient(transport=transport, base_url="http://emulator") as http:
        answer = await http.get("/v2/local/openai/v1/models")
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        http.headers["Authorization"] = "Bearer any"
        answer = await http.get("/v2/local/openai/v1/models")
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    endpoint.close()
