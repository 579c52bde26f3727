"""The servers that Tripod knows: how each is started, when it is ready, what it is called there.

`llama.cpp` and `openllm` are run by the tests. `mlc` and `tabby` are written from their
documentation and tested against a recorded contract; they have not been run here.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from worker.engines import machine, options
from worker.engines.servers import dialects, gguf
from worker.engines.servers.dialects import Dialect
from worker.engines.spawned import find_program
from worker.errors import EngineStartError

if TYPE_CHECKING:
    from preload.weights import Weights
    from worker.settings import Settings

log = logging.getLogger(__name__)

MOST_SLOTS = 32
"""Requests at once that CONCURRENCY_MODIFIER=auto asks for at most."""

REMOTE_SLOTS = 64
"""The same where the server does not say how many it works on at once."""

TABBY_SLOTS = 4
"""The same for TabbyAPI, which is told the size of its cache and does not reckon it."""


class Preset:
    """One kind of server. A subclass says what differs; this one is the `remote` server."""

    name: ClassVar[str] = "remote"
    program: ClassVar[str | None] = None
    ready: ClassVar[str] = "/v1/models"
    dialect: ClassVar[Dialect | None] = None
    ours: ClassVar[Mapping[str, str]] = {}
    auto_slots: ClassVar[int] = REMOTE_SLOTS

    def __init__(self, settings: Settings, weights: Weights | None) -> None:
        self.settings = settings
        self.weights = weights
        self.max_model_len = settings.max_model_len
        wanted = settings.concurrency_modifier
        # It bounds jobs of the queue; over HTTP the engine takes what fits.
        over_http = settings.mode_to_run == "api"
        self.slots = self.auto_slots if over_http or wanted == "auto" else wanted
        self.model_name = settings.served_model_name or settings.model
        self.key = settings.engine_api_key.get_secret_value() if settings.engine_api_key else None
        self.backends: list[str] = []

    def command(self, program: str, port: int) -> list[str]:
        """The command line that serves on the loopback's `port`."""
        raise NotImplementedError

    def variables(self) -> dict[str, str]:
        """What the server's environment holds beside ours."""
        return {}

    def report(self, lines: list[str]) -> None:
        """Log what the server's first lines tell."""

    @classmethod
    def argument_problems(cls, args: dict[str, Any]) -> list[str]:
        """One line for each name in ENGINE_ARGS that the server does not know or Tripod sets."""
        if not args:
            return []
        if cls.program is None:
            return ["a server that Tripod does not start takes no options from here"]
        program = find_program(cls.program)
        if program is None:
            return [f"{cls.program} is not installed here"]
        known = cls.known_options(program)
        known |= set(map(options.dashed, known))
        return options.problems(_dashed(args), known, cls.ours, cls.name)

    @classmethod
    def known_options(cls, program: str) -> frozenset[str]:
        """The names that ENGINE_ARGS may hold, as the server's own parser lists them."""
        return option_names(program, "--help")


class LlamaCpp(Preset):
    """llama-server over one GGUF file, on this machine or shared with RPC backends."""

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
        return [program, *_options(own | _dashed(self.settings.engine_args))]

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


class OpenLlm(Preset):
    """`openllm serve` of the user's own bento; MODEL is its tag, or its folder in a repository."""

    name = "openllm"
    program = "openllm"
    ready = "/readyz"

    def command(self, program: str, port: int) -> list[str]:
        tag, _ = self._bento()
        return [program, "serve", tag, "--port", str(port)]

    def variables(self) -> dict[str, str]:
        _, repository = self._bento()
        own = {"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOST": "127.0.0.1"}
        # Without it, `serve` updates its list of repositories from the network first.
        return own | ({"OPENLLM_TEST_REPO": str(repository)} if repository else {})

    def _bento(self) -> tuple[str, Path | None]:
        """The bento's tag, and the repository that holds it where MODEL is a folder."""
        folder = Path(self.settings.model).expanduser()
        if not folder.is_dir():
            return self.settings.model.removeprefix("openllm:"), None
        folder = folder.resolve()
        if not (folder / "bento.yaml").is_file() or folder.parts[-4:-2] != ("bentoml", "bentos"):
            raise EngineStartError(
                f"MODEL={folder}: it must be the folder of a bento in a repository of OpenLLM, "
                "…/bentoml/bentos/NAME/VERSION, and hold bento.yaml"
            )
        return f"{folder.parent.name}:{folder.name}", folder.parents[3]

    @classmethod
    def argument_problems(cls, args: dict[str, Any]) -> list[str]:
        """A bento keeps the arguments it was built with, whatever `openllm serve --arg` says."""
        if not args:
            return []
        return ["a bento has the arguments it was built with; give it environment variables"]


class Mlc(Preset):
    """`mlc_llm serve` over a folder of converted weights with its compiled library."""

    name = "mlc"
    program = "mlc_llm"
    ready = "/v1/models"
    dialect = dialects.MLC
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
        args = _dashed(self.settings.engine_args)
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
        return [program, "serve", str(self.weights.folder), *_options(own | rest)]

    def variables(self) -> dict[str, str]:
        return {"MLC_JIT_POLICY": "OFF"}  # the library is there; compiling takes minutes

    @classmethod
    def known_options(cls, program: str) -> frozenset[str]:
        return option_names(program, "serve", "--help") | set(cls.overrides)


class Tabby(Preset):
    """TabbyAPI over an ExLlama model; `tabbyapi` on PATH runs its main.py."""

    name = "tabby"
    program = "tabbyapi"
    ready = "/health"
    dialect = dialects.TABBY
    auto_slots = TABBY_SLOTS
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
        return [program, *_options(own | _dashed(self.settings.engine_args))]


PRESETS: dict[str, type[Preset]] = {
    preset.name: preset for preset in (LlamaCpp, OpenLlm, Mlc, Tabby, Preset)
}


@cache
def option_names(program: str, *arguments: str) -> frozenset[str]:
    """The long options that a program's help lists, without their dashes."""
    names: set[str] = set()
    for line in _output(program, *arguments).splitlines():
        if line.lstrip().startswith("-"):
            # Two spaces end the names, unless a comma says that more of them follow.
            head = re.split(r"(?<=[^,\s])\s{2,}", line.strip())[0]
            names |= set(re.findall(r"(?<![\w-])--([a-zA-Z][\w.-]*)", head))
    return frozenset(names)


def _device_memory(program: str | None) -> int:
    """Bytes that are free on the GPUs llama.cpp sees; 0 where it sees none."""
    told = _output(program, "--list-devices") if program else ""
    return sum(map(int, re.findall(r"\(\d+ MiB, (\d+) MiB free\)", told))) << 20


def _output(program: str, *arguments: str) -> str:
    try:
        ran = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineStartError(f"{program} {' '.join(arguments)} did not answer: {error}") from None
    return ran.stdout + ran.stderr


def _dashed(args: Mapping[str, Any]) -> dict[str, Any]:
    return {options.dashed(name): value for name, value in args.items()}


def _options(values: Mapping[str, Any]) -> list[str]:
    """`{"a": 1, "b": true, "c": false}` → `--a 1 --b --no-c`; a list repeats its option."""
    arguments: list[str] = []
    for name, value in values.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, bool):
                arguments.append(f"--{name}" if item else f"--no-{name}")
            elif item is not None:
                text = json.dumps(item) if isinstance(item, dict) else str(item)
                arguments += [f"--{name}", text]
    return arguments
