"""The command line and the worker processes, with a worker that does not need the SDK."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import psutil
import pytest

Start = Callable[..., Any]
Eventually = Callable[..., Any]


def gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def test_url_first_then_examples_that_work_as_they_stand(
    start_emulator: Start, raw_worker: list[str]
) -> None:
    emulator = start_emulator("--", *raw_worker).ready()
    assert emulator.out.startswith(f"listening on {emulator.url}\n")
    assert f"base_url={emulator.url}/openai/v1\n" in emulator.out.partition("curl")[0]
    commands = [part for part in emulator.out.split("\n\n") if "curl" in part]
    one_answer, stream = commands
    shell = shutil.which("bash") or "sh"
    answer = subprocess.run([shell, "-c", one_answer], capture_output=True, text=True, timeout=60)
    assert '"status":"COMPLETED"' in answer.stdout
    assert '"answerType":"normal"' in answer.stdout
    answer = subprocess.run([shell, "-c", stream], capture_output=True, text=True, timeout=60)
    assert answer.stdout.splitlines()[-1] == '{"status":"COMPLETED","stream":[]}'


def test_example_input_can_be_chosen(start_emulator: Start) -> None:
    emulator = start_emulator("--example-input", '{"input": {"messages": []}}').ready()
    assert """-d '{"input": {"messages": []}}'""" in emulator.out


def test_retention_can_be_chosen(
    start_emulator: Start, raw_worker: list[str], eventually: Eventually
) -> None:
    emulator = start_emulator("--retention", "1", "--", *raw_worker).ready()
    job = emulator.call("POST", "run", {"input": {}})["id"]
    eventually(lambda: "has expired" in str(emulator.call("GET", f"status/{job}")))


def test_worker_logs_pass_through(
    start_emulator: Start, raw_worker: list[str], eventually: Eventually
) -> None:
    emulator = start_emulator("--", *raw_worker).ready()
    emulator.runsync(exit=0)
    eventually(lambda: "leaving" in emulator.err)
    lines = emulator.err.splitlines()
    for line in (
        "worker-1 | INFO  | r1 | a message",
        "worker-1 | done",
        "worker-1 | no end",
        "worker-1 | leaving without a line end",
    ):
        assert line in lines


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_everything(
    start_emulator: Start, raw_worker: list[str], eventually: Eventually, name: signal.Signals
) -> None:
    emulator = start_emulator("--workers", "2", "--", *raw_worker, "spawn").ready()
    eventually(lambda: len(emulator.tree()) >= 8)
    tree = emulator.tree()
    assert emulator.stop(name) == 0
    assert gone(tree)


def test_worker_that_ignores_sigterm_is_killed_after_the_grace(
    start_emulator: Start, raw_worker: list[str]
) -> None:
    emulator = start_emulator("--grace", "0.2", "--", *raw_worker, "ignore-term").ready()
    tree = emulator.tree()
    assert emulator.stop() == 0
    assert "did not exit within 0.2 s: killed" in emulator.err
    assert gone(tree)


def test_second_signal_kills_at_once(
    start_emulator: Start, raw_worker: list[str], eventually: Eventually
) -> None:
    emulator = start_emulator("--grace", "1000", "--", *raw_worker, "ignore-term").ready()
    tree = emulator.tree()
    emulator.process.send_signal(signal.SIGINT)
    eventually(lambda: emulator.call("GET", "health")[0] == 503)
    assert emulator.stop(signal.SIGINT) == 0
    assert gone(tree)


def test_sigkill_of_the_emulator_leaves_no_process(
    start_emulator: Start, raw_worker: list[str], eventually: Eventually
) -> None:
    emulator = start_emulator("--", *raw_worker, "spawn", "ignore-term").ready()
    eventually(lambda: len(emulator.tree()) >= 5)
    tree = emulator.tree()
    emulator.process.kill()
    emulator.process.wait()
    eventually(lambda: gone(tree))


def test_crash_fails_the_job_and_the_worker_starts_anew(
    start_emulator: Start, raw_worker: list[str], eventually: Eventually
) -> None:
    emulator = start_emulator("--", *raw_worker).ready()
    job = emulator.runsync(exit=3)
    assert job["status"] == "FAILED"
    assert job["error"] == "worker worker-1 exited with code 3 while this job was in progress"
    assert emulator.runsync(again=1)["workerId"] == "worker-1-2"
    (worker,) = emulator.workers()
    assert (worker["restarts"], worker["last_exit_code"], worker["state"]) == (1, 3, "idle")
    assert "worker-1 exited with code 3; starting anew in 1 s" in emulator.err
    job_id = emulator.run(hold=1)
    eventually(lambda: emulator.status(job_id)["status"] == "IN_PROGRESS")
    os.kill(worker["pid"], signal.SIGKILL)
    job = eventually(lambda: (s := emulator.status(job_id))["status"] == "FAILED" and s)
    assert "was killed by signal 9 (SIGKILL)" in job["error"]


def test_crash_loop_backs_off(
    start_emulator: Start, raw_worker: list[str], eventually: Eventually
) -> None:
    emulator = start_emulator("--", *raw_worker, "fail-start")
    eventually(lambda: "starting anew in 2 s" in emulator.err)
    assert "worker-1 exited with code 7; starting anew in 1 s" in emulator.err
    assert emulator.call("GET", "health")["workers"]["unhealthy"] == 1
    (worker,) = emulator.workers()
    assert (worker["state"], worker["reason"]) == ("unhealthy", "exited with code 7")
    assert emulator.stop() == 0


def test_unhealthy_ping_counts_as_a_failed_start(
    start_emulator: Start, raw_worker: list[str], eventually: Eventually
) -> None:
    emulator = start_emulator("--", *raw_worker, "unhealthy")
    sentence = "worker-1 fitness check disk failed: full; starting anew in 1 s"
    eventually(lambda: sentence in emulator.err)


def test_stop_pod_replaces_the_worker(
    start_emulator: Start, raw_worker: list[str], eventually: Eventually
) -> None:
    emulator = start_emulator("--", *raw_worker).ready()
    assert emulator.runsync(stop_pod=1)["status"] == "COMPLETED"
    job = emulator.runsync(next=1)
    assert job["workerId"] == "worker-1-2"
    assert "worker-1 was killed by signal 15 (SIGTERM) and is replaced, as it asked" in emulator.err


def test_worker_from_outside(
    start_emulator: Start, raw_worker: list[str], eventually: Eventually
) -> None:
    emulator = start_emulator()
    emulator.ready()
    exports = [line for line in emulator.out.splitlines() if line.startswith("export ")]
    script = "\n".join([*exports, f"exec {' '.join(raw_worker)}"])
    worker = subprocess.Popen(["sh", "-c", script], stdout=subprocess.DEVNULL)
    try:
        assert emulator.runsync(a=1)["workerId"] == "my-worker"
        assert emulator.workers()[0]["pid"] is None
    finally:
        worker.kill()
        worker.wait()


def test_api_key_is_asked_for_and_not_shown(start_emulator: Start) -> None:
    emulator = start_emulator(environment={"EMULATOR_API_KEY": "s3cret"}).ready()
    assert emulator.call("GET", "health", key="any")[0] == 401
    assert "jobs" in emulator.call("GET", "health", key="s3cret")
    assert "s3cret" not in emulator.out + emulator.err
    assert "Bearer $RUNPOD_API_KEY" in emulator.out


@pytest.mark.parametrize(
    ("own", "shown"),
    [
        ({}, "WARN/"),
        ({"RUNPOD_LOG_LEVEL": "TRACE"}, "TRACE/"),
        ({"RUNPOD_DEBUG_LEVEL": "INFO"}, "/INFO"),
    ],
)
def test_log_level_of_the_sdk(
    start_emulator: Start,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
    own: dict[str, str],
    shown: str,
) -> None:
    for name in ("RUNPOD_LOG_LEVEL", "RUNPOD_DEBUG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    tell = "echo level=$RUNPOD_LOG_LEVEL/$RUNPOD_DEBUG_LEVEL; exec sleep 1000"
    emulator = start_emulator("--", "sh", "-c", tell, environment=own)
    eventually(lambda: f"worker-1 | level={shown}\n" in emulator.err)


def refused(*arguments: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-m", "emulator", *arguments], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 2
    return ended.stderr


def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        sentence = refused("--port", str(port))
    assert f"port {port} cannot be used (Address already in use)" in sentence
    assert "--port" in sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--", "no-such-command"), "command 'no-such-command' is not found or not executable"),
        (("--host", "0.0.0.0"), "--host is '0.0.0.0': only a loopback address"),
        (("--example-input", "{"), "--example-input is not JSON"),
        (("--example-input", "{}"), '--example-input has no "input"'),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], sentence: str) -> None:
    assert sentence in refused(*arguments)
