"""openai_client.py with the real model behind /openai/v1."""

import pytest

from tests.client_examples.support import run
from tests.support import Endpoint

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("arguments", [[], ["--stream"]])
def test_a_chat(arguments: list[str], local: Endpoint) -> None:
    ran = run("openai_client.py", *arguments, "hello", "--max-tokens", "8", url=local.url)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.strip()


def test_a_model_that_is_not_there_is_one_sentence(local: Endpoint) -> None:
    ran = run("openai_client.py", "--model", "no-such-model", "hello", url=local.url)
    assert ran.returncode == 1
    assert "HTTP 404" in ran.stderr
    assert "no-such-model" in ran.stderr
