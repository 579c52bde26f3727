"""What Tripod asks of an engine."""

from collections.abc import AsyncGenerator
from typing import Any, Protocol

import httpx

from worker.asgi import App
from worker.job.types import Delta, Request


class Engine(Protocol):
    """A model that is loaded once and then serves many requests on one event loop."""

    slots: int
    """Requests of `max_model_len` tokens that the KV cache holds at once."""

    batch: int
    """Requests that the engine works on at once; more than that wait."""

    client: httpx.AsyncClient
    """Calls `app`, or the server that stands behind it, by its paths such as /v1/models."""

    phases: dict[str, float]
    """Seconds that each phase of the start took."""

    @property
    def model_name(self) -> str:
        """The name that clients use."""

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together, fitted to the model and the KV cache."""

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

    def room(self) -> int:
        """Requests that it would run at once, beside those that are there already."""

    def unfinished(self) -> int:
        """Requests that the engine still works on."""

    def is_dead(self) -> bool:
        """Whether it can serve no more."""

    async def died(self) -> None:
        """Return when the engine is dead, and not before."""

    def stop(self) -> None:
        """Stop the engine and every process of it. Safe to call twice."""
