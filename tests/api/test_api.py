"""MODE_TO_RUN=api through real clients: openai, httpx, curl."""

import asyncio
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import openai
import psutil
import pytest

from tests.support import (
    MODEL,
    START,
    WORKER,
    Endpoint,
    Output,
    eventually,
    left,
    start,
    stop,
    worker_environment,
)
from worker.engines.servers.process import free_port

pytestmark = pytest.mark.engine

KEY = "a-key-that-must-not-be-logged"
HELLO = [{"role": "user", "content": "Hello"}]
ARGS = json.dumps(
    {
        "kv_cache_memory_bytes": 256 << 20,
        "max_num_seqs": 40,
    }
)


class Served:
    """A worker in api mode."""

    def __init__(self, process: subprocess.Popen[str], output: Output, url: str) -> None:
        self.process, self.output, self.url = process, output, url
        headers = {"Authorization": f"Bearer {KEY}"}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=120)
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)

    def ping(self) -> int:
        return self.http.get("/ping").status_code

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return sum(
            float(line.split()[-1]) for line in lines if line.startswith((f"{name}{{", f"{name} "))
        )


@contextmanager
def api(**variables: str) -> Iterator[Served]:
    settings = {"MODE_TO_RUN": "api", "HOST": "127.0.0.1", "API_KEY": KEY, "ENGINE_ARGS": ARGS}
    port = str(free_port())
    process, output = start(WORKER, worker_environment(**settings | {"PORT": port} | variables))
    served = Served(process, output, f"http://127.0.0.1:{port}")
    try:
        eventually(lambda: output.find("listening on") or process.poll() is not None, 30, "a port")
        yield served
    finally:
        served.http.close()
        served.openai.close()
        stop(process)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with api() as worker:
        eventually(lambda: worker.ping() == 204, 30, "204 long before the engine is ready")
        refused = worker.http.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503
        assert refused.headers["Retry-After"]
        eventually(lambda: worker.process.poll() is not None or worker.ping() == 200, START, "200")
        yield worker


def test_the_official_client(served: Served) -> None:
    assert [model.id for model in served.openai.models.list()] == [MODEL]
    assert served.openai.models.retrieve(MODEL).id == MODEL
    whole = served.openai.chat.completions.create(
        model=MODEL, messages=HELLO, temperature=0, max_tokens=24
    )
    parts = served.openai.chat.completions.create(
        model=MODEL, messages=HELLO, temperature=0, max_tokens=24, stream=True
    )
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content
    completion = served.openai.completions.create(model=MODEL, prompt="import os", max_tokens=4)
    assert completion.usage.completion_tokens == 4
    with pytest.raises(openai.BadRequestError):
        served.openai.completions.create(model=MODEL, prompt="x", temperature=-1)
    with pytest.raises(openai.NotFoundError):
        served.openai.completions.create(model="nope", prompt="x")


def test_the_same_seeded_chat_in_the_queue_over_openai_and_in_api_mode(
    served: Served, local: Endpoint
) -> None:
    body = {"model": MODEL, "messages": HELLO, "seed": 5, "temperature": 0.8, "max_tokens": 24}
    over_http = served.openai.chat.completions.create(**body).choices[0].message.content
    status = local.runsync({"openai_route": "/v1/chat/completions", "openai_input": body})
    assert status["output"][0]["choices"][0]["message"]["content"] == over_http
    runpod = openai.OpenAI(base_url=f"{local.url}/openai/v1", api_key="test")
    assert runpod.chat.completions.create(**body).choices[0].message.content == over_http
    options = {name: body[name] for name in ("seed", "temperature", "max_tokens")}
    assert local.text({"messages": HELLO, "options": options}) == over_http


def test_curl_without_and_with_the_key(served: Served) -> None:
    def curl(*arguments: str) -> str:
        command = ["curl", "-s", "-w", "\n%{http_code}", *arguments, f"{served.url}/v1/models"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert curl().endswith("\n401")
    assert curl("-H", "Authorization: Bearer wrong-key").endswith("\n401")
    assert curl("-H", f"Authorization: Bearer {KEY}").endswith("\n200")
    assert served.output.find("GET /v1/models refused: the key is wrong or missing")
    assert KEY not in served.output.text()
    assert "wrong-key" not in served.output.text()


@pytest.mark.parametrize("path", ["/docs", "/metrics/", "/v1/load_lora_adapter", "/sleep", "/load"])
def test_routes_for_administration_are_not_there(served: Served, path: str) -> None:
    answer = served.http.post(path, json={})
    assert answer.status_code == 404
    assert "not served" in answer.json()["error"]["message"]


def test_llama_cpps_completion(served: Served) -> None:
    body = {"prompt": "import os", "n_predict": 8, "temperature": 0, "ignore_eos": True}
    whole = served.http.post("/completion", json=body).json()
    assert whole["stop"] is True
    assert whole["tokens_predicted"] == 8
    with served.http.stream("POST", "/completion", json=body | {"stream": True}) as answer:
        items = [json.loads(line[6:]) for line in answer.iter_lines() if line]
    assert "".join(item["content"] for item in items) == whole["content"]
    assert [item["stop"] for item in items] == [False] * (len(items) - 1) + [True]
    bad = served.http.post("/completion", json={"prompt": 3})
    assert bad.status_code == 400
    assert bad.json()["error"]["message"] == "prompt: 3 is not allowed; it must be a text"
    assert served.http.post("/completion", content=b"{").status_code == 400


def test_metrics_count_requests_and_tokens(served: Served) -> None:
    before = served.metric("vllm:generation_tokens_total")
    requests = served.metric('tripod_requests_total{route="/v1/completions",status="200"')
    served.openai.completions.create(
        model=MODEL, prompt="x", max_tokens=7, extra_body={"ignore_eos": True}
    )
    after = served.http.get("/metrics").text
    assert served.metric("vllm:generation_tokens_total") == before + 7
    assert 'tripod_engine_state{state="ready"} 1.0' in after
    assert served.metric("tripod_concurrency") >= 1
    assert "vllm:time_to_first_token_seconds_count" in after
    assert requests is not None


async def test_64_streams_complete_and_clients_that_go_away_free_the_engine(served: Served) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{served.url}/v1", api_key=KEY, max_retries=0
    ) as client:

        async def chat(i: int, tokens: int, *, leave: bool) -> str | None:
            parts = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": f"Hello {i}"}],
                max_tokens=tokens,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            reason = None
            async for part in parts:
                reason = part.choices[0].finish_reason
                if leave and part.choices[0].delta.content:
                    await parts.close()
                    break
            return reason

        reasons = await asyncio.gather(*(chat(i, 32, leave=False) for i in range(64)))
        assert set(reasons) == {"length"}
        reasons = await asyncio.gather(*(chat(i, 600, leave=i % 2 == 0) for i in range(64)))
        assert set(reasons[1::2]) == {"length"}
        assert set(reasons[0::2]) == {None}

    def unfinished() -> float:
        return served.metric("vllm:num_requests_running") + served.metric(
            "vllm:num_requests_waiting"
        )

    await asyncio.to_thread(eventually, lambda: unfinished() == 0, 10, "an idle engine")
    assert served.metric("tripod_requests_in_flight") == 0


@pytest.mark.parametrize("path", ["/completion", "/v1/completions"])
def test_a_client_that_does_not_wait_frees_its_request(served: Served, path: str) -> None:
    body = {"prompt": "x", "n_predict": 1900, "max_tokens": 1900, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        served.http.post(path, json=body, timeout=0.3)
    eventually(lambda: served.metric("vllm:num_requests_running") == 0, 3, "an idle engine")
    assert served.metric("tripod_requests_in_flight") == 0


async def test_overload_is_told_and_not_piled_up(served: Served) -> None:
    limits = httpx.Limits(max_connections=200)
    body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(
        base_url=served.url, headers=headers, limits=limits, timeout=120
    ) as client:
        answers = await asyncio.gather(
            *(client.post("/v1/completions", json=body) for _ in range(120))
        )
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 80
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["Retry-After"] == "1"
    assert refused.json()["error"]["type"] == "RateLimitError"


def test_sigterm_drains(served: Served) -> None:
    """The last test of this worker."""
    family = psutil.Process(served.process.pid).children(recursive=True)
    body = {"prompt": "x", "max_tokens": 800, "stream": True, "ignore_eos": True}
    with served.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        served.process.terminate()
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    assert served.process.wait(30) == 0
    eventually(lambda: not left(family), 10, "no child is left")


def test_a_dead_engine_is_told_by_ping_and_exit_code() -> None:
    with api() as worker:
        eventually(lambda: worker.process.poll() is not None or worker.ping() == 200, START, "200")
        children = psutil.Process(worker.process.pid).children(recursive=True)
        next(child for child in children if "EngineCore" in "".join(child.cmdline()[:1])).kill()
        eventually(lambda: worker.ping() == 503, 10, "503")
        assert worker.process.wait(20) == 1


@pytest.mark.parametrize(
    ("variables", "addresses"),
    [
        ({"API_KEY": ""}, {"127.0.0.1"}),
        ({"API_KEY": "", "PLATFORM_AUTH": "true"}, {"0.0.0.0"}),
        ({"API_KEY": KEY}, {"0.0.0.0"}),
    ],
    ids=["no key", "the platform's", "a key"],
)
def test_what_is_bound(variables: dict[str, str], addresses: set[str]) -> None:
    health = str(free_port())
    with api(HOST="0.0.0.0", PORT_HEALTH=health, **variables) as worker:
        eventually(lambda: worker.output.find(f":{health}"), 10, "the port of /ping")
        listening = [
            connection.laddr
            for connection in psutil.Process(worker.process.pid).net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert {address.ip for address in listening} == addresses
        assert int(health) in {address.port for address in listening}
        assert httpx.get(f"http://127.0.0.1:{health}/ping").status_code == 204
        worker.process.terminate()
        assert worker.process.wait(20) == 0


def test_a_port_that_is_taken_is_one_sentence(served_port: int) -> None:
    settings = {"MODE_TO_RUN": "api", "PORT": str(served_port), "API_KEY": KEY, "HOST": "127.0.0.1"}
    process, output = start(WORKER, worker_environment(**settings))
    try:
        assert process.wait(60) == 2
        assert output.find(f"PORT={served_port}: 127.0.0.1:{served_port} can't be bound")
    finally:
        stop(process)


@pytest.fixture
def served_port() -> Iterator[int]:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]
