"""Engine name → constructor."""

from __future__ import annotations

import logging
import time
from typing import Any

from preload import model, weights
from worker.engines.base import Engine
from worker.errors import EngineStartError
from worker.settings import Settings

log = logging.getLogger(__name__)


def chosen(engine: str, model_name: str) -> str:
    """ENGINE, with `auto` decided by MODEL: llama.cpp for a GGUF, else vLLM."""
    if engine != "auto":
        return engine
    return "llama.cpp" if model.parse(model_name).gguf else "vllm"


def argument_problems(engine: str, args: dict[str, Any]) -> list[str]:
    """What is wrong with the names in ENGINE_ARGS, found without importing the engine."""
    if engine == "vllm":
        from worker.engines.vllm import arguments

        return arguments.argument_problems(args)
    from worker.engines.servers import SERVERS

    return SERVERS[engine].argument_problems(args)


def load(settings: Settings) -> Engine:
    """Find the weights and load the engine, which `warm_up` then completes on a loop; blocks.

    Raises:
        WeightsError: the model is nowhere to be had.
        SettingsError: a LoRA adapter does not fit the model or the other options.
        EngineStartError: the engine does not start.
    """
    begin = time.monotonic()
    name = chosen(settings.engine, settings.model)
    found = None
    if name not in weights.WITHOUT:
        token = settings.hf_token.get_secret_value() if settings.hf_token else None
        wanted = model.parse(settings.model, settings.model_revision or "")
        found = weights.find(wanted, token=token)
        log.info("weights: %s", found.why)
        if found.gguf and name != "llama.cpp":
            raise EngineStartError(
                f"MODEL={settings.model}: ENGINE={name} serves no GGUF file; ENGINE=llama.cpp does"
            )
    engine = create(name, settings, found)
    engine.phases["weights"] = time.monotonic() - begin
    engine.load()
    return engine


def create(name: str, settings: Settings, found: weights.Weights | None) -> Engine:
    """The engine of that name, not loaded yet; vLLM's LoRA adapters are found first.

    Raises:
        WeightsError: an adapter is nowhere to be had.
        SettingsError: an adapter does not fit the model or the other options.
    """
    if name == "vllm":
        from worker.engines.vllm import catalog, lora
        from worker.engines.vllm.engine import VllmEngine

        assert found is not None
        if found.catalog:
            settings = catalog.applied(settings, found.catalog)
        return VllmEngine(lora.applied(settings, found.folder), str(found.folder))
    from worker.engines.servers import SERVERS
    from worker.engines.servers.engine import ServerEngine

    return ServerEngine(settings, SERVERS[name](settings, found))
