"""The streams of a server's answers → deltas; what piles up becomes one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
from httpx_sse import EventSource

from worker.engines.limits import field_of, too_long
from worker.errors import BadRequest, EngineError
from worker.job import routes
from worker.job.chunks import merged
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
    changed = asyncio.Event()
    asked = [_Answer(index, changed) for index in range(request.options.n)]
    seeds = [{"seed": body["seed"] + i} if "seed" in body else {} for i in range(len(asked))]
    tasks = [
        asyncio.create_task(_read(http, request, body | seed, answer, max_model_len, progressed))
        for seed, answer in zip(seeds, asked, strict=True)
    ]
    for task in tasks:
        task.add_done_callback(lambda _: changed.set())
    unfinished = set(range(len(tasks)))
    try:
        while unfinished:
            await changed.wait()
            changed.clear()
            for index in sorted(unfinished):
                answer = asked[index]
                if tasks[index].done():
                    tasks[index].result()
                    unfinished.remove(index)
                    usage = None if unfinished else _usage(asked)
                    answer.parts.append(Delta("", index, answer.reason, usage))
                if answer.parts:
                    yield answer.take()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read(
    http: httpx.AsyncClient,
    request: Request,
    body: dict[str, Any],
    answer: _Answer,
    max_model_len: int,
    progressed: Callable[[], None],
) -> None:
    """Read one answer to its end; closing the connection frees the server's slot."""
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
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
            if answer.add(chunk):
                progressed()
    if answer.reason is None:
        raise httpx.RemoteProtocolError("the answer ended before it was finished")


def _refusal(request: Request, error: dict[str, Any], max_model_len: int) -> Exception:
    message = " ".join(str(error["message"]).split())
    if "n_prompt_tokens" in error:
        return too_long(request, str(error["n_prompt_tokens"]), max_model_len)
    if error["code"] in {401, 403}:
        return EngineError(WRONG_KEY)
    if error["code"] < 500 or error["code"] == 501:  # 501: it does not do such a thing
        return BadRequest(f"{field_of(request)} or options: {message}")
    return EngineError(f"the engine failed on this job: {message}")


class _Answer:
    """What one answer has gathered since it was last asked."""

    def __init__(self, index: int, changed: asyncio.Event) -> None:
        self.parts: list[Delta] = []
        self.reason: str | None = None
        self.usage: dict[str, int] | None = None
        self._index = index
        self._changed = changed

    def add(self, chunk: dict[str, Any]) -> bool:
        """Take in one chunk of a stream; True when it brings a token."""
        self.usage = chunk.get("usage") or self.usage
        choices = chunk.get("choices") or []
        for choice in choices:
            said = choice.get("delta") or {"content": choice.get("text")}
            delta = Delta(
                said.get("content") or "",
                self._index,
                reasoning=said.get("reasoning") or said.get("reasoning_content") or "",
                tool_calls=tuple(said.get("tool_calls") or ()),
            )
            if delta.text or delta.reasoning or delta.tool_calls:
                self.parts.append(delta)
                self._changed.set()
            self.reason = choice.get("finish_reason") or self.reason
        return bool(choices)

    def take(self) -> Delta:
        parts, self.parts = self.parts, []
        return merged(parts)


def _usage(answers: list[_Answer]) -> Usage | None:
    """The prompt's tokens once, those of all answers together; None where a server tells none."""
    told = [answer.usage for answer in answers if answer.usage]
    if len(told) < len(answers):
        return None
    return Usage(told[0]["prompt_tokens"], sum(usage["completion_tokens"] for usage in told))
