"""Generated requests, from the app's own description."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.api.test_api import KEY, Served, api
from tests.support import START, eventually

pytestmark = pytest.mark.engine

SHORT = json.dumps(
    {
        "kv_cache_memory_bytes": 256 << 20,
        "override_generation_config": {"max_new_tokens": 8},  # bounds what nobody bounded
    }
)


def generated(served: Served, seed: int) -> int:
    """Run schemathesis and return how many requests passed, which must be all."""
    command = [
        *(str(Path(sys.executable).parent / "schemathesis"), "run", f"{served.url}/openapi.json"),
        *("--header", f"Authorization: Bearer {KEY}", "--checks", "not_a_server_error"),
        *("--phases", "fuzzing", "--workers", "4", "--seed", str(seed)),
        *("--request-timeout", "60", "--no-color", "--max-examples", "400"),
        *("--generation-database", "none"),  # whose Pareto front takes half of the time
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=850)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    counts = re.search(r"(\d+) generated, (\d+) passed", ran.stdout)
    assert counts, ran.stdout
    assert counts[1] == counts[2]
    return int(counts[1])


@pytest.mark.timeout(1800)
def test_2000_generated_requests_find_no_server_error() -> None:
    with api(ENGINE_ARGS=SHORT) as served:
        eventually(lambda: served.process.poll() is not None or served.ping() == 200, START, "200")
        total, seed = 0, 0
        while total < 2000:
            seed += 1
            total += generated(served, seed)
        assert served.ping() == 200
        assert served.metric("vllm:num_requests_running") == 0
