"""TabbyAPI over an ExLlama model.

Written from its documentation and tested against a recorded contract; it has not been run here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from worker.engines.servers import dialects
from worker.engines.servers.kind import ServerKind, as_arguments, dashed_names

SLOTS = 4
"""Requests at once for CONCURRENCY_MODIFIER=auto: it is told the size of its cache, and does not
reckon it."""


class Tabby(ServerKind):
    """TabbyAPI over an ExLlama model; `tabbyapi` on PATH runs its main.py."""

    name = "tabby"
    program = "tabbyapi"
    ready = "/health"
    dialect = dialects.TABBY
    auto_slots = SLOTS
    ours: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("model-dir", "model-name"), "MODEL"),
        "max-seq-len": "MAX_MODEL_LEN",
        "cache-size": "MAX_MODEL_LEN and CONCURRENCY_MODIFIER",
        **dict.fromkeys(("host", "port", "disable-auth"), "Tripod"),
    }

    def command(self, program: str, port: int) -> list[str]:
        assert self.weights
        folder = self.weights.folder
        own = {
            "host": "127.0.0.1",
            "port": port,
            "model-dir": str(folder.parent),
            "model-name": folder.name,
            "max-seq-len": self.max_model_len,
            "cache-size": self.max_model_len * self.slots,
            "disable-auth": "true",
        }
        return [program, *as_arguments(own | dashed_names(self.settings.engine_args))]
