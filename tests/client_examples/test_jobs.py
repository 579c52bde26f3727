"""The examples against the emulator: answers, streams, and every way in which a job ends."""

import json
import signal
from collections.abc import Callable

import pytest

from tests.client_examples.support import Running, run, stub
from tests.support import Endpoint, eventually

STREAMS = {
    "stream.py": ["slow"],
    "javascript.mjs": ["--stream", "slow"],
    "curl.sh": ["stream", '{"prompt": "slow", "answerType": "stream"}'],
}
"""Command lines that show "so far" and then wait for ever."""


def in_progress(endpoint: Endpoint) -> str:
    """The one job that runs."""
    jobs = endpoint.http.get(endpoint.url.replace("/v2/local", "/emulator/jobs")).json()
    (job,) = [job["id"] for job in jobs if job["status"] == "IN_PROGRESS"]
    return job


def test_normal(canned: Endpoint) -> None:
    ran = run("normal.py", "hello", url=canned.url)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "echo: hello\n", "")


def test_normal_as_a_chat(canned: Endpoint) -> None:
    assert run("normal.py", "--chat", "hello", url=canned.url).stdout == "chat: hello\n"


def test_options_are_numbers_where_they_look_like_it(canned: Endpoint) -> None:
    options = ["-o", "max_tokens=7", "-o", "stop=end", "-o", 'bad_words=["a"]']
    ran = run("normal.py", "options", *options, url=canned.url)
    assert json.loads(ran.stdout) == {"max_tokens": 7, "stop": "end", "bad_words": ["a"]}


def test_normal_waits_on_where_runsync_gave_up() -> None:
    chunk = {"text": "late", "finish_reason": "stop"}
    with stub(
        (200, {"id": "j", "status": "IN_QUEUE"}),
        (200, {"id": "j", "status": "IN_PROGRESS"}),
        (200, {"id": "j", "status": "COMPLETED", "output": [chunk]}),
    ) as server:
        ran = run("normal.py", "hello", url=server.url)
    assert ran.stdout == "late\n"
    assert server.seen == ["POST /v2/local/runsync", *["GET /v2/local/status/j"] * 2]


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("stream.py", ["hello"]),
        ("javascript.mjs", ["hello"]),
        ("javascript.mjs", ["--stream", "hello"]),
        ("submit_and_poll.py", ["hello"]),
    ],
)
def test_the_whole_text_is_printed(program: str, arguments: list[str], canned: Endpoint) -> None:
    ran = run(program, *arguments, url=canned.url)
    assert (ran.returncode, ran.stdout) == (0, "echo: hello\n")


@pytest.mark.parametrize(
    ("program", "arguments"), [("stream.py", ["hello"]), ("javascript.mjs", ["--stream", "hello"])]
)
def test_what_came_twice_is_printed_once(program: str, arguments: list[str]) -> None:
    chunks = [{"text": "é𝄞 a"}, {"text": "𝄞 a b", "offset": 1}, {"text": " c", "offset": 6}]
    stream = [{"output": chunk} for chunk in chunks]
    done = {"id": "j", "status": "COMPLETED", "output": [{"text": "é𝄞 a b c"}]}
    with stub(
        (200, {"id": "j", "status": "IN_QUEUE"}),
        (200, {"status": "IN_PROGRESS", "stream": stream}),
        (200, {"status": "COMPLETED", "stream": []}),
        (200, done),
    ) as server:
        ran = run(program, *arguments, url=server.url)
    assert (ran.returncode, ran.stdout) == (0, "é𝄞 a b c\n")


@pytest.mark.parametrize("program", ["normal.py", "stream.py", "submit_and_poll.py"])
def test_a_failed_job_is_one_sentence(program: str, canned: Endpoint) -> None:
    ran = run(program, "fail", url=canned.url)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].endswith(" ended FAILED: the canned failure")
    assert ran.stdout == ("so far\n" if program == "stream.py" else "")


@pytest.mark.parametrize("arguments", [["fail"], ["--stream", "fail"]])
def test_javascript_tells_of_a_failed_job(arguments: list[str], canned: Endpoint) -> None:
    ran = run("javascript.mjs", *arguments, url=canned.url)
    assert ran.returncode == 1
    assert ran.stderr.endswith(" ended FAILED: the canned failure\n")


@pytest.mark.parametrize("program", STREAMS)
def test_a_stream_is_shown_as_it_comes_and_ends_when_it_is_cancelled(
    program: str, canned: Endpoint, running: Callable[..., Running]
) -> None:
    client = running(canned.url, program, *STREAMS[program])
    eventually(lambda: "so far" in client.out, 30, "the first words")
    assert client.process.poll() is None
    canned.http.post(f"/cancel/{in_progress(canned)}").raise_for_status()
    assert client.process.wait(30) == 1
    assert "CANCELLED" in client.err
    assert len(client.err.splitlines()) == 1


@pytest.mark.parametrize("program", ["stream.py", "submit_and_poll.py"])
def test_a_job_over_its_limit_is_one_sentence(program: str, canned: Endpoint) -> None:
    ran = run(program, "--run-limit", "5", "slow", url=canned.url)  # the least that Runpod takes
    assert ran.returncode == 1
    assert " ended TIMED_OUT: " in ran.stderr.splitlines()[-1]


def test_an_interrupted_stream_cancels_its_job(
    canned: Endpoint, running: Callable[..., Running]
) -> None:
    client = running(canned.url, "stream.py", "slow")
    eventually(lambda: "so far" in client.out, 30, "the first words")
    job = in_progress(canned)
    client.process.send_signal(signal.SIGINT)
    assert client.process.wait(30) == 130
    assert client.err == ""
    assert canned.status(job)["status"] == "CANCELLED"


def test_polling_goes_on_through_trouble_that_passes() -> None:
    with stub(
        (200, {"id": "j", "status": "IN_QUEUE"}),
        (503, {"error": "for a moment"}),
        (0, None),
        (429, {"error": "too many"}),
        (200, {"id": "j", "status": "IN_PROGRESS"}),
        (200, {"id": "j", "status": "COMPLETED", "output": [{"text": "there"}]}),
    ) as server:
        ran = run("submit_and_poll.py", "hello", url=server.url)
    assert (ran.returncode, ran.stdout) == (0, "there\n")
    assert ran.stderr.splitlines() == [
        "j IN_QUEUE",
        "HTTP 503, trying again",
        "not reached (RemoteProtocolError), trying again",
        "HTTP 429, trying again",
        "j IN_PROGRESS",
        "j COMPLETED",
    ]


def test_a_job_that_nobody_takes_is_given_up_and_cancelled(idle: Endpoint) -> None:
    ran = run("submit_and_poll.py", "--wait", "1", "hello", url=idle.url)
    assert ran.returncode == 1
    job = ran.stderr.split()[0]
    assert ran.stderr.splitlines()[-1] == f"Job {job} took longer than 1 s and is cancelled."
    assert idle.status(job)["status"] == "CANCELLED"


def test_cancel_by_id(idle: Endpoint) -> None:
    first, second = idle.run({"prompt": "one"}), idle.run({"prompt": "two"})
    ran = run("cancel.py", first, second, url=idle.url)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == f"{first} CANCELLED\n{second} CANCELLED\n"
    assert {idle.status(job)["status"] for job in (first, second)} == {"CANCELLED"}


def test_cancel_goes_on_after_a_job_that_is_unknown(idle: Endpoint) -> None:
    job = idle.run({"prompt": "one"})
    ran = run("cancel.py", "nobody", job, url=idle.url)
    assert ran.returncode == 1
    assert f"{job} CANCELLED\n" in ran.stdout
    assert "HTTP 404" in ran.stderr


def test_cancel_all_that_are_queued(idle: Endpoint) -> None:
    jobs = [idle.run({"prompt": "one"}) for _ in range(3)]
    ran = run("cancel.py", "--queued", url=idle.url)
    assert ran.stdout == "3 queued jobs cancelled\n"
    assert {idle.status(job)["status"] for job in jobs} == {"CANCELLED"}


def test_curl_run_and_runsync(canned: Endpoint) -> None:
    job_input = '{"prompt": "hello", "answerType": "normal"}'
    submitted = json.loads(run("curl.sh", "run", job_input, url=canned.url).stdout)
    assert canned.finished(submitted["id"])["status"] == "COMPLETED"
    ran = run("curl.sh", "runsync", job_input, url=canned.url)
    assert ran.returncode == 0
    assert json.loads(ran.stdout)["output"][0]["text"] == "echo: hello"


def test_curl_streams(canned: Endpoint) -> None:
    job_input = '{"prompt": "hello", "answerType": "stream"}'
    ran = run("curl.sh", "stream", job_input, url=canned.url)
    assert ran.returncode == 0
    replies = [json.loads(line) for line in ran.stdout.splitlines()]
    chunks = [chunk["output"]["text"] for reply in replies for chunk in reply["stream"]]
    assert "".join(chunks) == "echo: hello"


@pytest.mark.parametrize("how", ["runsync", "stream"])
def test_curl_tells_of_a_failed_job(how: str, canned: Endpoint) -> None:
    ran = run("curl.sh", how, '{"prompt": "fail", "answerType": "stream"}', url=canned.url)
    assert ran.returncode == 1
    assert ran.stderr == "The job is FAILED.\n"
