"""The unmodified runpod SDK at both ends."""

from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
import runpod

Eventually = Callable[..., Any]


@pytest.fixture
def api(sdk_emulator: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The SDK's client, pointed at the emulator."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(runpod, "endpoint_url_base", sdk_emulator.url.removesuffix("/local"))
    return runpod.Endpoint("local", api_key="any")


def echoes(count: int) -> list[dict[str, Any]]:
    return [{"text": "echo", "index": index} for index in range(count)]


def streams(emulator: Any, job: str) -> bool:
    """Whether the handler runs; the SDK ignores a stop for a job that it has only taken."""
    return bool(emulator.call("GET", f"stream/{job}")["stream"])


def was_stopped(emulator: Any, job: str) -> bool:
    """Whether the SDK has cancelled the job's task, as its log says.

    The handler's own `finally` runs late where the stop came while a chunk was on its way.
    """
    return f"{job} | Job stopped." in emulator.err


def test_run_sync(api: Any) -> None:
    assert api.run_sync({"chunks": 3}, timeout=60) == echoes(3)


def test_run_status_output(api: Any) -> None:
    job = api.run({"input": {"chunks": 2, "pause": 0.05}})
    assert job.status() in ("IN_QUEUE", "IN_PROGRESS")
    assert job.output(timeout=60) == echoes(2)
    assert job.status() == "COMPLETED"


def test_stream(api: Any) -> None:
    assert list(api.run({"chunks": 4, "pause": 0.05}).stream()) == echoes(4)


def test_cancel_in_progress_stops_the_worker(
    api: Any, sdk_emulator: Any, eventually: Eventually
) -> None:
    job = api.run({"chunks": 100_000, "pause": 0.01})
    eventually(lambda: streams(sdk_emulator, job.job_id))
    assert job.cancel() == {"id": job.job_id, "status": "CANCELLED"}
    eventually(lambda: was_stopped(sdk_emulator, job.job_id))
    assert sdk_emulator.status(job.job_id)["status"] == "CANCELLED"


@pytest.mark.parametrize(
    ("job_input", "error"),
    [({"raise": "boo"}, "handler: boo \ntraceback"), ({"error": "bad prompt"}, "bad prompt")],
)
def test_failing_handler(sdk_emulator: Any, job_input: dict[str, str], error: str) -> None:
    job = sdk_emulator.runsync(**job_input)
    assert job["status"] == "FAILED"
    assert job["error"].startswith(error)


def test_execution_timeout_stops_the_worker(sdk_emulator: Any, eventually: Eventually) -> None:
    policy = {"executionTimeout": 5000}
    body = {"input": {"chunks": 100_000, "pause": 0.01}, "policy": policy}
    job = sdk_emulator.call("POST", "runsync", body)
    assert (job["status"], job["error"]) == (
        "TIMED_OUT",
        "job ran longer than its executionTimeout of 5 s",
    )
    eventually(lambda: was_stopped(sdk_emulator, job["id"]))


def test_jobs_spread_over_the_workers(sdk_emulator: Any, eventually: Eventually) -> None:
    eventually(lambda: sdk_emulator.call("GET", "health")["workers"]["idle"] == 2)
    jobs = [sdk_emulator.run(chunks=100_000, pause=0.05) for _ in range(4)]
    eventually(lambda: all(streams(sdk_emulator, job) for job in jobs))
    assert sorted(len(w["jobs_in_progress"]) for w in sdk_emulator.workers()) == [2, 2]
    for job in jobs:
        sdk_emulator.call("POST", f"cancel/{job}")
    eventually(lambda: all(was_stopped(sdk_emulator, job) for job in jobs))


def test_health_and_purge(api: Any, sdk_emulator: Any, eventually: Eventually) -> None:
    health = api.health()
    assert health["workers"]["ready"] == 2
    assert health["jobs"].keys() == {"completed", "failed", "inProgress", "inQueue", "retried"}
    running = [sdk_emulator.run(chunks=100_000, pause=0.05) for _ in range(8)]
    eventually(lambda: all(streams(sdk_emulator, job) for job in running))
    assert api.health()["jobs"]["inProgress"] == 8
    queued = sdk_emulator.run()
    assert api.purge_queue() == {"removed": 1, "status": "completed"}
    assert sdk_emulator.status(queued)["status"] == "CANCELLED"
    for job in running:
        sdk_emulator.call("POST", f"cancel/{job}")
    eventually(lambda: all(was_stopped(sdk_emulator, job) for job in running))


def test_pings_arrive(sdk_emulator: Any, eventually: Eventually) -> None:
    eventually(lambda: all(worker["pings"] for worker in sdk_emulator.workers()))


async def test_asyncio_client(api: Any) -> None:
    async with aiohttp.ClientSession() as session:
        endpoint = runpod.AsyncioEndpoint("local", session, api_key="any")
        job = await endpoint.run({"chunks": 3, "pause": 0.05})
        assert [chunk async for chunk in job.stream()] == echoes(3)
        assert await job.output(timeout=60) == echoes(3)
        assert (await endpoint.health())["workers"]["ready"] == 2
        job = await endpoint.run({"chunks": 100_000, "pause": 0.05})
        assert (await job.cancel())["status"] == "CANCELLED"


def test_crash_then_refresh(sdk_emulator: Any, eventually: Eventually) -> None:
    """Last, since it replaces both workers."""
    job = sdk_emulator.runsync(exit=3)
    assert job["status"] == "FAILED"
    assert "exited with code 3 while this job was in progress" in job["error"]
    job = sdk_emulator.runsync(refresh=1)
    assert (job["status"], job["output"]) == ("COMPLETED", echoes(1))
    eventually(lambda: f"{job['workerId']} exited with code 0 and is replaced" in sdk_emulator.err)
    eventually(lambda: sdk_emulator.call("GET", "health")["workers"]["idle"] == 2)
    assert sum(worker["restarts"] for worker in sdk_emulator.workers()) == 2


def test_plain_handler(
    start_emulator: Callable[..., Any], echo_worker: list[str], eventually: Eventually
) -> None:
    emulator = start_emulator("--", *echo_worker, "plain").ready()
    assert emulator.runsync(a=1)["output"] == {"a": 1}
    assert '"error_message": "boo"' in emulator.runsync(**{"raise": "boo"})["error"]
    job_id = emulator.run(progress="half")
    eventually(lambda: emulator.status(job_id).get("output") == "half")
    assert emulator.status(job_id)["status"] == "IN_PROGRESS"
    emulator.call("POST", f"cancel/{job_id}")
    # A handler that asks for its replacement goes on until the platform stops it.
    assert emulator.runsync(refresh_worker=True, a=2)["output"] == {"a": 2}
    eventually(lambda: "and is replaced, as it asked" in emulator.err)
