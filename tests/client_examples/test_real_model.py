"""The examples with the real worker, the real vLLM and the bundled model."""

import json

import pytest

from tests.client_examples.support import run
from tests.support import Endpoint

pytestmark = pytest.mark.engine

GREEDY = ["-o", "temperature=0", "-o", "max_tokens=24"]


@pytest.fixture(scope="module")
def expected(local: Endpoint) -> str:
    """What the endpoint itself answers."""
    options = {"temperature": 0, "max_tokens": 24}
    text = local.text({"prompt": "import os\n\ndef ", "options": options})
    assert text
    return text


@pytest.mark.parametrize("program", ["normal.py", "stream.py", "submit_and_poll.py"])
def test_the_answer_is_printed(program: str, local: Endpoint, expected: str) -> None:
    ran = run(program, "import os\n\ndef ", *GREEDY, url=local.url)
    assert (ran.returncode, ran.stdout) == (0, expected + "\n")


def test_a_chat(local: Endpoint) -> None:
    ran = run("normal.py", "--chat", "hello", *GREEDY, url=local.url)
    assert ran.returncode == 0
    assert ran.stdout.strip()


def test_many_prompts(local: Endpoint) -> None:
    prompts = "".join(f"import module{number}\n" for number in range(20))
    ran = run("many_prompts.py", "-", *GREEDY, url=local.url, stdin=prompts)
    assert ran.returncode == 0
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert "".join(line["prompt"] + "\n" for line in lines) == prompts
    assert all(line["text"] for line in lines)


@pytest.mark.parametrize("arguments", [[], ["--stream"]])
def test_javascript(arguments: list[str], local: Endpoint) -> None:
    ran = run("javascript.mjs", *arguments, "import os", "--max-tokens", "8", url=local.url)
    assert ran.returncode == 0
    assert ran.stdout.strip()


def test_curl(local: Endpoint) -> None:
    ran = run("curl.sh", "stream", url=local.url)
    assert ran.returncode == 0
    assert json.loads(ran.stdout.splitlines()[-1])["status"] == "COMPLETED"


def test_an_option_out_of_range_is_told_in_the_workers_words(local: Endpoint) -> None:
    ran = run("normal.py", "import os", "-o", "temperature=3", url=local.url)
    assert ran.returncode == 1
    assert "options.temperature: 3 is not allowed" in ran.stderr
