"""`mlc_llm serve` over a folder of converted weights with its compiled library.

Written from its documentation and tested against a recorded contract; it has not been run here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import ClassVar

from preload.weights import Weights
from worker.engines.servers import dialects
from worker.engines.servers.kind import ServerKind, as_arguments, dashed_names, option_names
from worker.errors import EngineStartError
from worker.settings import Settings

SLOTS = 64
"""Requests at once for CONCURRENCY_MODIFIER=auto."""


class Mlc(ServerKind):
    """`mlc_llm serve` over a folder of converted weights with its compiled library."""

    name = "mlc"
    program = "mlc_llm"
    ready = "/v1/models"
    dialect = dialects.MLC
    auto_slots: ClassVar[int] = SLOTS
    ours: ClassVar[Mapping[str, str]] = {
        "context-window-size": "MAX_MODEL_LEN",
        "max-num-sequence": "CONCURRENCY_MODIFIER",
        **dict.fromkeys(("host", "port", "model-lib", "overrides", "mode"), "Tripod"),
    }
    overrides = (
        "max-total-seq-length",
        "prefill-chunk-size",
        "max-history-size",
        "gpu-memory-utilization",
        "sliding-window-size",
        "attention-sink-size",
        "tensor-parallel-shards",
        "pipeline-parallel-stages",
    )
    """Options that it takes as one text, `a=1;b=2`."""

    def __init__(self, settings: Settings, weights: Weights | None) -> None:
        super().__init__(settings, weights)
        assert weights is not None
        libraries = sorted(weights.folder.glob("*.so"))
        if len(libraries) != 1 or not (weights.folder / "mlc-chat-config.json").is_file():
            raise EngineStartError(
                f"MODEL={weights.folder}: ENGINE=mlc needs mlc-chat-config.json and one compiled "
                f"library *.so there, and there are {len(libraries)}"
            )
        self._library = libraries[0]
        config = json.loads((weights.folder / "mlc-chat-config.json").read_bytes())
        own = config.get("context_window_size") or settings.max_model_len
        self.max_model_len = min(settings.max_model_len, own)

    def command(self, program: str, port: int) -> list[str]:
        assert self.weights
        args = dashed_names(self.settings.engine_args)
        texts = {"context_window_size": self.max_model_len, "max_num_sequence": self.slots}
        texts |= {key.replace("-", "_"): args[key] for key in args if key in self.overrides}
        own = {
            "model-lib": str(self._library),
            "mode": "server",
            "host": "127.0.0.1",
            "port": port,
            "overrides": ";".join(f"{key}={value}" for key, value in texts.items()),
        }
        rest = {key: value for key, value in args.items() if key not in self.overrides}
        return [program, "serve", str(self.weights.folder), *as_arguments(own | rest)]

    def variables(self) -> dict[str, str]:
        return {"MLC_JIT_POLICY": "OFF"}  # the library is there; compiling takes minutes

    @classmethod
    def known_options(cls, program: str) -> frozenset[str]:
        return option_names(program, "serve", "--help") | set(cls.overrides)
