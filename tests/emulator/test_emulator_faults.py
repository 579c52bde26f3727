"""The faults of `--fault`: how they are written, and what each does to a call."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
import uvicorn

from emulator.__main__ import Server, bind
from emulator.app import build_app
from emulator.client_api import ClientApi
from emulator.endpoint import Endpoint
from emulator.faults import BadFault, Faults, parse
from emulator.misbehaviour import Connections, watched_protocol
from emulator.worker_api import WorkerApi
from tests.support import soon

Start = Callable[..., Any]


def test_a_fault_with_everything() -> None:
    fault = parse("job-done:status=503,probability=0.25,count=3,after=500ms,for=2m")
    assert (fault.call, fault.kind, fault.value) == ("job-done", "status", 503)
    assert (fault.probability, fault.count) == (0.25, 3)
    assert (fault.after, fault.lasts) == (0.5, 120)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("all:latency=50ms", 0.05),
        ("run:drop", "before"),
        ("job-take:duplicate=other", "other"),
        ("all:clock=-1.5h", -5400),
        ("ping:half", None),
    ],
)
def test_values(text: str, value: object) -> None:
    assert parse(text).value == value


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("job-done", "is no fault: it must be like job-done:status=503"),
        ("job-dome:half", "call 'job-dome' is unknown; allowed are all, client, job-take"),
        ("all:haalf", "kind 'haalf' is unknown; allowed are latency, status"),
        ("all:latency=50", "latency is '50': it must be a duration such as 50ms"),
        ("all:latency", "latency is '': it must be a duration"),
        ("all:status=200", "status is '200': it must be a whole number from 400 to 599"),
        ("all:drop=later", "drop is 'later': it must be before or after"),
        ("all:half=1", "half takes no value"),
        ("job-done:duplicate", "duplicate is only for job-take"),
        ("ping:stop-signal", "stop-signal is only for job-take, job-done, job-stop"),
        ("run:clock=+1h", "clock is only for all"),
        ("all:clock=1h", "clock is '1h': it must be a jump such as +1h or -30s"),
        ("all:outage=1m,for=2m", "outage takes no 'for', only after"),
        ("all:half,probability=0", "probability is '0': it must be above 0 and at most 1"),
        ("all:half,probability=nan", "probability is 'nan': it must be above 0 and at most 1"),
        ("all:half,count=0", "count is '0': it must be a whole number from 1"),
        ("all:half,sometimes", "option 'sometimes' is unknown; allowed are probability, count"),
    ],
)
def test_a_bad_fault_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(BadFault) as raised:
        parse(text)
    assert sentence in str(raised.value)
    assert str(raised.value).startswith(repr(text))


async def test_the_same_seed_strikes_the_same_calls() -> None:
    def struck(seed: int) -> list[bool]:
        faults = Faults(seed)
        faults.add(parse("ping:half,probability=0.5"))
        return [bool(faults.strike("ping")) for _ in range(100)]

    assert struck(1) == struck(1) != struck(2)
    assert 30 < sum(struck(1)) < 70


async def test_count_after_and_for() -> None:
    faults = Faults()
    for text in ("run:half,count=2", "ping:half,after=1h", "stream:half,for=1ms"):
        faults.add(parse(text))
    await asyncio.sleep(0.01)
    assert [len(faults.strike("run")) for _ in range(3)] == [1, 1, 0]
    assert not faults.strike("ping")
    assert not faults.strike("stream")
    assert [fault["active"] for fault in faults.describe()] == [False, False, False]
    faults.clear()
    assert faults.describe() == []


class Rig:
    """An endpoint behind a real server, and the calls of a worker and of a client."""

    def __init__(self, endpoint: Endpoint, faults: Faults, http: httpx.AsyncClient) -> None:
        self.endpoint, self.faults, self.http = endpoint, faults, http

    def fault(self, text: str) -> None:
        self.faults.clear()
        self.faults.add(parse(text))

    async def run(self) -> str:
        answer = await self.http.post("run", json={"input": {"prompt": "x"}})
        return str(answer.json()["id"])

    async def take(self, worker: str = "w1", size: int = 8) -> list[str]:
        answer = await self.http.get(f"job-take-batch/{worker}?batch_size={size}")
        answer.raise_for_status()
        return [job["id"] for job in answer.json()] if answer.status_code == 200 else []

    async def send(self, job: str, call: str = "job-done", worker: str = "w1") -> httpx.Response:
        return await self.http.post(f"{call}/{worker}/{job}", json={"output": "x"})

    async def stops(self, worker: str = "w1") -> list[str]:
        answer = await self.http.get(f"job-stop/{worker}")
        return list(answer.json()["jobsToStop"]) if answer.status_code == 200 else []

    async def status(self, job: str) -> str:
        return str((await self.http.get(f"status/{job}")).json()["status"])


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    endpoint, faults = Endpoint(), Faults()
    connections: Connections = {}
    app = build_app(
        endpoint,
        client=ClientApi(endpoint, stream_poll=0.2),
        worker=WorkerApi(endpoint, poll=0.5),
        faults=faults,
        connections=connections,
    )
    config = uvicorn.Config(app, http=watched_protocol(connections), log_config=None)
    server = Server(config)
    listener = bind("127.0.0.1", 0)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{listener.getsockname()[1]}/v2/local/",
        headers={"Authorization": "Bearer any"},
        trust_env=False,
    ) as http:
        yield Rig(endpoint, faults, http)
    endpoint.close()
    server.should_exit = True
    await serving
    assert not connections


async def test_latency_delays_the_way_there_and_the_way_back(rig: Rig) -> None:
    rig.fault("all:latency=400ms")
    job, loop = await rig.run(), asyncio.get_running_loop()
    begin = loop.time()
    taking = asyncio.create_task(rig.take())
    await soon(lambda: rig.endpoint.store.jobs[job].status == "IN_PROGRESS", 5, "the taking")
    assert loop.time() - begin >= 0.2
    assert not taking.done()
    assert await taking == [job]
    assert loop.time() - begin >= 0.4
    assert await rig.status(job) == "IN_PROGRESS"


async def test_a_status_has_no_effect_on_the_job(rig: Rig) -> None:
    job = await rig.run()
    await rig.take()
    rig.fault("job-done:status=503,count=2")
    answers = [await rig.send(job) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [503, 503, 200]
    assert answers[0].json() == {"error": "a fault on purpose"}
    assert await rig.status(job) == "COMPLETED"


@pytest.mark.parametrize(
    ("fault", "error", "effect"),
    [
        ("job-done:drop=before", httpx.RemoteProtocolError, "IN_PROGRESS"),
        ("job-done:drop=after", httpx.RemoteProtocolError, "COMPLETED"),
        ("job-done:half", httpx.RemoteProtocolError, "COMPLETED"),
        ("job-done:outage=1h", httpx.RemoteProtocolError, "IN_PROGRESS"),
    ],
)
async def test_a_connection_that_breaks(
    rig: Rig, fault: str, error: type[Exception], effect: str
) -> None:
    job = await rig.run()
    await rig.take()
    rig.fault(fault)
    with pytest.raises(error):
        await rig.send(job)
    assert await rig.status(job) == effect


async def test_half_an_answer_ends_in_the_middle(rig: Rig) -> None:
    job = await rig.run()
    rig.fault("status:half")
    async with rig.http.stream("GET", f"status/{job}") as answer:
        parts = answer.aiter_bytes()
        body = await anext(parts)
        with pytest.raises(httpx.RemoteProtocolError):
            await anext(parts)
    length = int(answer.headers["content-length"])
    assert answer.status_code == 200
    assert 0 < len(body) < length


@pytest.mark.parametrize("fault", ["job-take:drop=after", "job-take:half", "job-take:drop=before"])
async def test_a_job_whose_handing_out_broke_is_handed_out_again(rig: Rig, fault: str) -> None:
    job = await rig.run()
    rig.fault(f"{fault},count=1")
    with pytest.raises(httpx.RemoteProtocolError):
        await rig.take()
    assert await rig.status(job) == "IN_QUEUE"
    assert await rig.take() == [job]


async def test_a_worker_that_leaves_while_its_jobs_travel_has_not_got_them(rig: Rig) -> None:
    job = await rig.run()
    rig.fault("job-take:latency=200ms")
    with pytest.raises(httpx.ReadTimeout):
        await rig.http.get("job-take/w1", timeout=0.15)
    await soon(lambda: rig.endpoint.store.jobs[job].status == "IN_QUEUE", 5, "the job's return")
    rig.faults.clear()
    assert await rig.take() == [job]


async def test_an_outage_cuts_what_is_under_way_and_ends(rig: Rig) -> None:
    taking = asyncio.create_task(rig.take())
    await soon(lambda: rig.endpoint.workers.get("w1"), 5, "the open poll")
    rig.fault("all:outage=300ms")
    with pytest.raises(httpx.RemoteProtocolError):
        await taking
    job = await rig.run()
    with pytest.raises(httpx.RemoteProtocolError):
        await rig.take()
    await soon(lambda: not rig.faults.describe()[0]["active"], 5, "the outage's end")
    assert await rig.take() == [job]


async def test_an_open_poll_begins_anew_so_that_the_fault_strikes_it(rig: Rig) -> None:
    taking = asyncio.create_task(rig.take())
    await soon(lambda: rig.endpoint.workers.get("w1"), 5, "the open poll")
    rig.fault("job-take:status=500")
    assert await taking == []
    with pytest.raises(httpx.HTTPStatusError):
        await rig.take()


async def test_an_open_poll_is_not_struck_by_a_fault_that_has_ended(rig: Rig) -> None:
    for ended in ("job-take:drop=after,for=100ms", "job-take:drop=after,for=1h"):
        rig.fault(ended)
        taking = asyncio.create_task(rig.http.get("job-take/w1"))
        await soon(lambda: rig.faults.describe()[0]["struck"], 5, "the open poll")
        if "1h" in ended:
            rig.faults.clear()
        with pytest.raises(httpx.RemoteProtocolError):
            await taking
        job = await rig.run()
        assert await rig.take() == [job]


async def test_a_job_is_handed_out_again_to_the_same_worker(rig: Rig) -> None:
    job = await rig.run()
    rig.fault("job-take:duplicate,count=1")
    assert await rig.take() == [job]
    assert await rig.take() == [job]
    assert await rig.take() == []
    await rig.send(job)
    assert (await rig.send(job)).json() == {"status": "ignored"}
    assert rig.endpoint.health()["jobs"]["completed"] == 1


async def test_a_job_is_handed_out_again_to_another_worker(rig: Rig) -> None:
    await rig.take("w2")
    job = await rig.run()
    rig.fault("job-take:duplicate=other,count=1")
    assert await rig.take("w1") == [job]
    assert await rig.take("w2") == [job]
    assert (await rig.send(job, "job-stream", "w2")).status_code == 409
    assert (await rig.send(job, "job-done", "w1")).status_code == 200
    answer = await rig.http.get(f"stream/{job}")
    assert answer.json() == {"status": "COMPLETED", "stream": []}


async def test_stop_signals_at_bad_moments(rig: Rig) -> None:
    rig.fault("job-stop:stop-signal")
    [unknown] = await rig.stops()
    assert unknown not in rig.endpoint.store.jobs

    job = await rig.run()
    rig.fault("job-take:stop-signal")
    assert await rig.take() == [job]
    assert await rig.status(job) == "CANCELLED"
    assert await rig.stops() == [job]

    rig.faults.clear()
    job = await rig.run()
    await rig.take()
    rig.fault("job-done:stop-signal")
    await rig.send(job)
    assert await rig.stops() == [job]
    assert await rig.status(job) == "COMPLETED"


async def test_a_jump_of_the_clock(rig: Rig) -> None:
    async def jump(text: str) -> None:
        rig.fault(f"all:clock={text}")
        await soon(lambda: rig.faults.describe()[0]["struck"], 5, "the jump")

    job = await rig.run()
    await rig.take()
    await jump("-1h")
    await jump("+1h")
    assert await rig.status(job) == "IN_PROGRESS"
    await jump("+11m")
    await soon(lambda: rig.endpoint.store.jobs[job].status == "TIMED_OUT", 5, "the timeout")
    assert await rig.stops() == [job]


async def test_the_clients_calls(rig: Rig) -> None:
    rig.fault("run:status=429,count=1")
    answer = await rig.http.post("run", json={"input": {}})
    assert answer.status_code == 429
    rig.fault("client:drop=after")
    with pytest.raises(httpx.RemoteProtocolError):
        await rig.http.post("run", json={"input": {}})
    assert len(rig.endpoint.store.jobs) == 1
    assert len(await rig.take()) == 1


async def test_faults_are_changed_while_it_runs(rig: Rig) -> None:
    url = rig.http.base_url.join("/emulator/faults")
    added = await rig.http.post(url, json={"fault": "run:status=500"})
    assert added.json() == [{"fault": "run:status=500", "active": True, "struck": 0}]
    await rig.http.post("run", json={"input": {}})
    assert (await rig.http.get(url)).json()[0]["struck"] == 1
    assert (await rig.http.delete(url)).json() == []
    assert await rig.run()
    for body in ({"fault": "nope"}, {"fault": 1}, []):
        answer = await rig.http.post(url, json=body)
        assert answer.status_code == 400
        assert "job-done:status=503" in answer.json()["error"]


def test_faults_from_the_command_line(start_emulator: Start) -> None:
    emulator = start_emulator("--fault", "health:status=418,count=1", "--fault", "run:drop")
    status, answer = emulator.call("GET", "health")
    assert (status, answer) == (418, {"error": "a fault on purpose"})
    assert emulator.call("GET", "health")["jobs"]["inQueue"] == 0
    with pytest.raises(httpx.RemoteProtocolError):
        emulator.run(prompt="x")
    assert emulator.stop() == 0
    assert emulator.err == ""


def test_a_bad_fault_on_the_command_line(start_emulator: Start) -> None:
    emulator = start_emulator("--fault", "all:nope")
    assert emulator.process.wait(timeout=30) == 2
    assert emulator.err.startswith("emulator: --fault 'all:nope': kind 'nope' is unknown; ")
    assert emulator.err.count("\n") == 1
