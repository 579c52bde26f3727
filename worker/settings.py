"""Every variable that Tripod reads, with its type, default, unit and one line of help; a leaf.

Runpod's own variables (RUNPOD_*) belong to its SDK and are read there.
"""

import json
import re
from collections.abc import Mapping
from ipaddress import IPv4Address
from typing import Annotated, Any, Literal

import httpx
from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from preload import weights
from preload.model import parse as parse_model
from worker.errors import SettingsError

Mode = Literal["serverless", "pod", "both", "api", "rpc"]
EngineName = Literal["auto", "vllm", "llama.cpp", "openllm", "mlc", "tabby", "remote"]
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]


def _auto_or_number(value: object) -> object:
    if isinstance(value, str) and value.strip().lower() == "auto":
        return "auto"
    if str(value).strip().isdecimal() and 1 <= int(str(value)) <= 4096:
        return int(str(value))
    raise ValueError("must be a whole number from 1 to 4096, or auto")


def _json_object(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except ValueError as error:
        raise ValueError(f"must be a JSON object; it is no JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError('must be a JSON object such as {"gpu_memory_utilization": 0.9}')
    return parsed


def _backends(value: object) -> object:
    if not isinstance(value, str):
        return value
    found = [backend.strip() for backend in value.split(",")]
    problems = [f"{text or 'an empty entry'} is no host:port" for text in found if not _is_at(text)]
    problems += [
        f"{text} stands there twice" for text in sorted(set(found)) if found.count(text) > 1
    ]
    if problems:
        raise ValueError(f"must be host:port,host:port,…; {'; '.join(problems)}")
    return tuple(found)


def _is_at(text: str) -> bool:
    """Names and IPv4 addresses: llama.cpp knows no others."""
    host, _, port = text.rpartition(":")
    named = re.fullmatch(r"[a-z0-9]([\w.-]*[a-z0-9])?", host, re.IGNORECASE | re.ASCII)
    return bool(named) and re.fullmatch(r"[0-9]{1,5}", port) is not None and 0 < int(port) <= 65535


class Settings(BaseSettings):
    """One object for the whole worker; each field is read from the variable of its name."""

    model_config = SettingsConfigDict(env_ignore_empty=True, extra="ignore", frozen=True)

    mode_to_run: Mode = Field(
        "pod",
        description="what runs: `serverless`, `pod`, `both`, `api`, or `rpc`, which lends this "
        "machine to a llama.cpp on another one",
    )
    engine: EngineName = Field(
        "auto",
        description="`vllm`, `llama.cpp`, `openllm`, `mlc`, `tabby` or `remote`; `auto` is "
        "`llama.cpp` for a GGUF and `vllm` for the rest",
    )
    model_revision: str | None = Field(
        None, description="a branch, tag or commit of it; the same as `MODEL=org/name@revision`"
    )
    model: str = Field(
        "mistralai/Mistral-7B-Instruct-v0.1",
        description="a hub id (`org/name`, `org/name@revision`), a local folder, a GGUF file "
        "(`/path/file.gguf`, `org/name:file.gguf`, `org/name:Q4_K_M`), or `openllm:<tag>` of "
        "[OpenLLM's catalog](../how-to/openllm.md)",
    )
    concurrency_modifier: Annotated[int | Literal["auto"], BeforeValidator(_auto_or_number)] = (
        Field(
            1, description="jobs in flight per worker; `auto`: as many as the engine runs at once"
        )
    )
    handler: str | None = Field(
        None,
        description="your own [handler](../how-to/handler.md): a Python file, a folder that holds "
        "`handler.py`, or a module; unset: worker/handler.py",
    )
    max_model_len: Annotated[int, Field(ge=1)] = Field(
        25000,
        description="upper bound of prompt and answer together, in tokens; fitted down to the "
        "model's own limit and to the KV cache",
    )
    engine_url: str | None = Field(
        None,
        description="`remote`: the base URL of a running OpenAI-compatible server, such as "
        "`http://10.0.0.7:8000`",
        validate_default=True,
    )
    engine_api_key: SecretStr | None = Field(
        None, description="`remote`: the bearer key of that server"
    )
    engine_args: Annotated[dict[str, Any], NoDecode, BeforeValidator(_json_object)] = Field(
        {}, description="JSON object of the engine's own options, by the engine's own names"
    )
    served_model_name: str | None = Field(
        None, description="the name that clients use; `MODEL` when unset"
    )
    hf_token: SecretStr | None = Field(None, description="for gated models on the hub")
    startup_timeout: Seconds = Field(1200, description="seconds until the engine must be ready")
    stall_timeout: Seconds = Field(
        120,
        description="seconds without a token, while requests run, after which an engine that is "
        "a server is taken for dead",
    )
    job_timeout: Seconds = Field(600, description="seconds that a job may run")
    shutdown_timeout: Seconds = Field(
        30, description="seconds from SIGTERM until the worker has ended"
    )
    delivery_timeout: Seconds = Field(
        120, description="seconds that the platform may be away before a chunk or result is lost"
    )
    stream_interval_ms: Annotated[int, Field(ge=0, le=60000)] = Field(
        20,
        description="milliseconds between two chunks of one stream at least; "
        "0: a chunk for whatever was generated while the last one travelled",
    )
    host: str = Field("0.0.0.0", description="`api`: the address to bind, once there is a key")
    port: Port = Field(8000, description="`api`: the port")
    port_health: Port | None = Field(
        None, description="`api`: the port of /ping; `PORT` when unset"
    )
    api_key: SecretStr | None = Field(
        None, description="`api`: the bearer key; without one only this machine is served"
    )
    platform_auth: bool = Field(
        False,
        description="`api`: `true` where the platform checks every request (Runpod's load "
        "balancer), so that `HOST` is bound without a key",
    )
    rpc_backends: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_backends)] = Field(
        (), description="`host:port,…` of the machines in `rpc` mode that hold a part of a GGUF"
    )
    rpc_host: IPv4Address = Field(
        IPv4Address("127.0.0.1"),
        description="`rpc`: the IPv4 address to bind; there is no key, so never a public one",
    )
    rpc_port: Port = Field(50052, description="`rpc`: the port")
    public_key: str | None = Field(None, description="`pod`, `both`: the ssh key that may log in")
    jupyter_password: SecretStr | None = Field(
        None, description="`pod`, `both`: JupyterLab's token; generated and printed once when unset"
    )
    runpod_webhook_get_job: str | None = Field(
        None,
        description="set by Runpod: the queue that jobs are taken from",
        validate_default=True,
    )

    @field_validator("model")
    @classmethod
    def _known_model(cls, text: str, info: ValidationInfo) -> str:
        if info.data.get("engine") not in weights.WITHOUT:
            parse_model(text, info.data.get("model_revision") or "")
        return text

    @field_validator("engine_url")
    @classmethod
    def _base_url(cls, text: str | None, info: ValidationInfo) -> str | None:
        engine = info.data.get("engine")
        if text is None:
            if engine == "remote":
                raise ValueError("ENGINE=remote needs the base URL of its server")
            return None
        if engine not in {"remote", None}:
            raise ValueError("only ENGINE=remote calls a server at a URL")
        try:
            url = httpx.URL(text)
        except httpx.InvalidURL as error:
            raise ValueError(f"must be a URL: {error}") from None
        if url.scheme not in {"http", "https"} or not url.host or url.query or url.fragment:
            raise ValueError("must be a base URL such as http://10.0.0.7:8000")
        if url.userinfo:
            raise ValueError("must hold no password; ENGINE_API_KEY is for a key")
        return text.rstrip("/").removesuffix("/v1")

    @field_validator("rpc_backends")
    @classmethod
    def _only_with_llama_cpp(
        cls, backends: tuple[str, ...], info: ValidationInfo
    ) -> tuple[str, ...]:
        engine, model = info.data.get("engine"), info.data.get("model")
        if not backends or engine is None or model is None:  # their own problem is told
            return backends
        if engine not in {"auto", "llama.cpp"}:
            raise ValueError(f"only llama.cpp shares a model, and ENGINE={engine}")
        if not parse_model(model, info.data.get("model_revision") or "").gguf:
            raise ValueError(f"only a GGUF can be shared, and MODEL={model} is none")
        return backends

    @field_validator("runpod_webhook_get_job")
    @classmethod
    def _queue(cls, url: str | None, info: ValidationInfo) -> str | None:
        if url is None and info.data.get("mode_to_run") in {"serverless", "both"}:
            raise ValueError(
                "needed to take jobs from; Runpod sets it, and so does `python -m emulator`"
            )
        return url


ALSO_READ = {
    "MODEL_NAME": "model",
    "MAX_CONCURRENCY": "concurrency_modifier",
    "OPENAI_SERVED_MODEL_NAME_OVERRIDE": "served_model_name",
}
"""worker-vllm's names. They win, since an image sets ours but never theirs."""


def load(environment: Mapping[str, str], kind: type[Settings] = Settings) -> Settings:
    """Read the environment.

    Raises:
        SettingsError: with every problem found, each a line that names the variable,
            its value (unless it is a secret) and what is allowed.
    """
    theirs = {name: field for name, field in ALSO_READ.items() if environment.get(name)}
    try:
        given: dict[str, Any] = {field: environment[name] for name, field in theirs.items()}
        return kind(**given)
    except ValidationError as error:
        names = {field: name for name, field in theirs.items()}
        raise SettingsError([_one_line(problem, names) for problem in error.errors()]) from None


def _one_line(problem: Any, names: dict[str, str]) -> str:
    field = str(problem["loc"][0])
    name = names.get(field, field.upper())
    message = problem["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be", "must be")
    value = problem["input"]
    if value is None or "SecretStr" in str(Settings.model_fields[field].annotation):
        return f"{name}: {message}"
    shown = value if isinstance(value, str) else json.dumps(value)
    if field == "engine_url":
        shown = re.sub(r"//.*@", "//…@", shown)
    return f"{name}={shown}: {message}"
