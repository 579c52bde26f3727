"""OpenAI's routes: which may be called, and how the engine's HTTP answer becomes a job's chunks."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any, Protocol

import httpx

from worker.errors import EngineRefusal
from worker.job.types import RouteCall

ALLOWED = {
    "/v1/models": "GET",
    "/v1/chat/completions": "POST",
    "/v1/completions": "POST",
    "/v1/embeddings": "POST",
    "/v1/messages": "POST",
    "/v1/rerank": "POST",
    "/v1/score": "POST",
}
"""Inference and model listing; never an engine's routes for administration."""


class Served(Protocol):
    """What of an engine a route needs."""

    client: httpx.AsyncClient
    """Calls the engine's app by its paths such as /v1/models."""

    @property
    def model_name(self) -> str:
        """The name that clients use."""


MODEL = "/v1/models/"
"""What a model's id follows; the engine itself has no such route."""


def refusal(route: str, method: str) -> dict[str, Any] | None:
    """OpenAI's error object for a call that is not allowed, or None for one that is."""
    wanted = "GET" if route.startswith(MODEL) else ALLOWED.get(route)
    if wanted is None:
        known = ", ".join(ALLOWED)
        return error_object(404, f"route {route} is not served; allowed are {known}")
    if method != wanted:
        return error_object(405, f"route {route} takes {wanted}, not {method}")
    return None


async def model(name: str, engine: Served) -> dict[str, Any]:
    """OpenAI's object of the model `name`.

    Raises:
        EngineRefusal: the engine serves no such model.
    """
    listed = (await engine.client.get("/v1/models")).json()["data"]
    found = next((entry for entry in listed if entry["id"] == name), None)
    if found is None:
        names = ", ".join(entry["id"] for entry in listed)
        raise EngineRefusal(error_object(404, f"model {name} is not served; there is {names}"))
    return dict(found)


def error_object(code: int, message: str) -> dict[str, Any]:
    """OpenAI's error object; `code` is the HTTP status."""
    kinds = {401: "AuthenticationError", 404: "NotFoundError", 429: "RateLimitError"}
    kind = kinds.get(code, "BadRequestError" if code < 500 else "InternalServerError")
    return {"message": message, "type": kind, "param": None, "code": code}


async def call(request: RouteCall, engine: Served) -> AsyncGenerator[Any, None]:
    """Send one call to the engine's own app.

    Yields:
        SSE text, whole events only and merged while one was being delivered, `[DONE]` included;
        or the one JSON object of an answer that is no stream.

    Raises:
        EngineRefusal: the engine's OpenAI error object, with its status as `code`.
    """
    if error := refusal(request.route, request.method):
        raise EngineRefusal(error)
    if request.route.startswith(MODEL):
        yield await model(request.route.removeprefix(MODEL), engine)
        return
    body = request.body
    if body is not None and "model" not in body:
        body = {**body, "model": engine.model_name}
    async with engine.client.stream(request.method, request.route, json=body) as response:
        if response.status_code >= 400:
            await response.aread()
            raise EngineRefusal(error_of(response))
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            async for events in whole_events(response):
                yield events
        else:
            await response.aread()
            yield response.json()


async def whole_events(response: httpx.Response) -> AsyncGenerator[str, None]:
    """The response's server-sent events as text, never cut inside an event or a character."""
    rest = b""
    async for part in response.aiter_raw():
        done, separator, rest = (rest + part).rpartition(b"\n\n")
        if separator:
            yield (done + separator).decode("utf-8")
    if rest.strip():
        yield rest.decode("utf-8")


def error_of(response: httpx.Response) -> dict[str, Any]:
    """OpenAI's error object in an engine's answer, whatever shape the engine gave it."""
    try:
        body = response.json()
    except ValueError:
        body = None
    said = response.text[:500] or response.reason_phrase
    return error_in(body, response.status_code, said)


def error_in(body: object, status: int, said: str = "") -> dict[str, Any]:
    """OpenAI's error object out of a JSON body, its `code` a number; `said` where it holds none."""
    error = body.get("error", body) if isinstance(body, dict) else None
    if not isinstance(error, dict) or "message" not in error:
        error = error_object(status, said or json.dumps(error)[:500])
    code = error.get("code")
    return error_object(status, "") | error | {"code": code if isinstance(code, int) else status}
