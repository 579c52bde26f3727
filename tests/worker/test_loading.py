"""HANDLER: what can be one, what is said of one that can't, and what it may ask and yield."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT, worker_environment
from worker import loading
from worker.errors import BadRequest, JobFailed, SettingsError, SetupFailed
from worker.testing import FakeEngine, run

GOOD = """
async def handler(job, engine):
    yield {"text": "hello"}
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Iterator[Write]:
    """Writes a handler's file and what stands beside it; returns the file."""
    before, path = set(sys.modules), list(sys.path)

    def write(text: str, name: str = "mine.py", **beside: str) -> Path:
        for neighbour, code in beside.items():
            (tmp_path / f"{neighbour}.py").write_text(code)
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    yield write
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def refusal(name: object) -> str:
    with pytest.raises(SettingsError) as caught:
        loading.load(str(name))
    [problem] = caught.value.problems
    assert problem.startswith(f"HANDLER={name}: ")
    return problem.removeprefix(f"HANDLER={name}: ")


def test_a_file_with_what_stands_beside_it(write: Write) -> None:
    code = "import words\nasync def handler(job, engine):\n    yield words.WORD\n"
    assert run(write(code, words="WORD = 'beside'"), {}, FakeEngine()) == ["beside"]


def test_a_folder_that_holds_one(write: Write) -> None:
    file = write(GOOD, "my_handler/handler.py")
    assert run(file.parent, {}, FakeEngine()) == [{"text": "hello"}]
    named = write(GOOD, "other/other.py")
    assert run(named.parent, {}, FakeEngine()) == [{"text": "hello"}]


def test_a_module(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("", "my_package_of_handlers/__init__.py")
    write(GOOD, "my_package_of_handlers/first.py")
    monkeypatch.syspath_prepend(tmp_path)
    assert run("my_package_of_handlers.first", {}, FakeEngine()) == [{"text": "hello"}]


def test_ours_is_a_handler_like_any_other() -> None:
    ours = loading.load(None)
    assert ours.module.__name__ == "worker.handler"
    [chunk] = run("worker.handler", {"prompt": "Hi"}, FakeEngine("Hello you"))
    assert chunk["text"] == "Hello you"


@pytest.mark.parametrize(
    ("code", "line", "said"),
    [
        ("x = 1\n", 1, "it has no handler; it must be an async generator"),
        ("\n\nx = (\n", 3, "SyntaxError"),
        ("import os\nimport no_such_package\n", 2, "No module named 'no_such_package'"),
        ("a = 1\nb = a.b\n", 2, "AttributeError: 'int' object has no attribute 'b'"),
        ("import sys\nsys.exit(3)\n", 2, "SystemExit: 3"),
        ("\nasync def handler(job, engine):\n    return 1\n", 2, "handler is no async generator"),
        ("def handler(job):\n    return {}\n", 1, "handler is no async generator"),
        ("\nasync def handler(job):\n    yield 1\n", 2, "handler must take job and engine"),
        (GOOD + "def setup(engine):\n    pass\n", 4, "setup must be `async def setup(engine)`"),
        (GOOD + "async def setup():\n    pass\n", 4, "setup must take engine"),
        (GOOD + "class Input:\n    pass\n", 4, "Input must be a subclass of pydantic.BaseModel"),
    ],
)
def test_what_can_be_no_handler_is_said_with_its_line(
    write: Write, code: str, line: int, said: str
) -> None:
    file = write(code)
    problem = refusal(file)
    assert f"{file}:{line}: " in problem
    assert said in problem
    assert "\n" not in problem


def test_an_error_in_a_neighbour_is_said_with_its_line(write: Write) -> None:
    file = write("import helper_of_it\n" + GOOD, helper_of_it="\nx = y\n")
    assert f"{file.parent / 'helper_of_it.py'}:2: NameError" in refusal(file)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/nowhere/mine.py", "there is no such file"),
        ("mine.py", "there is no such file"),
        ("no_such_module_here", "No module named 'no_such_module_here'"),
        ("tests/handlers", "the folder holds no handler.py"),
    ],
)
def test_what_is_not_there_is_said(name: str, said: str) -> None:
    assert said in refusal(name)


def test_the_name_of_another_module_is_refused(write: Write) -> None:
    file = write(GOOD, "json.py")
    assert refusal(file) == "a module called json is loaded already; give the file another name"


@pytest.mark.parametrize("mode", ["serverless", "api"])
def test_the_worker_ends_with_2_before_it_loads_anything(mode: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("\nx = y\n")
    queue = {"RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1:1/job-take/$ID?"}
    ran = subprocess.run(
        [sys.executable, "-m", "worker"],
        cwd=ROOT,
        env=worker_environment(MODE_TO_RUN=mode, HANDLER=str(tmp_path / "mine.py"), **queue),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 2
    assert f"{tmp_path / 'mine.py'}:2: NameError: name 'y' is not defined" in ran.stderr
    assert "weights:" not in ran.stdout


INPUT = """
from pydantic import BaseModel, Field, model_validator

class Place(BaseModel):
    city: str

class Input(BaseModel, extra="forbid"):
    text: str = Field(min_length=2)
    words: int = Field(60, gt=0, le=500)
    places: list[Place] = []
    rate: float | str = 1.0
    kind: str = Field("a", pattern="^[ab]$")

    @model_validator(mode="after")
    def no_shouting(self):
        if self.text.isupper():
            raise ValueError("text and words may not shout")
        return self

async def handler(job, engine):
    yield {"text": job["input"].text, "words": job["input"].words, "id": job["id"]}
"""


def test_an_input_of_its_own(write: Write) -> None:
    file = write(INPUT)
    assert run(file, {"text": "hi", "words": "7"}, FakeEngine()) == [
        {"text": "hi", "words": 7, "id": "test"}
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "input: null is not allowed; it must be an object"),
        ({}, "text: missing; it must be given"),
        ({"text": "h"}, 'text: "h" is not allowed; it must be at least 2 characters'),
        ({"text": 3}, "text: 3 is not allowed; it must be a text"),
        ({"text": "hi", "words": 0}, "words: 0 is not allowed; it must be greater than 0"),
        ({"text": "hi", "words": "x"}, 'words: "x" is not allowed; it must be a whole number'),
        ({"text": "hi", "word": 1}, "word: unknown field; did you mean words?"),
        ({"text": "hi", "places": [{}]}, "places[0].city: missing; it must be given"),
        ({"text": "hi", "rate": []}, "must be a number or a text"),
        ({"text": "hi", "kind": "c"}, "kind: \"c\" is not allowed; it must match pattern '^[ab]$'"),
        ({"text": "HI"}, "input: text and words may not shout"),
    ],
)
def test_what_it_refuses_is_one_sentence(write: Write, given: Any, said: str) -> None:
    file = write(INPUT)
    with pytest.raises(BadRequest) as caught:
        run(file, given, FakeEngine())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_that_is_yielded_fails_the_job_and_closes_the_handler(write: Write) -> None:
    file = write(
        "ended = []\n"
        "async def handler(job, engine):\n"
        "    try:\n"
        "        yield 'one'\n"
        "        yield {'error': job['input']}\n"
        "        yield 'never'\n"
        "    finally:\n"
        "        ended.append(True)\n"
    )
    with pytest.raises(JobFailed, match=r"^no such voice$"):
        run(file, "no such voice", FakeEngine())
    with pytest.raises(JobFailed, match=r'^{"code": 7}$'):
        run(file, {"code": 7}, FakeEngine())
    code = write("async def handler(job, engine):\n    yield {'error': None, 'ok': True}\n")
    assert run(code, {}, FakeEngine()) == [{"error": None, "ok": True}]


def test_openais_routes_go_to_the_engine_whatever_the_handler(write: Write) -> None:
    with pytest.raises(Exception, match="route /v1/nowhere is not served"):
        run(write(GOOD), {"openai_route": "/v1/nowhere", "openai_input": {}}, FakeEngine())


def test_setup_gets_the_engine_once_and_its_failure_is_said(write: Write) -> None:
    file = write(
        "from worker.job.chunks import text_of\n"
        "from worker.job.input import parse\n"
        "async def setup(engine):\n"
        "    global word\n"
        "    word = await text_of(engine.generate(parse({'prompt': 'a word?'})))\n"
        "async def handler(job, engine):\n"
        "    yield word\n"
    )
    assert run(file, {}, FakeEngine("abracadabra")) == ["abracadabra"]
    failing = write("async def setup(engine):\n    raise KeyError('voice')\n" + GOOD)
    with pytest.raises(SetupFailed) as caught:
        run(failing, {}, FakeEngine())
    assert str(caught.value) == (f"the handler's setup failed: {failing}:2: KeyError: 'voice'")


def test_import_of_the_handler_loads_neither_vllm_nor_runpod() -> None:
    code = (
        "import sys, worker.handler, worker.loading, worker.testing;"
        "sys.exit(str({'vllm', 'runpod', 'torch'} & sys.modules.keys() or ''))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.stderr.strip() == ""
