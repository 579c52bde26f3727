"""The streams of a server's answers → deltas; what piles up becomes one."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import httpx
from httpx_sse import EventSource

from worker.engines.limits import field_of, too_long
from worker.errors import BadRequest, EngineError
from worker.job import routes
from worker.job.chunks import piled
from worker.job.types import Delta, Request, Usage

WRONG_KEY = "the server refuses us: ENGINE_API_KEY is wrong or missing"


async def answers(
    http: httpx.AsyncClient,
    request: Request,
    body: dict[str, Any],
    max_model_len: int,
    progressed: Callable[[], None],
) -> AsyncGenerator[Delta, None]:
    """Ask for the `n` answers, each by a request of its own, since few servers know `n`.

    Args:
        body: what to ask, complete but for the differing seeds.
        progressed: called for each token that comes.

    Raises:
        BadRequest, EngineError: the server's own error.
        httpx.HTTPError: the connection broke.
    """
    n = request.options.n
    seeds = [{"seed": body["seed"] + index} if "seed" in body else {} for index in range(n)]
    streams = (
        _answer(http, request, body | seed, index, max_model_len, progressed)
        for index, seed in enumerate(seeds)
    )
    told: list[Usage | None] = []
    async with aclosing(piled(*streams)) as deltas:
        async for delta in deltas:
            if delta.finish_reason:
                told.append(delta.usage)
                yield replace(delta, usage=_total(told) if len(told) == n else None)
            else:
                yield delta


async def _answer(
    http: httpx.AsyncClient,
    request: Request,
    body: dict[str, Any],
    index: int,
    max_model_len: int,
    progressed: Callable[[], None],
) -> AsyncGenerator[Delta, None]:
    """One answer, with its own usage at the end; closing the connection frees the server's slot."""
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    reason: str | None = None
    usage: dict[str, int] | None = None
    async with http.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            await response.aread()
            raise _refusal(request, routes.error_of(response), max_model_len)
        async for event in EventSource(response).aiter_sse():
            if event.data == "[DONE]":
                break
            try:
                chunk = json.loads(event.data)
            except ValueError:
                raise EngineError(f"the engine sent no JSON: {event.data[:80]!a}") from None
            if "error" in chunk:
                raise _refusal(request, routes.error_in(chunk, 500), max_model_len)
            usage = chunk.get("usage") or usage
            choices = chunk.get("choices") or []
            if choices:
                progressed()
            for choice in choices:
                reason = choice.get("finish_reason") or reason
                delta = _delta(choice, index)
                if delta.text or delta.reasoning or delta.tool_calls:
                    yield delta
    if reason is None:
        raise httpx.RemoteProtocolError("the answer ended before it was finished")
    counted = Usage(usage["prompt_tokens"], usage["completion_tokens"]) if usage else None
    yield Delta("", index, reason, counted)


def _delta(choice: dict[str, Any], index: int) -> Delta:
    said = choice.get("delta") or {"content": choice.get("text")}
    return Delta(
        said.get("content") or "",
        index,
        reasoning=said.get("reasoning") or said.get("reasoning_content") or "",
        tool_calls=tuple(said.get("tool_calls") or ()),
    )


def _refusal(request: Request, error: dict[str, Any], max_model_len: int) -> Exception:
    message = " ".join(str(error["message"]).split())
    if "n_prompt_tokens" in error:
        return too_long(request, str(error["n_prompt_tokens"]), max_model_len)
    if error["code"] in {401, 403}:
        return EngineError(WRONG_KEY)
    if error["code"] < 500 or error["code"] == 501:  # 501: it does not do such a thing
        return BadRequest(f"{field_of(request)} or options: {message}")
    return EngineError(f"the engine failed on this job: {message}")


def _total(told: list[Usage | None]) -> Usage | None:
    """The prompt's tokens once, those of all answers together; None where a server tells none."""
    known = [usage for usage in told if usage]
    if len(known) < len(told):
        return None
    return Usage(known[0].prompt_tokens, sum(usage.completion_tokens for usage in known))
