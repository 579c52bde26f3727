"""A request → what the server is asked: its names of the options, its count of the tokens."""

from __future__ import annotations

from typing import Any

from worker.engines.limits import answer_tokens, not_served
from worker.engines.servers.answers import WRONG_KEY
from worker.engines.servers.dialects import fields
from worker.engines.servers.server import Server
from worker.errors import BadRequest, EngineError
from worker.job import routes
from worker.job.types import DEFAULT_MAX_TOKENS, Request


async def body(request: Request, server: Server) -> dict[str, Any]:
    """What /v1/completions or /v1/chat/completions of `server` is asked, as a stream.

    Raises:
        BadRequest: the server does not know an option, or the prompt is too long for it.
        EngineError: it refuses us.
        httpx.HTTPError: the connection broke.
    """
    asked = fields(request, server.dialect, server.name)
    subject = _subject(request, server)
    tokens = await _count(request, subject, server)
    if tokens is None:
        asked["max_tokens"] = request.max_tokens or DEFAULT_MAX_TOKENS
    else:
        asked["max_tokens"] = answer_tokens(request, tokens, server.max_model_len)
    return asked | subject | {"stream": True, "stream_options": {"include_usage": True}}


def _subject(request: Request, server: Server) -> dict[str, Any]:
    """The model and what it is to read."""
    name = request.model or server.model_name
    if name not in server.models:
        raise not_served(name, server.models)
    model = {"model": server.models[name]["id"]}
    if request.prompt is not None:
        return model | {"prompt": request.prompt}
    return model | request.tool_fields | {"messages": request.messages}


async def _count(request: Request, subject: dict[str, Any], server: Server) -> int | None:
    """The prompt's tokens, or None where the server can't count them."""
    kwargs = request.options.chat_template_kwargs
    asked = subject | ({"chat_template_kwargs": kwargs} if kwargs else {})
    text = request.prompt
    if server.dialect.counts == "llama.cpp":
        if text is None:
            text = (await _asked(server, "/apply-template", asked))["prompt"]
        content = {"content": text, "add_special": True, "parse_special": True}
        return len((await _asked(server, "/tokenize", content))["tokens"])
    if server.dialect.counts == "vllm":
        asked.pop("tool_choice", None)
        return int((await _asked(server, "/tokenize", asked))["count"])
    return None


async def _asked(server: Server, path: str, content: dict[str, Any]) -> Any:
    response = await server.http.post(path, json=content)
    if response.status_code in {401, 403}:
        raise EngineError(WRONG_KEY)
    if response.status_code != 200:
        message = routes.error_of(response)["message"]
        raise BadRequest(f"{'messages' if 'messages' in content else 'prompt'}: {message}")
    return response.json()
