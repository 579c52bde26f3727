"""`MODEL=openllm:<tag>`, served by vLLM with the catalog's settings, and `ENGINE=openllm`."""

import logging
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from preload.entry import Entry
from tests.openllm import HOME, catalog_of_tiny, install, own_bento
from tests.preload.hub import Hub, Running
from tests.support import (
    GGUF,
    ROOT,
    WORKER,
    endpoint,
    eventually,
    left,
    needs,
    start,
    stop,
    worker_environment,
)
from worker import configuration
from worker.engines.servers import SERVERS
from worker.engines.vllm.catalog import applied
from worker.errors import SettingsError
from worker.processes import find_program
from worker.settings import Settings

pytestmark = pytest.mark.engine


def entry(**arguments: object) -> Entry:
    return Entry(
        tag="tiny:1b",
        bento="tiny:1b-c0de",
        repository="Tripod/Tiny",
        revision=None,
        excludes=[],
        needs_token=False,
        gpu=None,
        gpus=0,
        engine_args=arguments,
    )


def test_the_catalogs_settings_stand_below_the_users(caplog: pytest.LogCaptureFixture) -> None:
    own = {"tensor-parallel-size": 2, "enforce_eager": False}
    settings = Settings(engine_args=own)
    with caplog.at_level(logging.INFO, "worker"):
        got = applied(
            settings,
            entry(
                tensor_parallel_size=8,
                enforce_eager=True,
                max_num_seqs=16,
                max_model_len=4096,
                disable_log_stats=True,
                disable_log_requests=True,
            ),
        )
    assert got.engine_args == {"max_num_seqs": 16, **own}
    assert got.max_model_len == 4096
    warning, taken = caplog.messages
    assert warning == (
        "the catalog's disable_log_requests=True is dropped: vLLM no longer knows it"
    )
    assert taken == ("from OpenLLM's catalog (tiny:1b-c0de): max_num_seqs=16, max_model_len=4096")


def test_max_model_len_wins_unless_it_is_the_default() -> None:
    wide = entry(max_model_len=32768)
    assert applied(Settings(max_model_len=2048), wide).max_model_len == 2048
    assert applied(Settings(), wide).max_model_len == 32768
    assert applied(Settings(), entry()).max_model_len == 25000


def test_it_is_served_with_the_catalogs_settings(tmp_path: Path) -> None:
    install()
    hub = Hub()
    commit = hub.add("Tripod/Tiny", ROOT / "models" / "tiny").commit
    catalog = catalog_of_tiny(tmp_path / "catalog", commit, max_model_len=512, max_num_seqs=3)
    catalog.make_aliases()
    with (
        Running(hub) as running,
        endpoint(
            MODEL="openllm:tiny:1b",
            OPENLLM_TEST_REPO=str(catalog.folder),
            HF_ENDPOINT=running.url,
            HF_HOME=str(tmp_path / "cache"),
            ENGINE_ARGS='{"kv_cache_memory_bytes": 67108864}',
        ) as served,
    ):
        [answer] = served.runsync({"openai_route": "/v1/models"})["output"]
        [model] = answer["data"]
        assert (model["id"], model["max_model_len"]) == ("openllm:tiny:1b", 512)
        assert served.text({"prompt": "import os\n", "options": {"max_tokens": 8}})
    output = served.output
    assert output.find(f"openllm:tiny:1b is Tripod/Tiny@{commit}")
    for name in ("disable_log_requests", "request_logger", "enable_reasoning"):
        assert output.find(f"the catalog's {name}=")
    assert output.find("which is 3 requests of that length")


def serving(bento: Path, **variables: str) -> dict[str, str]:
    return {
        "ENGINE": "openllm",
        "MODEL": str(bento),
        "ENGINE_ARGS": "{}",
        "OPENLLM_HOME": str(HOME),
        **variables,
    }


def test_a_bento_is_named_by_its_tag_and_takes_no_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = Settings(engine="openllm", model="openllm:mine:1")
    command = SERVERS["openllm"](settings, None).command("openllm", 4000)
    assert command == ["openllm", "serve", "mine:1", "--port", "4000"]
    variables = {"ENGINE": "openllm", "MODEL": "openllm:mine:1", "ENGINE_ARGS": '{"slots": 2}'}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match="a bento has the arguments it was built with"):
        configuration.load(variables)


def of(bento: Path) -> list[psutil.Process]:
    """Every process that serves this bento: `openllm` starts each with the bento's repository."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("OPENLLM_TEST_REPO") == str(bento.parents[3]):
                found.append(process)
    return left(found)


@needs("llama-server")
def test_an_own_bento_is_served_and_ends_with_all_its_processes(tmp_path: Path) -> None:
    install()
    program = find_program("llama-server")
    assert program
    bento = own_bento(tmp_path, program=program, gguf=str(GGUF))
    with endpoint(**serving(bento, SERVED_MODEL_NAME="mine")) as served:
        greedy = {"temperature": 0, "max_tokens": 24}
        whole = served.runsync({"prompt": "import os\n\ndef ", "options": greedy})["output"][-1]
        assert whole["usage"] == {"prompt_tokens": 6, "completion_tokens": 24, "total_tokens": 30}
        job = served.run({"prompt": "import os\n\ndef ", "answerType": "stream", "options": greedy})
        assert "".join(part["text"] for part in served.stream(job)) == whole["text"]
        chat = {"messages": [{"role": "user", "content": "What can you do?"}]}
        assert served.text(chat | {"options": greedy})
        [models] = served.runsync({"openai_route": "/v1/models"})["output"]
        assert [(each["id"], each["max_model_len"]) for each in models["data"]] == [("mine", 2048)]
        assert "options.min_tokens" in served.error({"prompt": "x", "options": {"min_tokens": 1}})
        assert served.output.find("openllm has no /tokenize")
        names = {process.name() for process in of(bento)}
        assert len(names) >= 2, names  # openllm and bentoml are `python`
    eventually(lambda: not of(bento), 10, "the end of openllm, bentoml and llama-server")


def test_a_bento_whose_engine_never_starts_ends_at_the_deadline(tmp_path: Path) -> None:
    install()
    bento = own_bento(tmp_path, program="false", gguf=str(GGUF))
    environment = worker_environment(
        **serving(bento, STARTUP_TIMEOUT="30"), RUNPOD_WEBHOOK_GET_JOB="http://127.0.0.1:9/$ID?"
    )
    process, output = start(WORKER, environment)
    try:
        assert process.wait(90) == 1, output.text()
        assert output.find("not ready after STARTUP_TIMEOUT=30 seconds")
        assert output.find("llama-server ended with code 1"), output.text()
        eventually(lambda: not of(bento), 10, "the end of openllm and bentoml")
    finally:
        stop(process)
