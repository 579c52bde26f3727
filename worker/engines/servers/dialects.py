"""How each OpenAI-compatible server wants to be asked: names of options, token counts, routes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from worker.engines.limits import token_bias
from worker.errors import BadRequest
from worker.job import routes
from worker.job.types import Options, Request

OPENAI_NAMES = {
    name: name
    for name in (
        "temperature",
        "top_p",
        "stop",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "response_format",
    )
}
"""What every server of this kind takes."""

VLLM_NAMES = {
    name: name for name in Options.model_fields if name not in {"n", "max_tokens", "max_new_tokens"}
}

LLAMA_CPP_NAMES = OPENAI_NAMES | {
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
    "ignore_eos": "ignore_eos",
    "response_format": "json_schema",
    "chat_template_kwargs": "chat_template_kwargs",
}

TABBY_NAMES = {name: name for name in OPENAI_NAMES if name != "seed"} | {
    "top_k": "top_k",
    "min_p": "min_p",
    "min_tokens": "min_tokens",
    "repetition_penalty": "repetition_penalty",
    "ignore_eos": "ignore_eos",
    "skip_special_tokens": "skip_special_tokens",
    "allowed_token_ids": "allowed_token_ids",
    "bad_words": "banned_strings",
    "response_format": "json_schema",
    "chat_template_kwargs": "template_vars",
}

TEXT_ROUTES = frozenset({"/v1/models", "/v1/chat/completions", "/v1/completions"})


@dataclass(frozen=True, slots=True)
class Dialect:
    """What differs from server to server in a request.

    Args:
        owner: what the server writes as `owned_by` in its list of models.
        names: our options → its fields; an option that is not here is refused.
        routes: those of worker.job.routes.ALLOWED that it has.
        strip: fields of a client's request that it must not see.
        counts: how it counts a prompt's tokens, `llama.cpp` or `vllm`, or None.
        steps: the counter in its /metrics that grows with every step of the model, or None.
    """

    owner: str
    names: Mapping[str, str]
    routes: frozenset[str] = TEXT_ROUTES
    strip: frozenset[str] = frozenset()
    counts: str | None = None
    steps: str | None = None


OPENAI = Dialect("", OPENAI_NAMES, frozenset(routes.ALLOWED))
VLLM = Dialect("vllm", VLLM_NAMES, frozenset(routes.ALLOWED), counts="vllm")
LLAMA_CPP = Dialect(
    "llamacpp",
    LLAMA_CPP_NAMES,
    TEXT_ROUTES | {"/v1/embeddings", "/v1/messages", "/v1/rerank"},
    counts="llama.cpp",
    steps="llamacpp:n_decode_total",
)
MLC = Dialect("MLC-LLM", OPENAI_NAMES, strip=frozenset({"user"}))
TABBY = Dialect("tabbyAPI", TABBY_NAMES, TEXT_ROUTES | {"/v1/embeddings"})

BY_OWNER = {dialect.owner: dialect for dialect in (VLLM, LLAMA_CPP, MLC, TABBY)}
"""How a server that Tripod did not start is recognised."""


def fields(request: Request, dialect: Dialect, engine: str) -> dict[str, Any]:
    """The request's options by the server's names, without `n` and `max_tokens`.

    Raises:
        BadRequest: naming an option that the server does not know.
    """
    options = request.options
    defaults = Options()
    given = {
        name: value
        for name, value in options.model_dump(by_alias=True, exclude_none=True).items()
        if name not in {"n", "max_tokens", "max_new_tokens"} and value != getattr(defaults, name)
    }
    if unknown := next((name for name in given if name not in dialect.names), None):
        known = ", ".join(sorted([*dialect.names, "max_tokens", "n"]))
        raise BadRequest(f"options.{unknown}: the engine {engine} does not know it; it has {known}")
    token_bias(options.logit_bias or {})
    if (wanted := given.pop("response_format", None)) and wanted["type"] != "text":
        if dialect.names["response_format"] == "json_schema":
            wanted = wanted.get("json_schema", {}).get("schema") or {"type": "object"}
        given["response_format"] = wanted
    if dialect is LLAMA_CPP:
        if "seed" in given:
            given["seed"] %= 2**32 - 1  # its greatest number means: choose one
        if "top_k" in given:
            given["top_k"] = max(0, given["top_k"])  # 0 is its word for off
    return {dialect.names[name]: value for name, value in given.items()}
