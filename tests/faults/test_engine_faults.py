"""What breaks, and what the worker, the platform and the clients see of it."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support import (
    MODEL,
    START,
    WORKER,
    endpoint,
    eventually,
    left,
    platform,
    soon,
    start,
    stop,
    worker_environment,
)

pytestmark = pytest.mark.engine

LONG = {"max_tokens": 1500, "ignore_eos": True}
CODE = "import os\n\ndef "


def engine_processes(worker: int) -> list[psutil.Process]:
    """vLLM's processes below a worker, by the names that vLLM gives them."""
    children = psutil.Process(worker).children(recursive=True)
    return [child for child in children if "VLLM" in "".join(child.cmdline()[:1])]


def test_a_killed_engine_fails_its_jobs_and_the_worker_is_replaced() -> None:
    with endpoint(CONCURRENCY_MODIFIER="8") as served:
        worker = served.workers()[0]
        family = psutil.Process(worker["pid"]).children(recursive=True)
        jobs = [
            served.run({"prompt": CODE, "answerType": "stream", "options": LONG}) for _ in range(4)
        ]
        chat = {"messages": [{"role": "user", "content": "Hello"}], "stream": True, **LONG}
        jobs.append(served.run({"openai_route": "/v1/chat/completions", "openai_input": chat}))
        chat = chat | {"stream": False}
        for job in jobs:
            next(served.stream(job))
        jobs.append(served.run({"openai_route": "/v1/chat/completions", "openai_input": chat}))
        eventually(lambda: served.status(jobs[-1])["status"] == "IN_PROGRESS", 10, "the start")
        engine = engine_processes(worker["pid"])
        assert engine
        engine[0].kill()

        for job in jobs:
            status = served.finished(job, timeout=10)
            assert status["status"] == "FAILED"
            assert status["error"] == "the engine died while this job was running"

        def replaced() -> bool:
            return served.workers()[0]["pid"] not in {None, worker["pid"]}

        eventually(replaced, 10, "another worker")
        line = "worker-1 exited with code 1 and is replaced, as it asked"
        eventually(lambda: served.output.find(line), 5, line)
        assert served.workers()[0]["last_exit_code"] == 1
        eventually(lambda: not left(family), 10, "no child is left")
        eventually(served.ready, START, "the other worker's readiness")
        assert served.text({"prompt": CODE, "options": {"max_tokens": 2}}) is not None


async def test_shutdown_timeout_ends_jobs_with_a_clear_error() -> None:
    async with platform() as served:
        environment = worker_environment(**served.environment(), SHUTDOWN_TIMEOUT="5")
        process, output = start(WORKER, environment)
        try:
            await soon(lambda: served.polls or process.poll() is not None, START, "job-take")
            family = psutil.Process(process.pid).children(recursive=True)
            served.deliver.clear()  # the platform holds every chunk back, so the job can't end
            job_input = {"prompt": CODE, "answerType": "stream", "options": LONG}
            await served.give({"id": "stuck", "input": job_input})
            await soon(lambda: served.chunks.get("stuck"), 60, "the first chunk")
            process.send_signal(signal.SIGTERM)
            await soon(lambda: output.find("told to stop; 1 jobs are running"), 10, "the log line")
            await soon(lambda: process.poll() is not None, 15, "the worker's end")
            assert process.returncode == 0
            assert output.find("stuck | ✗ lost: the worker had to end before the platform took it")
            assert output.find("jobs: 0 finished, 0 failed, 0 cancelled, 1 lost")
            await soon(lambda: not left(family), 10, "no child")
        finally:
            stop(process)


async def test_job_timeout_and_sigterm_during_a_long_job() -> None:
    async with platform() as served:
        environment = worker_environment(
            **served.environment(),
            JOB_TIMEOUT="0.2",
            SHUTDOWN_TIMEOUT="1",
            RUNPOD_ENDPOINT_ID="ep",
            HF_HUB_OFFLINE="1",
        )
        process, output = start(WORKER, environment)
        try:
            await soon(lambda: served.polls or process.poll() is not None, START, "job-take")
            job_input = {"prompt": CODE, "options": LONG}
            end = await served.answer({"id": "slow", "input": job_input})
            assert end["error"] == "the job ran longer than JOB_TIMEOUT=0.2 seconds"
            line = await soon(lambda: output.find("failed: the job ran"), 10, "the log line")
            assert json.loads(line)["requestId"] == "slow"
            assert json.loads(line)["level"] == "INFO"
        finally:
            assert stop(process) == 0


def test_sigterm_during_the_start_ends_it_at_once() -> None:
    queue = {"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1:9/v2/ep/job-take/$ID?x=1"}
    process, output = start(WORKER, worker_environment(**queue))
    try:
        eventually(lambda: output.find("weights: "), 60, "the start")
        eventually(lambda: engine_processes(process.pid), START, "the engine's process")
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(15) == 0
        eventually(lambda: not left(family), 10, "no child is left")
    finally:
        stop(process)


@pytest.mark.parametrize(
    ("variables", "code", "sentence"),
    [
        ({"MODEL": "/nowhere/at/all"}, 1, "MODEL=/nowhere/at/all: there is no such folder"),
        ({"MODEL": MODEL, "ENGINE_ARGS": '{"dtype": "int3"}'}, 2, "ENGINE_ARGS: argument --dtype"),
        ({"MODEL": MODEL, "STARTUP_TIMEOUT": "1"}, 1, "not ready after STARTUP_TIMEOUT=1 seconds"),
    ],
    ids=["model", "value", "timeout"],
)
def test_a_start_that_fails_says_why(variables: dict, code: int, sentence: str) -> None:
    queue = {"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1:9/v2/ep/job-take/$ID?x=1"}
    process, output = start(WORKER, worker_environment(**queue, **variables))
    try:
        assert process.wait(120) == code
        eventually(lambda: output.find(sentence), 5, sentence)
    finally:
        stop(process)


def test_a_model_that_is_no_model_ends_with_one_sentence(tmp_path: Path) -> None:
    for file in Path(MODEL).iterdir():
        shutil.copy(file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Nope"]}))
    queue = {"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1:9/v2/ep/job-take/$ID?x=1"}
    process, output = start(WORKER, worker_environment(**queue, MODEL=str(tmp_path)))
    try:
        assert process.wait(120) == 1
        eventually(lambda: output.find("vLLM did not start: "), 5, "the sentence")
    finally:
        stop(process)


def test_the_handler_imports_nothing_heavy() -> None:
    script = (
        "import sys, worker.handler;"
        "print([m for m in ('vllm', 'torch', 'runpod', 'transformers') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
