"""llama-server over one GGUF file, on this machine or shared with RPC backends."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Mapping
from typing import ClassVar

from preload.weights import Weights
from worker.engines import machine
from worker.engines.servers import dialects, gguf
from worker.engines.servers.kind import ServerKind, as_arguments, dashed_names, output
from worker.errors import EngineStartError
from worker.processes import find_program
from worker.settings import Settings

log = logging.getLogger(__name__)

MOST_SLOTS = 32
"""Requests at once that CONCURRENCY_MODIFIER=auto asks for at most."""


class LlamaCpp(ServerKind):
    """`llama-server`; with RPC backends it is started again when one of them fails."""

    name = "llama.cpp"
    program = "llama-server"
    ready = "/health"
    dialect = dialects.LLAMA_CPP
    auto_slots = MOST_SLOTS
    ours: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("model", "model-url", "hf-repo", "hf-file", "docker-repo"), "MODEL"),
        "ctx-size": "MAX_MODEL_LEN",
        "parallel": "CONCURRENCY_MODIFIER",
        "alias": "SERVED_MODEL_NAME",
        "rpc": "RPC_BACKENDS",
        **dict.fromkeys(
            ("host", "port", "api-key", "api-key-file", "metrics", "offline", "log-verbosity"),
            "Tripod",
        ),
    }

    def __init__(self, settings: Settings, weights: Weights | None) -> None:
        super().__init__(settings, weights)
        if weights is None or weights.gguf is None:
            raise EngineStartError(f"MODEL={settings.model}: ENGINE=llama.cpp needs a GGUF file")
        self._model = weights.gguf
        self.backends = list(settings.rpc_backends)
        self.key = secrets.token_urlsafe(16)
        head = gguf.read(self._model)
        self.max_model_len = min(settings.max_model_len, head.context)
        self.slots = self._slots(head)
        self._threads = machine.threads()
        log.info(
            "max_model_len is %d tokens (MAX_MODEL_LEN=%d, the model's own limit is %d); "
            "%d requests of that length at once, %d threads",
            self.max_model_len,
            settings.max_model_len,
            head.context,
            self.slots,
            self._threads,
        )

    def _slots(self, head: gguf.Head) -> int:
        """As many as asked for and as memory holds; llama-server reserves all of it at once."""
        wanted = self.settings.concurrency_modifier
        if self.backends:
            return 1 if wanted == "auto" else wanted  # their memory is theirs to know
        free = _device_memory(find_program("llama-server")) or machine.free_memory() // 2
        room = max(0, free - head.file_bytes) // max(1, head.kv_bytes * self.max_model_len)
        return max(1, min(room, self.slots))

    def command(self, program: str, port: int) -> list[str]:
        own = {
            "model": str(self._model),
            "alias": self.model_name,
            "host": "127.0.0.1",
            "port": port,
            "ctx-size": self.max_model_len * self.slots,
            "parallel": self.slots,
            "threads": self._threads,
            # One for each request that `api` lets in, and some for probes: the server's own pool
            # grows late, and then a probe stands in line behind whole answers.
            "threads-http": 2 * self.slots + 64,
            "cache-ram": min(8192, machine.free_memory() // 8 >> 20),  # MiB of old prompts
            "metrics": True,
            "offline": True,
            "log-verbosity": 4,  # from there on it tells on which device the weights lie
        }
        if self.backends:
            own |= {"rpc": ",".join(self.backends), "gpu-layers": 99}
        return [program, *as_arguments(own | dashed_names(self.settings.engine_args))]

    def variables(self) -> dict[str, str]:
        assert self.key
        return {"LLAMA_API_KEY": self.key, **machine.LLAMA_CPP}

    def report(self, lines: list[str]) -> None:
        # "offloaded 5/5 layers" is written even when nothing was; these lines tell the truth.
        sizes = re.compile(r"(\S+) model buffer size = +(.+)")
        found = [hit for line in lines if (hit := sizes.search(line))]
        if found:
            log.info("the weights lie in: %s", ", ".join(f"{hit[1]} {hit[2]}" for hit in found))
        empty = [name for name in self.backends if not any(f"[{name}]" in hit[1] for hit in found)]
        if empty:
            log.warning("no weights lie on RPC backend %s", ", ".join(empty))


def _device_memory(program: str | None) -> int:
    """Bytes that are free on the GPUs llama.cpp sees; 0 where it sees none."""
    told = output(program, "--list-devices") if program else ""
    return sum(map(int, re.findall(r"\(\d+ MiB, (\d+) MiB free\)", told))) << 20
