"""`MODEL=openllm:<tag>`, served by vLLM with the catalog's settings, and `ENGINE=openllm`."""

import logging
from pathlib import Path

import pytest

from preload.catalog import Entry
from tests.openllm import catalog_of_tiny, install
from tests.preload.hub import Hub, Running
from tests.support import (
    ROOT,
    endpoint,
)
from worker.engines.catalog import applied
from worker.settings import Settings


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
