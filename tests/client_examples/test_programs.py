"""Every example as a user runs it: help, missing settings, and what goes wrong on the way."""

import subprocess

import pytest

from tests.client_examples.support import EXAMPLES, KEY, PROGRAMS, environment, run, stub
from tests.support import Endpoint

ASK = {
    "normal.py": ["import os"],
    "stream.py": ["import os"],
    "submit_and_poll.py": ["import os"],
    "cancel.py": ["some-job"],
    "curl.sh": ["runsync"],
    "javascript.mjs": ["import os"],
    "openai_client.py": ["hello"],
}
"""A command line for each; many_prompts.py tells of errors in its results instead."""


def test_every_program_is_in_the_table() -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert {*ASK, "many_prompts.py"} == set(PROGRAMS)
    for program in PROGRAMS:
        assert f"| [{program}]({program}) |" in table


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_needs_no_settings(program: str) -> None:
    ran = run(program, "--help", RUNPOD_API_KEY="", RUNPOD_ENDPOINT_ID="")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("usage: ")
    for variable in ("RUNPOD_API_KEY", "RUNPOD_ENDPOINT_ID", "RUNPOD_BASE_URL"):
        assert variable in ran.stdout


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("missing", ["RUNPOD_API_KEY", "RUNPOD_ENDPOINT_ID"])
def test_a_missing_setting_is_one_sentence_and_code_2(program: str, missing: str) -> None:
    ran = run(program, *ASK.get(program, ["-"]), **{missing: ""})
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr == (
        "Set RUNPOD_API_KEY and RUNPOD_ENDPOINT_ID in the environment; see --help.\n"
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_key_with_a_line_break_is_refused_and_not_shown(program: str) -> None:
    ran = run(program, *ASK.get(program, ["-"]), RUNPOD_API_KEY="secret\r\nevil: yes")
    assert ran.returncode == 2
    assert "RUNPOD_API_KEY holds" in ran.stderr
    assert "secret" not in ran.stderr + ran.stdout


@pytest.mark.parametrize("program", ASK)
@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (400, "The endpoint refused the request (HTTP 400): "),
        (401, "The endpoint does not accept this RUNPOD_API_KEY (HTTP 401): "),
        (404, "RUNPOD_ENDPOINT_ID (HTTP 404): "),
        (429, "The endpoint has too many requests; try again later (HTTP 429): "),
        (503, "The endpoint is in trouble; try again later (HTTP 503): "),
    ],
)
def test_an_http_error_is_one_sentence_with_the_endpoints_words(
    program: str, status: int, sentence: str
) -> None:
    with stub((status, {"error": "so it said"})) as server:
        ran = run(program, *ASK[program], url=server.url)
    assert ran.returncode == 1
    assert sentence in ran.stderr
    assert "so it said" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert KEY not in ran.stderr


@pytest.mark.parametrize("program", ASK)
def test_an_endpoint_that_is_not_there_is_one_sentence(program: str) -> None:
    with stub((500, {})) as server:
        url = server.url  # nobody listens there any more
    ran = run(program, *ASK[program], url=url)
    assert ran.returncode == 1
    assert "The endpoint cannot be reached" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("program", ASK)
@pytest.mark.parametrize("body", ["<html>", '"hello"'])
def test_an_answer_that_is_not_runpods_is_one_sentence(program: str, body: str) -> None:
    with stub((200, body)) as server:
        ran = run(program, *ASK[program], url=server.url)
    assert ran.returncode == 1
    whose = "OpenAI's" if program == "openai_client.py" else "Runpod's"
    assert ran.stderr.startswith(f"The answer is not {whose}")
    assert "Traceback" not in ran.stderr


def test_a_stream_of_nothing_is_no_answer() -> None:
    with stub((200, "<html>")) as server:
        ran = run("openai_client.py", "--stream", "--model", "m", "hello", url=server.url)
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)


@pytest.mark.parametrize("program", ASK)
def test_the_emulator_refuses_a_wrong_key(program: str, canned: Endpoint) -> None:
    ran = run(program, *ASK[program], url=canned.url, RUNPOD_API_KEY="wrong")
    assert ran.returncode == 1
    assert "does not accept this RUNPOD_API_KEY (HTTP 401)" in ran.stderr


def test_curl_does_not_show_the_key_to_the_list_of_processes() -> None:
    traced = environment(RUNPOD_API_KEY="secret")
    ran = subprocess.run(
        ["bash", "-x", str(EXAMPLES / "curl.sh"), "run"], env=traced, capture_output=True, text=True
    )
    commands = [line for line in ran.stderr.splitlines() if "curl -sS" in line]
    assert commands
    assert not any("secret" in line for line in commands)
