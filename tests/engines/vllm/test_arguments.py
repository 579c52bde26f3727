"""ENGINE_ARGS through vLLM's own parser and checks, in a process that may import vllm."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.support import MODEL, ROOT

pytestmark = pytest.mark.engine

REFUSED: dict[str, dict[str, Any]] = {
    "--enable-auto-tool-choice requires": {"enable_auto_tool_choice": True},
    "--enable-log-outputs requires": {"enable_log_outputs": True},
    "template": {"chat_template": "/nowhere/template"},
    "max-num-seqs": {"max_num_seqs": "many"},
}
ADAPTERS = [{"name": "a", "path": "org/a"}, {"name": "b", "path": "org/b"}]
TAKEN: list[tuple[dict[str, Any], str]] = [
    ({"lora_modules": ADAPTERS}, "[('a', 'org/a'), ('b', 'org/b')]"),
    ({"allowed_origins": ["https://a", "https://b"]}, "['https://a', 'https://b']"),
    ({"middleware": ["a.b"]}, "['a.b']"),
    ({"speculative_config": {"method": "ngram"}}, "{'method': 'ngram'}"),
]

PROGRAM = """
import json, sys
from worker.engines.vllm.arguments import parsed
from worker.errors import SettingsError
from worker.settings import Settings
said = []
for given in json.loads(sys.argv[2]):
    try:
        value = getattr(parsed(Settings(model=sys.argv[1], engine_args=given)), next(iter(given)))
        pairs = [(one.name, one.path) for one in value] if "lora_modules" in given else value
        said.append(repr(pairs))
    except SettingsError as error:
        said.append(error.problems)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said() -> list[Any]:
    given = [*REFUSED.values(), *(args for args, _ in TAKEN)]
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, MODEL, json.dumps(given)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_what_vllm_serve_refuses_is_refused_in_one_line(said: list[Any]) -> None:
    for sentence, problems in zip(REFUSED, said, strict=False):
        [problem] = problems
        assert problem.startswith("ENGINE_ARGS: ")
        assert sentence in problem
        assert "\n" not in problem


def test_lists_and_objects_reach_it_as_it_takes_them(said: list[Any]) -> None:
    assert said[len(REFUSED) :] == [value for _, value in TAKEN]
