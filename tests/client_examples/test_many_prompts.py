"""many_prompts.py: order, bounded concurrency, failures that cost nobody else an answer."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.client_examples.support import Running, run, stub
from tests.support import Endpoint, eventually


def results(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_answers_in_the_order_of_the_prompts(canned: Endpoint, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("hold\n\nzwölf\nrelease\n", encoding="utf-8")  # the first one ends last
    ran = run("many_prompts.py", str(file), "--at-once", "2", url=canned.url)
    assert ran.returncode == 0
    assert results(ran.stdout) == [
        {"prompt": "hold", "text": "held"},
        {"prompt": "zwölf", "text": "echo: zwölf"},
        {"prompt": "release", "text": "released"},
    ]
    assert "100%" in ran.stderr


def test_as_many_at_once_as_asked_and_no_more(canned: Endpoint) -> None:
    prompts = "meet 3\n" * 12
    ran = run("many_prompts.py", "-", "--at-once", "3", url=canned.url, stdin=prompts)
    assert [result["text"] for result in results(ran.stdout)] == ["3"] * 12


def test_a_failure_stands_in_its_own_line(canned: Endpoint) -> None:
    ran = run("many_prompts.py", "-", url=canned.url, stdin="one\nfail\ntwo\n")
    assert ran.returncode == 1
    first, failed, last = results(ran.stdout)
    assert (first["text"], last["text"]) == ("echo: one", "echo: two")
    assert failed["error"].endswith(" ended FAILED: the canned failure")
    assert ran.stderr.endswith("1 of 3 prompts failed; their lines hold the error.\n")


def test_too_many_requests_are_tried_again() -> None:
    busy = (429, {"error": "busy"})
    done = (200, {"id": "j", "status": "COMPLETED", "output": [{"text": "there"}]})
    with stub(busy, busy, done) as server:
        ran = run("many_prompts.py", "-", url=server.url, stdin="one\n")
    assert results(ran.stdout) == [{"prompt": "one", "text": "there"}]
    assert server.seen == ["POST /v2/local/runsync"] * 3


def test_an_endpoint_in_trouble_fails_each_prompt_and_no_job_is_sent_twice() -> None:
    with stub((503, {"error": "so it said"})) as server:
        ran = run("many_prompts.py", "-", "--at-once", "1", url=server.url, stdin="one\ntwo\n")
    assert ran.returncode == 1
    assert all("so it said" in result["error"] for result in results(ran.stdout))
    assert server.seen == ["POST /v2/local/runsync"] * 2


def test_no_prompts_are_no_answers(idle: Endpoint) -> None:
    ran = run("many_prompts.py", "-", url=idle.url, stdin="\n")
    assert (ran.returncode, ran.stdout) == (0, "")


def test_a_file_that_is_not_there_is_one_sentence() -> None:
    ran = run("many_prompts.py", "nowhere.txt")
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1].endswith("'nowhere.txt'")


def test_an_interrupt_sends_no_further_prompt(
    tmp_path: Path, running: Callable[..., Running]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n" * 50, encoding="utf-8")
    queued = (200, {"id": "j", "status": "IN_QUEUE"})
    with stub(queued) as server:
        client = running(server.url, "many_prompts.py", str(file), "--at-once", "2")
        eventually(lambda: len(server.seen) > 4, 30, "polls for the first two")
        client.process.send_signal(signal.SIGINT)
        server.replies = [(200, {"id": "j", "status": "CANCELLED"})]
        assert client.process.wait(30) == 130
    assert server.seen.count("POST /v2/local/runsync") == 2
