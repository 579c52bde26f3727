"""Both HTTP faces in this process, with the test as the worker."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from emulator.app import build_app
from emulator.client_api import ClientApi
from emulator.endpoint import Endpoint
from emulator.jobs import Status
from emulator.web import MB
from emulator.webhooks import Webhooks
from emulator.worker_api import WorkerApi

Http = httpx.AsyncClient


async def submit(http: Http, **body: Any) -> str:
    response = await http.post("run", json={"input": {"a": 1}, **body})
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


async def take(http: Http, worker: str = "w") -> Any:
    response = await http.get(f"job-take/{worker}?gpu=x&job_in_progress=0")
    return response.json() if response.status_code == 200 else response.status_code


async def stream(http: Http, job_id: str, chunk: Any, worker: str = "w") -> httpx.Response:
    content = chunk if isinstance(chunk, bytes) else json.dumps({"output": chunk})
    return await http.post(f"job-stream/{worker}/{job_id}?gpu=x&isStream=false", content=content)


async def done(http: Http, job_id: str, body: Any, worker: str = "w") -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body)
    return await http.post(f"job-done/{worker}/{job_id}?gpu=x&isStream=true", content=content)


async def status(http: Http, job_id: str) -> Any:
    return (await http.get(f"status/{job_id}")).json()


async def test_a_job_through_both_faces(http: Http) -> None:
    job_id = await submit(http, s3Config={"bucketName": "b"}, unknown="dropped")
    assert await take(http) == {"id": job_id, "input": {"a": 1}, "s3Config": {"bucketName": "b"}}
    await stream(http, job_id, "é\ud800")
    assert (await done(http, job_id, {"output": ["é\ud800"]})).json() == {"status": "ok"}
    body = await status(http, job_id)
    assert (body["status"], body["output"], body["workerId"]) == ("COMPLETED", ["é\ud800"], "w")
    assert (await http.post(f"status/{job_id}")).json() == body


async def test_runsync_answers_when_done_or_after_the_wait(http: Http) -> None:
    waiting = asyncio.create_task(http.post("runsync", json={"input": {}}))
    while (job := await take(http)) == 204:
        pass
    await done(http, job["id"], {"output": 1})
    assert (await waiting).json()["output"] == 1
    body = (await http.post("runsync?wait=1000", json={"input": {}})).json()
    assert body == {"id": body["id"], "status": "IN_QUEUE"}
    assert body["id"].startswith("sync-")


async def test_stream_hands_each_chunk_out_once(http: Http) -> None:
    job_id = await submit(http)
    assert (await http.get(f"stream/{job_id}")).json() == {"status": "IN_QUEUE", "stream": []}
    await take(http)
    waiting = asyncio.create_task(http.get(f"stream/{job_id}"))
    await stream(http, job_id, {"text": "a"})
    chunk = {"output": {"text": "a"}}
    assert (await waiting).json() == {"status": "IN_PROGRESS", "stream": [chunk]}
    await stream(http, job_id, {"text": "a"})
    await done(http, job_id, {"output": []})
    answer = (await http.post(f"stream/{job_id}")).json()
    assert answer == {"status": "COMPLETED", "stream": [chunk]}
    assert (await http.get(f"stream/{job_id}")).json() == {"status": "COMPLETED", "stream": []}


async def test_progress_update_shows_in_status(http: Http) -> None:
    job_id = await submit(http)
    await take(http)
    await done(http, job_id, {"status": "IN_PROGRESS", "output": "half"})
    body = await status(http, job_id)
    assert (body["status"], body["output"]) == ("IN_PROGRESS", "half")
    await done(http, job_id, {"output": "all"})
    assert (await status(http, job_id))["output"] == "all"


async def test_cancel_reaches_the_worker(http: Http) -> None:
    job_id = await submit(http)
    await take(http)
    assert (await http.get("job-stop/w?gpu=x")).status_code == 204
    answer = await http.post(f"cancel/{job_id}")
    assert answer.json() == {"id": job_id, "status": "CANCELLED"}
    assert (await http.get("job-stop/w?gpu=x")).json() == {"jobsToStop": [job_id]}
    assert (await stream(http, job_id, "late")).json() == {"status": "ignored"}
    assert (await done(http, job_id, {"output": "late"})).json() == {"status": "ignored"}
    assert (await http.post(f"cancel/{job_id}")).json()["status"] == "CANCELLED"


async def test_take_batch(http: Http) -> None:
    jobs = [await submit(http) for _ in range(3)]
    answer = await http.get("job-take-batch/w?gpu=x&batch_size=2&job_in_progress=0")
    assert [job["id"] for job in answer.json()] == jobs[:2]
    assert (await http.get("job-take-batch/w?batch_size=0")).status_code == 400


async def test_take_of_a_worker_that_hung_up_loses_nothing(endpoint: Endpoint) -> None:
    app = build_app(endpoint)
    hang_up = asyncio.Event()
    messages = [{"type": "http.request"}]

    async def receive() -> dict[str, str]:
        if messages:
            return messages.pop()
        await hang_up.wait()
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        pass

    scope = {
        "type": "http",
        "method": "GET",
        "path": "/v2/local/job-take/w",
        "query_string": b"",
        "headers": [],
    }
    polling = asyncio.Event()
    endpoint.on_ready = lambda _: polling.set()
    taking = asyncio.create_task(app(scope, receive, send))
    await asyncio.wait_for(polling.wait(), 5)
    hang_up.set()
    job = endpoint.submit({})
    await taking
    assert job.status is Status.IN_QUEUE
    assert await endpoint.take("other", 1, 0.01) == [job]


async def test_ping(http: Http, endpoint: Endpoint) -> None:
    asked: list[str] = []
    endpoint.on_stop_pod = asked.append
    assert (await http.get("ping/w?job_id=a,b&runpod_version=1")).status_code == 200
    assert (endpoint.workers["w"].pings, endpoint.workers["w"].pinged_jobs) == (1, ["a", "b"])
    await http.get("ping/w?status=unhealthy&check=disk&reason=full&runpod_version=1")
    assert endpoint.workers["w"].unhealthy == "fitness check disk failed: full"
    assert asked == ["w"]
    workers = (await http.get("http://emulator/emulator/workers")).json()
    assert (workers[0]["id"], workers[0]["pings"]) == ("w", 2)


async def test_stop_pod(http: Http, endpoint: Endpoint) -> None:
    asked: list[str] = []
    endpoint.on_stop_pod = asked.append
    job_id = await submit(http)
    await take(http)
    await done(http, job_id, {"output": 1, "stopPod": True})
    assert (asked, (await status(http, job_id))["status"]) == (["w"], "COMPLETED")
    await submit(http)
    assert await take(http) == 204


async def test_retry_purge_and_jobs(http: Http) -> None:
    job_id = await submit(http)
    assert (await http.post(f"retry/{job_id}")).status_code == 409
    await take(http)
    await done(http, job_id, {"error": {"not": "text"}})
    assert (await status(http, job_id))["error"] == "{'not': 'text'}"
    assert (await http.post(f"retry/{job_id}")).json() == {"id": job_id, "status": "IN_QUEUE"}
    assert (await http.post("purge-queue")).json() == {"removed": 1, "status": "completed"}
    jobs = (await http.get("http://emulator/emulator/jobs")).json()
    assert [(job["id"], job["status"]) for job in jobs] == [(job_id, "CANCELLED")]


async def test_sizes(http: Http) -> None:
    for path, limit in (("run", 10), ("runsync", 20)):
        answer = await http.post(path, content=b"x" * (limit * MB + 1))
        assert answer.status_code == 413
        assert f"the /{path} body is larger than {limit} MB" in answer.json()["error"]
    job_id = await submit(http, extra="x" * (9 * MB))
    await take(http)
    assert (await stream(http, job_id, "x" * MB)).status_code == 413
    assert (await done(http, job_id, {"output": "x" * 20 * MB})).status_code == 413
    body = await status(http, job_id)
    assert (body["status"], "and 20 MB are allowed" in body["error"]) == ("FAILED", True)


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"output": NaN}', b"\xff", b"[" * 100_000])
async def test_result_that_is_no_json_object_fails_the_job(http: Http, body: bytes) -> None:
    job_id = await submit(http)
    await take(http)
    assert (await done(http, job_id, body)).status_code == 400
    assert (await status(http, job_id))["error"].startswith("the worker's result was refused: ")


@pytest.mark.parametrize("chunk", [b"{", b'{"text": 1}', b"1"])
async def test_bad_chunk_is_refused(http: Http, chunk: bytes) -> None:
    job_id = await submit(http)
    await take(http)
    assert (await stream(http, job_id, chunk)).status_code == 400
    assert (await status(http, job_id))["status"] == "IN_PROGRESS"


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"{", "the body is not JSON"),
        (b'{"input": NaN}', "the body is not JSON: NaN is not JSON"),
        (b"\xff", "the body is not JSON: it is not UTF-8"),
        (b"[" * 100_000, "the body is not JSON: it is nested too deeply"),
        (b"[]", 'the body has no "input"'),
        (b'{"prompt": "x"}', 'the body has no "input"'),
        (b'{"input": null}', 'the body has no "input"'),
        (b'{"input": {}, "policy": 1}', "policy is 1: it must be an object"),
        (
            b'{"input": {}, "policy": {"executionTimeout": 4999}}',
            "policy.executionTimeout is 4999: it must be 5000 to 604800000 (milliseconds)",
        ),
        (b'{"input": {}, "policy": {"ttl": "1"}}', "policy.ttl is '1': it must be 10000 to"),
        (b'{"input": {}, "policy": {"ttl": true}}', "policy.ttl is True: it must be 10000 to"),
        (b'{"input": {}, "webhook": "ftp://x"}', "webhook is 'ftp://x': it must be an http or"),
        (b'{"input": {}, "webhook": "http://["}', "webhook is 'http://[': it must be an http or"),
    ],
)
async def test_bad_bodies(http: Http, body: bytes, sentence: str) -> None:
    answer = await http.post("run", content=body)
    assert answer.status_code == 400
    assert sentence in answer.json()["error"]


@pytest.mark.parametrize(
    ("wait", "named"), [("999", "999"), ("300001", "300001"), ("soon", "'soon'"), ("", "''")]
)
async def test_bad_wait(http: Http, wait: str, named: str) -> None:
    answer = await http.post(f"runsync?wait={wait}", json={"input": {}})
    sentence = f"wait is {named}: it must be 1000 to 300000 (milliseconds)"
    assert (answer.status_code, answer.json()["error"]) == (400, sentence)


@pytest.mark.parametrize(
    ("method", "path", "code", "sentence"),
    [
        ("GET", "status/none", 404, "job none does not exist or has expired"),
        ("GET", "stream/none", 404, "job none does not exist or has expired"),
        ("POST", "cancel/none", 404, "job none does not exist or has expired"),
        ("POST", "retry/none", 404, "job none does not exist or has expired"),
        ("GET", "run", 405, "GET is not allowed on /v2/local/run"),
        ("POST", "nothing", 404, "/v2/local/nothing does not exist"),
        ("POST", "/v2/other/run", 404, "endpoint 'other' does not exist: there is only 'local'"),
    ],
)
async def test_what_does_not_exist(
    http: Http, method: str, path: str, code: int, sentence: str
) -> None:
    url = f"http://emulator{path}" if path.startswith("/") else path
    answer = await http.request(method, url)
    assert (answer.status_code, answer.json()) == (code, {"error": sentence})


@pytest.mark.parametrize(
    ("key", "header", "code"),
    [
        (None, None, 401),
        (None, "", 401),
        (None, "Bearer ", 401),
        (None, "Bearer any", 200),
        (None, "any", 200),
        ("right", "Bearer right", 200),
        ("right", "right", 200),
        ("right", "bearer wrong", 401),
    ],
)
async def test_keys(endpoint: Endpoint, key: str | None, header: str | None, code: int) -> None:
    app = build_app(endpoint, client=ClientApi(endpoint, key), worker=WorkerApi(endpoint, 0.1))
    transport = httpx.ASGITransport(app)
    headers = {} if header is None else {"Authorization": header}
    async with Http(transport=transport, base_url="http://emulator", headers=headers) as http:
        answer = await http.get("/v2/local/health")
        assert answer.status_code == code
        assert code == 200 or "Authorization header" in answer.json()["error"]
        assert (await http.get("/v2/local/job-take/w")).status_code == 204


async def test_closing_endpoint_takes_no_more_calls(http: Http, endpoint: Endpoint) -> None:
    endpoint.close()
    assert (await http.post("run", json={"input": {}})).status_code == 503


@pytest.mark.parametrize(("answers", "calls"), [([200], 1), ([500, 200], 2), ([500] * 9, 3)])
async def test_webhook(http: Http, endpoint: Endpoint, answers: list[int], calls: int) -> None:
    received: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        received.append(await reader.readexactly(length))
        code = answers[len(received) - 1]
        writer.write(b"HTTP/1.1 %d X\r\nConnection: close\r\nContent-Length: 0\r\n\r\n" % code)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    webhooks = Webhooks(delay=0.01)
    endpoint.on_finish = webhooks.send
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        job_id = await submit(http, webhook=f"http://127.0.0.1:{port}/hook")
        await take(http)
        await done(http, job_id, {"output": [1]})
        async with asyncio.timeout(10):
            await asyncio.gather(*webhooks._tasks)
    assert len(received) == calls
    body = await status(http, job_id)
    assert [json.loads(told) for told in received] == [body] * calls
    await webhooks.close()


async def test_webhook_that_nobody_serves(
    http: Http, endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    webhooks = Webhooks(tries=2, delay=0)
    endpoint.on_finish = webhooks.send
    job_id = await submit(http, webhook="http://127.0.0.1:9/")
    await http.post(f"cancel/{job_id}")
    await asyncio.gather(*webhooks._tasks)
    assert f"webhook of job {job_id} failed: ConnectError (try 2 of 2)" in caplog.text
    await webhooks.close()
