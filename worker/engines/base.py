"""What Tripod asks of an engine."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from worker.engines.asgi import App
from worker.job.input import Request


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of the prompt and of all its answers."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What has been generated since the last delta of the same answer.

    Args:
        text: whole characters only; may be empty when only `finish_reason` is new.
        index: which answer it belongs to, 0 ≤ index < options.n.
        finish_reason: `stop` or `length` on the last delta of an answer, else None.
        usage: on the very last delta of a request, else None.
    """

    text: str
    index: int = 0
    finish_reason: str | None = None
    usage: Usage | None = None


class Engine(Protocol):
    """A model that is loaded once and then serves many requests on one event loop."""

    max_model_len: int
    """Tokens of prompt and answer together, fitted to the model and the KV cache."""

    slots: int
    """Requests of `max_model_len` tokens that the KV cache holds at once."""

    batch: int
    """Requests that the engine works on at once; more than that wait."""

    model_name: str
    """The name that clients use."""

    client: httpx.AsyncClient
    """Calls `app`, or the server that stands behind it, by its paths such as /v1/models."""

    phases: dict[str, float]
    """Seconds that each phase of the start took."""

    @property
    def app(self) -> App:
        """The engine's OpenAI-compatible ASGI app, once it is warm."""

    def load(self) -> None:
        """Load the model. Blocks for seconds to minutes; call it in a thread.

        Raises:
            EngineStartError: in one sentence, why it did not start.
        """

    def describe(self) -> dict[str, Any]:
        """The OpenAPI description of `app`."""

    async def warm_up(self) -> None:
        """Build the app and generate a little, on the event loop that will serve."""

    def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Stream the answer. A slow consumer gets what piled up as one delta.

        Closing the generator at any point aborts the request and frees its memory.

        Raises:
            BadRequest: the engine refuses this request.
            EngineDead: the engine died.
        """

    async def available(self) -> None:
        """Return when it takes requests: at once, unless it is being restarted."""

    def unfinished(self) -> int:
        """Requests that the engine still works on."""

    def is_dead(self) -> bool:
        """Whether it can serve no more."""

    async def died(self) -> None:
        """Return when the engine is dead, and not before."""

    def stop(self) -> None:
        """Stop the engine and every process of it. Safe to call twice."""
