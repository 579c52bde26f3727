"""Engines that are servers: start, port, watchdog, end; and the presets that can't be run here."""

import asyncio
import gc
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.engines.test_engines import llama_server
from tests.support import (
    GGUF,
    MODEL,
    START,
    WORKER,
    eventually,
    left,
    needs,
    soon,
    start,
    stop,
    worker_environment,
)
from worker import engines, startup
from worker.engines.servers import llama_cpp, server
from worker.engines.servers.engine import ServerEngine
from worker.engines.servers.process import free_port, is_taken
from worker.errors import BadRequest, EngineDead, EngineRefusal, EngineStartError
from worker.job import routes
from worker.job.types import Options, Request, RouteCall
from worker.settings import Settings

pytestmark = pytest.mark.engine

Children = Callable[[], list[psutil.Process]]

PROMPT = Request("import os\n\ndef ", None, True, Options(max_tokens=4))
LONG = Request("import os\n\ndef ", None, True, Options(max_tokens=1900, ignore_eos=True))


@pytest.fixture
def children() -> Children:
    """The processes below this one that the test has started: a fixture's may run beside them."""
    before = psutil.Process().children(recursive=True)
    return lambda: [
        one for one in left(psutil.Process().children(recursive=True)) if one not in before
    ]


def settings(**fields: Any) -> Settings:
    given = {"mode_to_run": "api", "model": str(GGUF), "startup_timeout": 60}
    return Settings(**given | fields)


@asynccontextmanager
async def engine(**fields: Any) -> AsyncIterator[ServerEngine]:
    started = await startup.start(settings(**fields))
    assert isinstance(started, ServerEngine)
    try:
        yield started
    finally:
        started.stop()


async def text_of(running: ServerEngine, request: Request) -> str:
    return "".join([delta.text async for delta in running.generate(request)])


async def busy(running: ServerEngine) -> int:
    """Slots of llama-server that work."""
    slots = (await running.server.http.get("/slots")).json()
    return sum(slot["is_processing"] for slot in slots)


async def whole(running: ServerEngine, body: dict[str, Any]) -> Any:
    call = RouteCall("/v1/completions", "POST", body)
    return [part async for part in routes.call(call, running)]


@needs("llama-server")
async def test_fifty_starts_leave_no_process_no_port_and_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: Children
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    ports = set()
    for _ in range(50):
        async with engine() as running:
            ports.add(running.server.http.base_url.port)
            assert await text_of(running, PROMPT)
            assert len(children()) == 1
    assert children() == []
    assert not any(is_taken(port) for port in ports)
    assert os.listdir(tmp_path) == []


@needs("llama-server")
async def test_what_is_loaded_takes_no_part_in_collections() -> None:
    gc.unfreeze()
    async with engine():
        assert gc.get_freeze_count() > 10_000


@needs("llama-server")
def test_a_start_that_fails_tells_the_servers_last_lines(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(GGUF.read_bytes()[: 5 << 20])
    variables = {"MODEL": str(broken), "MODE_TO_RUN": "api", "PORT": str(free_port())}
    process, output = start(WORKER, worker_environment(**variables, ENGINE_ARGS="{}"))
    try:
        assert process.wait(60) == 1
        eventually(lambda: output.find("llama.cpp ended with code 1 before it was ready"), 5, "why")
        assert output.find("tensor data") or output.find("file bounds"), output.text()
    finally:
        stop(process)


async def test_what_is_no_gguf_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no such thing")
    with pytest.raises(EngineStartError, match="the file is no whole GGUF model"):
        await startup.start(settings(model=str(tmp_path / "x.gguf")))


async def test_a_program_that_is_missing_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "find_program", lambda name: None)
    with pytest.raises(EngineStartError, match="the program llama-server is not on PATH"):
        await startup.start(settings())


@needs("llama-server")
@pytest.mark.parametrize("answers", [True, False], ids=["web server", "silent"])
async def test_a_port_that_somebody_takes_is_given_up(
    answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        if answers:

            async def ok(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await reader.readline()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
                writer.close()

            await asyncio.start_server(ok, sock=taken.dup())
        offered = iter([port, free_port(), free_port()])
        monkeypatch.setattr(server, "free_port", lambda: next(offered))
        async with engine() as running:
            assert running.server.http.base_url.port != port
            assert await text_of(running, PROMPT)


@needs("llama-server")
@pytest.mark.parametrize("stream", [True, False])
async def test_a_server_that_hangs_is_ended(stream: bool, children: Children) -> None:
    async with engine(stall_timeout=2) as running:
        [process] = children()
        begun = asyncio.create_task(text_of(running, LONG))
        passed = asyncio.create_task(
            whole(
                running, {"prompt": "x", "max_tokens": 1900, "ignore_eos": True, "stream": stream}
            )
        )
        await soon(lambda: running.unfinished() == 2, 10, "both requests")
        process.send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        with pytest.raises(EngineDead, match="the engine died"):
            await begun
        assert 1 < time.monotonic() - begin < 10
        await asyncio.gather(passed, return_exceptions=True)
        await asyncio.wait_for(running.died(), 1)
        assert running.is_dead()
        assert running.unfinished() == 0
        await soon(lambda: not left([process]), 5, "the end of the process")
        with pytest.raises(EngineDead):
            await text_of(running, PROMPT)


@needs("llama-server")
async def test_a_server_that_is_only_slow_is_left_alone() -> None:
    """Whole answers show no token for longer than STALL_TIMEOUT."""
    async with engine(stall_timeout=2) as running:
        begin = time.monotonic()
        body = {"prompt": "x", "max_tokens": 1200, "ignore_eos": True}
        for [answer] in await asyncio.gather(*(whole(running, body) for _ in range(4))):
            assert answer["usage"]["completion_tokens"] == 1200
        assert not running.is_dead()
        if time.monotonic() - begin < 2:
            pytest.skip("this machine gave 4,800 tokens in less than 2 s")


@needs("llama-server")
async def test_many_more_requests_than_slots_are_all_answered() -> None:
    async with engine(concurrency_modifier=2, mode_to_run="pod") as running:
        options = Options(max_tokens=150, ignore_eos=True)
        crowd = [Request(f"def f{i}", None, True, options) for i in range(40)]
        answers = asyncio.gather(*(text_of(running, request) for request in crowd))
        await soon(lambda: running.unfinished() == 40, 10, "all requests")
        async with asyncio.timeout(5):  # the watchdog must get through, too
            assert await running.server.steps() is not None
        assert running.unfinished() > 20  # and not stand in line behind them
        assert all(await answers)
        assert running.unfinished() == 0


@needs("llama-server")
async def test_a_stopped_generator_frees_the_servers_slot() -> None:
    async with engine() as running:
        deltas = running.generate(LONG)
        await anext(deltas)
        assert await busy(running) == 1
        await deltas.aclose()
        assert running.unfinished() == 0
        end = time.monotonic() + 1
        while await busy(running):
            assert time.monotonic() < end, "a slot that is still busy after a second"


@needs("llama-server")
async def test_a_slow_consumer_gets_what_piled_up_as_one_delta() -> None:
    async with engine() as running:
        request = Request("import os\n\ndef ", None, True, Options(max_tokens=300, ignore_eos=True))
        deltas = []
        async for delta in running.generate(request):
            deltas.append(delta)
            while len(deltas) == 1 and await busy(running):
                pass
        assert len(deltas) < 5
        assert deltas[-1].usage is not None
        assert deltas[-1].usage.completion_tokens == 300


@needs("llama-server")
async def test_the_context_is_fitted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    async with engine(max_model_len=300, concurrency_modifier=3, mode_to_run="pod") as running:
        assert (running.max_model_len, running.slots, running.batch) == (300, 3, 3)
        with pytest.raises(BadRequest, match="must be at most 299, one less than max_model_len"):
            await text_of(running, Request("word " * 400, None, True, Options()))
    async with engine() as running:
        assert running.max_model_len == 2048
        assert 1 <= running.slots <= llama_cpp.MOST_SLOTS


@needs("llama-server")
def test_api_mode_over_a_server() -> None:
    port = str(free_port())
    variables = {"MODE_TO_RUN": "api", "MODEL": str(GGUF), "ENGINE_ARGS": "{}", "PORT": port}
    variables |= {"API_KEY": "k", "HOST": "127.0.0.1", "SERVED_MODEL_NAME": "tiny"}
    process, output = start(WORKER, worker_environment(**variables))
    url = f"http://127.0.0.1:{port}"
    try:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
            eventually(lambda: output.find("ready after"), START, "a ready engine")
            assert [model.id for model in client.models.list()] == ["tiny"]
            chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
            chat |= {"temperature": 0, "max_tokens": 24}
            whole = client.chat.completions.create(**chat).choices[0].message.content
            parts = client.chat.completions.create(**chat, stream=True)
            assert "".join(part.choices[0].delta.content or "" for part in parts) == whole
            with pytest.raises(openai.BadRequestError):
                client.completions.create(model="tiny", prompt="x", max_tokens="many")
            with pytest.raises(openai.NotFoundError):
                client.completions.create(model="nope", prompt="x")
            with pytest.raises(openai.NotFoundError, match="no route /v1/score"):
                client.post("/score", body={}, cast_to=object)
        http = httpx.Client(base_url=url, headers={"Authorization": "Bearer k"})
        with http:
            asked = {"prompt": "x", "n_predict": 4, "ignore_eos": True}
            assert http.post("/completion", json=asked).json()["tokens_predicted"] == 4
            assert set(http.get("/openapi.json").json()["paths"]) >= {"/v1/completions"}
            endless = {"prompt": "x", "max_tokens": 1900, "ignore_eos": True}
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json=endless, timeout=0.3)
            idle = "tripod_requests_in_flight 0.0"
            eventually(lambda: idle in http.get("/metrics").text, 3, "an idle engine")
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(20) == 0
        eventually(lambda: not left(family), 5, "no process is left")
    finally:
        stop(process)


@needs("llama-server")
async def test_no_secret_reaches_the_server_or_the_process_list(
    monkeypatch: pytest.MonkeyPatch, children: Children
) -> None:
    monkeypatch.setenv("API_KEY", "a-key-of-the-clients")
    async with engine(api_key="a-key-of-the-clients") as running:
        [process] = children()
        assert "a-key-of-the-clients" not in process.environ().values()
        key = process.environ()["LLAMA_API_KEY"]
        assert key not in " ".join(process.cmdline())
        async with httpx.AsyncClient(base_url=running.server.http.base_url) as stranger:
            refused = await stranger.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 401


@needs("llama-server")
async def test_a_remote_server_behind_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_API_KEY", "the-key-of-the-server")
    with llama_server() as (_, url):
        remote = {"engine": "remote", "engine_url": url}
        async with engine(**remote, engine_api_key="the-key-of-the-server") as running:
            assert await text_of(running, PROMPT)
            assert running.model_name == str(GGUF), "the server's own name"
        with pytest.raises(EngineStartError, match="ENGINE_API_KEY is wrong or missing"):
            await startup.start(settings(**remote, engine_api_key="wrong"))


async def test_a_remote_server_that_is_not_there_is_waited_for() -> None:
    remote = {"engine": "remote", "engine_url": f"http://127.0.0.1:{free_port()}"}
    with pytest.raises(EngineStartError, match="not ready after STARTUP_TIMEOUT=1 seconds"):
        await startup.start(settings(**remote, startup_timeout=1))


@needs("llama-server")
@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"ctx_siz": 1}, "llama.cpp has no option ctx-siz; did you mean ctx-size?"),
        ({"ctx-size": 1}, "ctx-size is set by MAX_MODEL_LEN"),
        ({"parallel": 1}, "parallel is set by CONCURRENCY_MODIFIER"),
        ({"port": 1}, "port is set by Tripod"),
    ],
)
def test_options_are_checked_against_the_servers_own(args: dict, sentence: str) -> None:
    assert engines.argument_problems("llama.cpp", args) == [sentence]


@needs("llama-server")
async def test_options_reach_the_server(children: Children) -> None:
    args = {"cache_type_k": "f32", "flash-attn": "off", "no-warmup": True, "threads": 1}
    async with engine(engine_args=args) as running:
        [process] = children()
        line = " ".join(process.cmdline())
        for option in ("--cache-type-k f32", "--flash-attn off", "--no-warmup", "--threads 1"):
            assert option in line
        assert await text_of(running, PROMPT)


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`mlc_llm` and `tabbyapi` on PATH, and a model's folder."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("mlc_llm", "tabbyapi"):
        code = (Path(__file__).parent / "fake_server.py").read_text()
        (programs / name).write_text(f"#!{sys.executable}\n{code}")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    (folder / "mlc-chat-config.json").write_text(json.dumps({"context_window_size": 4096}))
    (folder / "lib.so").touch()
    return folder


def told(running: ServerEngine) -> list[str]:
    """The command line that the fake server got."""
    assert running.server.process
    line = next(line for line in running.server.process.lines if line.startswith("arguments: "))
    return json.loads(line.removeprefix("arguments: "))


def with_mlc_weights_alone(folder: Path) -> None:
    for path in [folder / "config.json", *folder.glob("*.safetensors")]:
        path.unlink()
    (folder / "params_shard_0.bin").touch()


async def test_mlc_as_its_documentation_has_it(fakes: Path) -> None:
    with_mlc_weights_alone(fakes)
    args = {"tensor_parallel_shards": 2, "speculative_mode": "eagle"}
    fields = {"engine": "mlc", "model": str(fakes), "engine_args": args, "mode_to_run": "pod"}
    async with engine(**fields, concurrency_modifier=4, served_model_name="m") as running:
        port = running.server.http.base_url.port
        overrides = "context_window_size=4096;max_num_sequence=4;tensor_parallel_shards=2"
        assert told(running) == [
            *("serve", str(fakes), "--model-lib", str(fakes / "lib.so"), "--mode", "server"),
            *("--host", "127.0.0.1", "--port", str(port), "--overrides", overrides),
            *("--speculative-mode", "eagle"),
        ]
        assert running.max_model_len == 4096
        [answer] = await whole(running, {"prompt": "x", "user": "u", "model": "m"})
        seen = json.loads(answer["choices"][0]["text"])
        assert seen == {"prompt": "x", "model": str(fakes)}, "no `user`: it would be the id"
        seen = json.loads(await text_of(running, Request("x", None, True, Options(seed=3))))
        assert seen["seed"] == 3
        assert seen["max_tokens"] == 512
        with pytest.raises(BadRequest, match=r"options\.top_k: the engine mlc does not know it"):
            await text_of(running, Request("x", None, True, Options(top_k=3)))
        with pytest.raises(EngineRefusal, match="no route /v1/embeddings"):
            await anext(routes.call(RouteCall("/v1/embeddings", "POST", {"input": "x"}), running))
    assert engines.argument_problems("mlc", {"tensor_parallel_shard": 2}) == [
        "mlc has no option tensor-parallel-shard; did you mean tensor-parallel-shards?"
    ]


async def test_a_start_has_a_deadline_and_leaves_nothing(
    fakes: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    children: Children,
) -> None:
    monkeypatch.setenv("LOADING", "3600")
    with pytest.raises(EngineStartError, match="not ready after STARTUP_TIMEOUT=2 seconds"):
        await startup.start(settings(engine="tabby", model=str(fakes), startup_timeout=2))
    assert children() == []
    [told] = [record.message for record in caplog.records if "was not ready" in record.message]
    assert told.startswith("tabby was not ready; its last lines:\n    arguments: ")


async def test_a_probe_without_an_answer_is_not_the_last(
    fakes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HANGS", "yes")
    async with engine(engine="tabby", model=str(fakes)) as running:
        assert running.phases["server"] > server.PROBE_TIMEOUT


async def test_told_to_stop_during_the_start(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, children: Children
) -> None:
    monkeypatch.setenv("LOADING", "3600")
    stopped = asyncio.Event()
    fields = settings(engine="tabby", model=str(fakes))
    starting = asyncio.create_task(startup.start_unless(stopped, fields))
    await soon(children, 20, "the server's process")
    stopped.set()
    assert await asyncio.wait_for(starting, 5) == 0
    assert children() == []


async def test_tabby_as_its_documentation_has_it(
    fakes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        offered = iter([taken.getsockname()[1], free_port()])
        monkeypatch.setattr(server, "free_port", lambda: next(offered))
        fields = {"engine": "tabby", "model": str(fakes), "max_model_len": 1000}
        fields |= {"concurrency_modifier": 2, "mode_to_run": "pod"}
        async with engine(**fields, engine_args={"cache_mode": "Q4"}) as running:
            port = running.server.http.base_url.port
            assert port != taken.getsockname()[1], "TabbyAPI took the next port without a word"
            assert told(running) == [
                *("--host", "127.0.0.1", "--port", str(port)),
                *("--model-dir", str(fakes.parent), "--model-name", "model"),
                *("--max-seq-len", "1000", "--cache-size", "2000", "--disable-auth", "true"),
                *("--cache-mode", "Q4"),
            ]
            options = Options(bad_words=["a"], ignore_eos=True, max_tokens=5)
            messages = [{"role": "user", "content": "x"}]
            seen = json.loads(await text_of(running, Request(None, messages, True, options)))
            assert seen["banned_strings"] == ["a"]
            assert seen["messages"] == messages
            assert seen["model"] == "model"
            with pytest.raises(BadRequest, match=r"options\.seed: the engine tabby does not"):
                await text_of(running, Request("x", None, True, Options(seed=3)))
