"""An OpenAI-compatible server that runs elsewhere, at ENGINE_URL."""

from typing import ClassVar

from worker.engines.servers.kind import ServerKind

SLOTS = 64
"""Requests at once for CONCURRENCY_MODIFIER=auto, where the server does not say how many."""


class Remote(ServerKind):
    """Tripod neither starts nor ends it; the context and the models are what it says."""

    name = "remote"
    auto_slots: ClassVar[int] = SLOTS
