"""What vLLM is told: its environment, and its configuration fitted to the model and the machine."""

from __future__ import annotations

import copy
import logging
import os
import shutil
from argparse import Namespace
from typing import TYPE_CHECKING, Any

import psutil

from worker.engines.options import underscored
from worker.engines.vllm.families import choose_parsers
from worker.errors import EngineStartError
from worker.settings import Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

log = logging.getLogger(__name__)

SHARED_MEMORY = 160 << 20
"""Bytes of /dev/shm that vLLM's processes ask for."""

CPU_KV_CACHE = 4 << 30
"""Bytes of KV cache on a CPU at most, unless the user says otherwise."""


def configuration(args: Namespace, settings: Settings) -> VllmConfig:
    """vLLM's configuration, with the length fitted to the model and left open downwards.

    Args:
        args: ENGINE_ARGS as vLLM's parser took them, with the folder of the weights as `model`.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import propagate_flash_late_interaction
    from vllm.logger import configure_logging_from_args
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext

    configure_logging_from_args(args)
    engine_args = AsyncEngineArgs.from_cli_args(args)
    propagate_flash_late_interaction(args, engine_args)
    if current_platform.is_cpu():
        _cpu_defaults(engine_args, settings.engine_args)
        _keep_a_slot_empty(engine_args, len(args.lora_modules or ()), settings.engine_args)
    # Of a copy: what is derived from the arguments is written back into them.
    own = copy.deepcopy(engine_args).create_model_config()
    engine_args.max_model_len = min(settings.max_model_len, own.max_model_len)
    if own.runner_type == "generate":
        choose_parsers(args, settings.engine_args)
        engine_args.reasoning_parser = args.reasoning_parser
    config = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    # -1 lets vLLM fit max_model_len down to the KV cache instead of refusing to start.
    config.model_config.original_max_model_len = -1
    return config


def import_parsers(args: Namespace) -> None:
    """Import the user's plugins for tool calls and reasoning, as `vllm serve` does."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    if args.tool_parser_plugin:
        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)


def set_environment() -> None:
    """Defaults that vLLM reads from the environment; what the user has set stays."""
    # Its app would ask every job of the queue for this key; over HTTP our front asks for API_KEY.
    os.environ.pop("VLLM_API_KEY", None)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # vLLM sets up its own logging late; until then runpod's handler would show its lines.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # As `vllm serve` has it: forking this process, which has threads, may hang.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if len(os.sched_getaffinity(0)) > 1:
        # Only read on CPUs: OpenMP threads on every core would starve this process.
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "1")


def check_shared_memory() -> None:
    """Refuse to start where vLLM's processes could not talk to each other.

    Raises:
        EngineStartError: /dev/shm is too small.
    """
    try:
        free = shutil.disk_usage("/dev/shm").free
    except FileNotFoundError:
        return
    if free < SHARED_MEMORY:
        raise EngineStartError(
            f"/dev/shm has {free >> 20} MiB free, but vLLM needs {SHARED_MEMORY >> 20} MiB; "
            "start the container with --shm-size 1g"
        )


def _cpu_defaults(args: AsyncEngineArgs, given: dict[str, Any]) -> None:
    """On a CPU: start without compiling, and leave memory to the rest of the machine."""
    names = set(map(underscored, given))
    if "enforce_eager" not in names:
        args.enforce_eager = True
    sized = names & {"kv_cache_memory_bytes", "gpu_memory_utilization"}
    if not sized and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        args.kv_cache_memory_bytes = min(CPU_KV_CACHE, psutil.virtual_memory().available // 8)


def _keep_a_slot_empty(args: AsyncEngineArgs, adapters: int, given: dict[str, Any]) -> None:
    """On a CPU, vLLM gives a request for the model itself what the last slot for adapters holds.

    It does so where requests with adapters run in the same step.
    """
    if not args.enable_lora or not adapters:
        return
    if "max_loras" not in map(underscored, given):
        args.max_loras = adapters + 1
    elif args.max_loras <= adapters:
        log.warning(
            "max_loras=%d: on a CPU, requests for the model itself are answered wrongly while "
            "adapters run, unless it is more than the number of lora_modules, %d",
            args.max_loras,
            adapters,
        )
