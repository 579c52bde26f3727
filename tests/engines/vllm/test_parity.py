"""On a GPU that is not here, the in-process vLLM is configured as `vllm serve` configures it."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.support import MODEL, ROOT

pytestmark = pytest.mark.engine

DEPARTURES = {"model_config.original_max_model_len"}
"""Fitted down to the KV cache, where `vllm serve` refuses to start."""


def configured(
    name: str, capability: str, gib: int, engine_args: dict[str, Any], *options: str
) -> dict[str, dict[str, str]]:
    """Both configurations: Tripod's of `engine_args`, and that of `vllm serve` with `options`."""
    given = {"model": MODEL, "mode_to_run": "api", "engine_args": engine_args}
    command_line = ["--model", MODEL, "--served-model-name", MODEL, *options]
    program = [sys.executable, "-m", "tests.engines.vllm.faked_platform"]
    arguments = [name, capability, str(gib), json.dumps(given), json.dumps(command_line)]
    ran = subprocess.run(
        [*program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def differing(found: dict[str, dict[str, str]]) -> set[str]:
    ours, theirs = found["tripod"], found["vllm serve"]
    assert len(theirs) > 200
    return {path for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path)}


@pytest.mark.parametrize(
    ("name", "capability", "gib", "tokens", "sequences"),
    [
        ("NVIDIA H100 80GB HBM3", "9.0", 80, "8192", "1024"),
        ("NVIDIA B200", "10.0", 180, "16384", "1024"),
        ("NVIDIA GeForce RTX 4090", "8.9", 24, "2048", "256"),
    ],
)
def test_the_defaults_of_a_gpu(
    name: str, capability: str, gib: int, tokens: str, sequences: str
) -> None:
    found = configured(name, capability, gib, {})
    assert found["tripod"]["scheduler_config.max_num_batched_tokens"] == tokens
    assert found["tripod"]["scheduler_config.max_num_seqs"] == sequences
    assert differing(found) <= DEPARTURES


def test_options() -> None:
    args = {
        "tensor_parallel_size": 2,
        "enable_lora": True,
        "lora_modules": [{"name": "a", "path": "org/a"}],
        "kv_cache_dtype": "fp8",
        "enable_prefix_caching": False,
        "max_num_seqs": 33,
        "allowed_origins": ["*"],
    }
    options = ["--tensor-parallel-size", "2", "--enable-lora", "--kv-cache-dtype", "fp8"]
    options += ["--lora-modules", '{"name": "a", "path": "org/a"}', "--max-num-seqs", "33"]
    options += ["--no-enable-prefix-caching", "--allowed-origins", '["*"]']
    found = configured("NVIDIA H100 80GB HBM3", "9.0", 80, args, *options)
    assert found["tripod"]["scheduler_config.max_num_seqs"] == "33"
    assert differing(found) <= DEPARTURES


def test_a_cpu_starts_without_compiling_and_with_a_bounded_cache() -> None:
    found = configured("", "0.0", 0, {}, "--enforce-eager")
    assert differing(found) <= DEPARTURES | {"cache_config.kv_cache_memory_bytes"}


def test_the_departures_are_documented() -> None:
    page = (ROOT / "docs" / "reference" / "vllm.md").read_text(encoding="utf-8")
    for field in DEPARTURES | {"cache_config.kv_cache_memory_bytes", "model_config.enforce_eager"}:
        assert f"| `{field}` |" in page
