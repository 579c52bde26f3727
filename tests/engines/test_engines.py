"""What every engine does alike: the same tests over vLLM, llama.cpp, OpenLLM and a remote server.

One worker an engine, started when its first test comes; the tests that end it come last.
"""

import json
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.openllm import HOME, install, own_bento
from tests.support import (
    AMPLE,
    GGUF,
    PROBED_WORKER,
    START,
    Endpoint,
    endpoint,
    eventually,
    left,
    needs,
    worker_environment,
)
from worker.engines.servers.process import free_port
from worker.processes import find_program

pytestmark = pytest.mark.engine

CODE = "import os\n\ndef "
GREEDY = {"temperature": 0, "max_tokens": 48, "ignore_eos": True}
LONG = {"max_tokens": 1900, "ignore_eos": True}
NAME = "tiny"


@dataclass
class Served:
    """An endpoint whose one worker runs the engine, and what the tests must know of the engine."""

    endpoint: Endpoint
    probe: Path
    server: Callable[[], psutil.Process]
    """The process that dies when the engine dies."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.endpoint, name)

    def unfinished(self) -> int:
        with socket.socket(socket.AF_UNIX) as told:
            told.connect(str(self.probe))
            return int(told.makefile().read())

    def worker(self) -> psutil.Process:
        return psutil.Process(self.endpoint.workers()[0]["pid"])


@contextmanager
def vllm(probe: Path) -> Iterator[Served]:
    with endpoint(**settings(probe), command=PROBED_WORKER) as local:
        served = Served(local, probe, lambda: child(served.worker(), "VLLM::EngineCore"))
        yield served


@contextmanager
def llama_cpp(probe: Path) -> Iterator[Served]:
    variables = {"MODEL": str(GGUF), "ENGINE_ARGS": "{}"}
    with endpoint(**settings(probe), **variables, command=PROBED_WORKER) as local:
        served = Served(local, probe, lambda: child(served.worker(), "llama-server"))
        yield served


@contextmanager
def openllm(probe: Path) -> Iterator[Served]:
    install()
    program = find_program("llama-server")
    bento = own_bento(probe.parent, program=str(program), gguf=str(GGUF), mount="/")
    variables = {"ENGINE": "openllm", "MODEL": str(bento), "ENGINE_ARGS": "{}"}
    variables["OPENLLM_HOME"] = str(HOME)
    with endpoint(**settings(probe), **variables, command=PROBED_WORKER) as local:
        served = Served(local, probe, lambda: child(served.worker(), "openllm serve"))
        yield served


@contextmanager
def remote(probe: Path) -> Iterator[Served]:
    with llama_server() as (server, url):
        variables = {"ENGINE": "remote", "ENGINE_URL": f"{url}/v1/", "ENGINE_ARGS": "{}"}
        with endpoint(**settings(probe), **variables, command=PROBED_WORKER) as local:
            yield Served(local, probe, lambda: psutil.Process(server.pid))


@contextmanager
def llama_server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    port = free_port()
    command = [
        str(find_program("llama-server")),
        "-m",
        str(GGUF),
        "--port",
        str(port),
        "--offline",
        "-t",
        "1",
    ]
    server = subprocess.Popen(
        [*command, "-c", str(2048 * 4), "-np", "4", "--metrics"],
        env=worker_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def settings(probe: Path) -> dict[str, str]:
    return {
        "CONCURRENCY_MODIFIER": "8",
        "SERVED_MODEL_NAME": NAME,
        "PROBE": str(probe),
        "SHUTDOWN_TIMEOUT": AMPLE,
    }


def child(worker: psutil.Process, name: str) -> psutil.Process:
    """The process below `worker` that is called so."""
    return next(one for one in worker.children(recursive=True) if name in " ".join(one.cmdline()))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(vllm, id="vllm"),
        pytest.param(llama_cpp, id="llama.cpp", marks=needs("llama-server")),
        pytest.param(openllm, id="openllm", marks=needs("llama-server")),
        pytest.param(remote, id="remote", marks=needs("llama-server")),
    ],
)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with request.param(tmp_path_factory.mktemp("engine") / "probe") as started:
        yield started


def answer(served: Served, route: str, body: Any = None) -> Any:
    """The one object that an OpenAI route answers."""
    status = served.runsync({"openai_route": route, "openai_input": body})
    assert status["status"] == "COMPLETED", status
    [output] = status["output"]
    return output


def refusal(served: Served, route: str, body: Any = None) -> dict[str, Any]:
    return json.loads(served.error({"openai_route": route, "openai_input": body}))


def test_the_joined_stream_is_the_normal_answer(served: Served) -> None:
    normal = served.runsync({"prompt": CODE, "options": GREEDY})["output"]
    assert [sorted(chunk) for chunk in normal] == [["finish_reason", "text", "usage"]]
    assert normal[0]["finish_reason"] == "length"
    assert normal[0]["usage"]["prompt_tokens"] == 6
    assert normal[0]["usage"]["completion_tokens"] == 48
    job = served.run({"prompt": CODE, "answerType": "stream", "options": GREEDY})
    chunks = list(served.stream(job))
    assert len(chunks) > 1
    assert "".join(chunk["text"] for chunk in chunks) == normal[0]["text"]
    assert [chunk for chunk in chunks if "finish_reason" in chunk] == chunks[-1:]
    assert chunks[-1]["usage"] == normal[0]["usage"]


def test_messages_go_through_the_chat_template(served: Served) -> None:
    messages = [{"role": "user", "content": "What does os.path.join do?"}]
    chat = {"messages": messages, "options": {"temperature": 0}}
    [answered] = served.runsync(chat)["output"]
    assert answered["text"].strip()
    assert answered["usage"]["prompt_tokens"] == 16
    rendered = "<|user|>\nWhat does os.path.join do?\n<|assistant|>\n"
    assert served.text({"prompt": rendered, "options": {"temperature": 0}}) == answered["text"]
    chunks = served.stream(served.run(chat | {"answerType": "stream"}))
    assert "".join(chunk["text"] for chunk in chunks) == answered["text"]


def test_options(served: Served) -> None:
    full = served.text({"prompt": CODE, "options": GREEDY})
    word = full[10:14]
    [stopped] = served.runsync({"prompt": CODE, "options": GREEDY | {"stop": word}})["output"]
    assert stopped["text"] == full[: full.index(word)]
    assert stopped["finish_reason"] == "stop"
    assert served.text({"prompt": CODE, "options": GREEDY | {"max_tokens": 5}}) == full[:0] + (
        served.text({"prompt": CODE, "options": GREEDY | {"max_new_tokens": 5, "max_tokens": None}})
    )
    seeded = {"seed": 7, "temperature": 1, "max_tokens": 24, "ignore_eos": True}
    texts = {served.text({"prompt": CODE, "options": seeded}) for _ in range(2)}
    assert len(texts) == 1
    assert served.text({"prompt": CODE, "options": seeded | {"seed": 8}}) not in texts
    several = {"n": 3, "seed": 3, "temperature": 1, "max_tokens": 8, "ignore_eos": True}
    answers = served.runsync({"prompt": CODE, "options": several})["output"]
    assert [one["index"] for one in answers] == [0, 1, 2]
    assert len({one["text"] for one in answers}) > 1
    assert [one["usage"]["completion_tokens"] for one in answers if "usage" in one] == [24]
    text = "héllo 日本語 🎉"
    forced = {"type": "json_schema", "json_schema": {"schema": {"const": text}}}
    options = {"response_format": forced, "max_tokens": 100, "temperature": 0}
    job = served.run({"prompt": "x", "answerType": "stream", "options": options})
    assert json.loads("".join(chunk["text"] for chunk in served.stream(job))) == text


@pytest.mark.parametrize(
    ("job_input", "sentence"),
    [
        ({"prompt": ""}, 'prompt: "" is not allowed'),
        ({"prompt": "x", "options": {"temperature": -1}}, "options.temperature: -1 is not allowed"),
        ({"prompt": "x", "options": {"logit_bias": {"a": 1}}}, "must be a token id"),
        ({"messages": [{"role": "user", "content": [{"type": "nope"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"prompt": "word " * 9000}, "tokens are not allowed; it must be at most 2047, one less"),
        ({"messages": [{"role": "user", "content": "word " * 9000}]}, "at most 2047, one less"),
    ],
    ids=["empty", "range", "bias", "part", "image", "long prompt", "long messages"],
)
def test_bad_input_is_one_sentence(served: Served, job_input: Any, sentence: str) -> None:
    error = served.error(job_input)
    assert sentence in error
    assert "\n" not in error
    assert len(error) < 400


def test_an_answer_fills_the_context_and_no_more(served: Served) -> None:
    error = served.error({"prompt": CODE, "options": {"max_tokens": 10**6}})
    assert error == (
        "options.max_tokens: 1000000 is not allowed; it must be at most 2042, what a prompt of "
        "6 tokens leaves of max_model_len 2048"
    )
    options = {"max_tokens": 2042, "ignore_eos": True}
    [whole] = served.runsync({"prompt": CODE, "options": options})["output"]
    assert whole["usage"]["completion_tokens"] == 2042


def test_a_cancelled_job_frees_the_engine(served: Served) -> None:
    def begun() -> str | None:
        """A job in the middle of its answer; None if it was over before we could look."""
        job = served.run({"prompt": CODE, "answerType": "stream", "options": LONG})
        next(served.stream(job))
        return job if served.unfinished() == 1 else None

    job = eventually(begun, 60, "a job that still runs")
    served.http.post(f"/cancel/{job}")
    eventually(lambda: served.unfinished() == 0, 1.5, "an idle engine")
    assert served.finished(job)["status"] == "CANCELLED"


def test_openais_routes(served: Served) -> None:
    assert [one["id"] for one in answer(served, "/v1/models")["data"]] == [NAME]
    assert answer(served, f"/v1/models/{NAME}")["id"] == NAME
    chat = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 24}
    whole = answer(served, "/v1/chat/completions", chat)
    assert whole["object"] == "chat.completion"
    text = whole["choices"][0]["message"]["content"]
    options = {"temperature": 0, "max_tokens": 24}
    assert served.text({"messages": chat["messages"], "options": options}) == text
    body = {"openai_route": "/v1/chat/completions", "openai_input": chat | {"stream": True}}
    events = "".join(served.stream(served.run(body))).strip().split("\n\n")
    *chunks, done = [event.removeprefix("data: ").strip() for event in events]
    assert done == "[DONE]"
    deltas = [json.loads(chunk)["choices"] for chunk in chunks]
    assert "".join(d[0]["delta"].get("content") or "" for d in deltas if d) == text
    body = {"prompt": CODE, "temperature": 0, "max_tokens": 8, "model": NAME, "user": "u"}
    assert answer(served, "/v1/completions", body)["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize(
    ("route", "body", "code", "words"),
    [
        ("/v1/completions", {"prompt": "x", "model": "nope"}, 404, "nope"),
        ("/v1/completions", {"prompt": "x", "max_tokens": "many"}, 400, "max_tokens"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{}]}]}, 400, ""),
        ("/v1/completions", {"prompt": "x", "stream": True, "max_tokens": "many"}, 400, ""),
        ("/v1/score", {"text_1": "a", "text_2": "b"}, 404, ""),
        ("/metrics", None, 404, "not served"),
        ("/slots", None, 404, "not served"),
    ],
)
def test_a_call_that_is_wrong_keeps_openais_error(
    served: Served, route: str, body: Any, code: int, words: str
) -> None:
    error = refusal(served, route, body)
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["code"] == code
    assert error["message"]
    assert words in error["message"]


def test_sigterm_lets_jobs_finish_and_leaves_no_process(served: Served) -> None:
    worker = served.worker()
    family = [worker, *worker.children(recursive=True)]
    job = served.run({"prompt": CODE, "answerType": "stream", "options": LONG})
    next(served.stream(job))
    worker.send_signal(signal.SIGTERM)
    status = served.finished(job)
    assert status["status"] == "COMPLETED", status
    assert status["output"][-1]["usage"]["completion_tokens"] == 1900

    def ended() -> bool:
        return served.workers()[0]["last_exit_code"] is not None

    eventually(ended, 40, "the worker's end")
    assert served.workers()[0]["last_exit_code"] == 0
    eventually(lambda: not left(family), 10, "no process is left")


def test_a_killed_engine_fails_its_jobs_and_the_worker_is_replaced(served: Served) -> None:
    eventually(served.ready, START, "the next worker")
    before = served.workers()[0]
    family = served.worker().children(recursive=True)
    jobs = [served.run({"prompt": CODE, "answerType": "stream", "options": LONG}) for _ in range(3)]
    chat = {"messages": [{"role": "user", "content": "Hello"}], "stream": True, **LONG}
    jobs.append(served.run({"openai_route": "/v1/chat/completions", "openai_input": chat}))
    for job in jobs:
        next(served.stream(job))
    served.server().kill()
    for job in jobs:
        status = served.finished(job, timeout=15)
        assert status["status"] == "FAILED"
        assert status["error"] == "the engine died while this job was running"
    eventually(lambda: served.workers()[0]["pid"] != before["pid"], 15, "another worker")
    line = f"{before['id']} exited with code 1 and is replaced, as it asked"
    eventually(lambda: served.output.find(line), 5, line)
    assert served.workers()[0]["last_exit_code"] == 1
    eventually(lambda: not left(family), 10, "no child is left")
