"""vLLM in this process; its engine core and its GPU workers are processes of their own."""

from __future__ import annotations

import ast
import asyncio
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing, contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from worker.engines.asgi import App, StreamingASGITransport
from worker.engines.base import Delta, Usage
from worker.engines.limits import answer_tokens, field_of, too_long
from worker.engines.options import dashed, problems, underscored
from worker.errors import BadRequest, EngineDead, EngineError, EngineStartError, SettingsError
from worker.job.input import Options, Request

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator

    from fastapi import FastAPI
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from worker.settings import Settings

log = logging.getLogger(__name__)

OURS = {
    "model": "MODEL",
    "revision": "MODEL=org/name@revision",
    "max_model_len": "MAX_MODEL_LEN",
    "hf_token": "HF_TOKEN",
    "served_model_name": "SERVED_MODEL_NAME",
    "host": "HOST",
    "port": "PORT",
    "api_key": "API_KEY",
}
"""Options of vLLM that have a variable of their own."""

SHARED_MEMORY = 160 << 20
"""Bytes of /dev/shm that vLLM's processes ask for."""

CPU_KV_CACHE = 4 << 30
"""Bytes of KV cache on a CPU at most, unless the user says otherwise."""


ARGUMENT_CLASSES = {"EngineArgs", "AsyncEngineArgs", "BaseFrontendArgs", "FrontendArgs"}


@cache
def argument_names() -> frozenset[str]:
    """vLLM's own option names, read from its source without importing it."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("vllm")
    package = Path(spec.submodule_search_locations[0])
    sources = [package / "engine/arg_utils.py", package / "entrypoints/launchers/cli_args.py"]
    return frozenset(
        field.target.id
        for source in sources
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name in ARGUMENT_CLASSES
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    )


def argument_problems(args: dict[str, Any]) -> list[str]:
    """One line for each name in ENGINE_ARGS that vLLM does not know or Tripod sets itself."""
    try:
        known = argument_names() if args else frozenset[str]()
    except ModuleNotFoundError:
        return ["vLLM is not installed here"]
    return problems(map(underscored, args), known, OURS, "vLLM")


class VllmEngine:
    """See worker.engines.base.Engine."""

    def __init__(self, settings: Settings, folder: str) -> None:
        self.max_model_len = settings.max_model_len
        self.slots = 1
        self.batch = 1
        self.model_name = settings.served_model_name or settings.model
        self.phases: dict[str, float] = {}
        self._settings = settings
        self._folder = folder
        self._llm: AsyncLLM | None = None
        self._args: Namespace
        self._app: FastAPI
        self._defaults: dict[str, Any] = {}

    def load(self) -> None:
        _check_shared_memory()
        with self._phase("imports"):
            _environment_for_vllm()
            from vllm.v1.engine.async_llm import AsyncLLM
        with self._phase("engine"):
            try:
                config = self._config()
                self._llm = AsyncLLM.from_vllm_config(
                    config, disable_log_stats=self._args.disable_log_stats
                )
            except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
                raise EngineStartError(f"vLLM did not start: {_first_line(error)}") from error
        self._report_fit(config)
        self._defaults = config.model_config.get_diff_sampling_param()

    @property
    def app(self) -> App:
        return self._app

    def describe(self) -> dict[str, Any]:
        description: dict[str, Any] = self._app.openapi()
        return description

    async def warm_up(self) -> None:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        llm = self._running()
        tasks = await llm.get_supported_tasks()
        self._args.model = self.model_name
        app = build_app(self._args, tasks, llm.model_config)
        await init_app_state(llm, app.state, self._args, tasks)
        self._app = app
        self.client = httpx.AsyncClient(
            transport=StreamingASGITransport(app), base_url="http://engine", timeout=None
        )
        if "generate" in tasks:
            request = Request("Hello", None, True, Options(max_tokens=2, ignore_eos=True))
            async with aclosing(self.generate(request)) as deltas:
                async for _ in deltas:
                    pass
        else:
            llm._run_output_handler()

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        llm = self._running()
        try:
            prompt = await self._render(llm, request)
            prompt_tokens = len(prompt["prompt_token_ids"])
            params = self._sampling(request, prompt_tokens)
            answer_tokens = 0
            unfinished = params.n
            async with aclosing(llm.generate(prompt, params, uuid.uuid4().hex)) as outputs:
                async for output in outputs:
                    for part in output.outputs:
                        answer_tokens += len(part.token_ids)
                        unfinished -= part.finish_reason is not None
                        if not part.text and not part.finish_reason:
                            continue  # half a character, or what may become a stop string
                        yield Delta(
                            part.text,
                            part.index,
                            part.finish_reason,
                            None if unfinished else Usage(prompt_tokens, answer_tokens),
                        )
        except Exception as error:
            raise self._as_tripod_error(error, request) from error

    async def available(self) -> None:
        return

    def unfinished(self) -> int:
        return int(self._running().get_num_unfinished_requests())

    def is_dead(self) -> bool:
        return self._llm is None or self._llm.errored

    async def died(self) -> None:
        handler = self._running().output_handler
        assert handler is not None, "the warm-up generation starts it"
        await asyncio.wait([handler])

    def stop(self) -> None:
        if self._llm:
            # No request is left; its core would take 10 s and more to see that it should end.
            self._llm.shutdown(timeout=0.5)
            self._llm = None

    def _running(self) -> AsyncLLM:
        if self._llm is None:
            raise EngineDead("the engine is not running")
        return self._llm

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.phases[name] = time.monotonic() - start

    def _config(self) -> VllmConfig:
        """vLLM's configuration, with the length fitted to the model and left open downwards."""
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext

        self._args = _parsed(self._settings)
        self._args.model = self._folder
        args = AsyncEngineArgs.from_cli_args(self._args)
        args.served_model_name = [self.model_name]
        if current_platform.is_cpu():
            _cpu_defaults(args, self._settings.engine_args)
        own_limit = args.create_model_config().max_model_len
        args.max_model_len = min(self._settings.max_model_len, own_limit)
        config = args.create_engine_config(UsageContext.ENGINE_CONTEXT)
        # -1 lets vLLM fit max_model_len down to the KV cache instead of refusing to start.
        config.model_config.original_max_model_len = -1
        return config

    def _report_fit(self, config: VllmConfig) -> None:
        self.max_model_len = config.model_config.max_model_len
        cache = config.cache_config
        tokens = (cache.num_gpu_blocks or 0) * cache.block_size
        most = config.scheduler_config.max_num_seqs
        self.batch = most
        self.slots = max(1, min(tokens // self.max_model_len, most))
        log.info(
            "max_model_len is %d tokens (MAX_MODEL_LEN=%d); the KV cache holds %d tokens, "
            "which is %d requests of that length",
            self.max_model_len,
            self._settings.max_model_len,
            tokens,
            self.slots,
        )

    async def _render(self, llm: AsyncLLM, request: Request) -> Any:
        """vLLM's own tokenizer and chat template; both work in threads of its renderer."""
        from vllm.renderers.inputs.preprocess import parse_model_prompt
        from vllm.renderers.params import ChatParams

        if request.prompt is not None:
            parsed = parse_model_prompt(llm.model_config, request.prompt)
            [prompt] = await llm.renderer.render_cmpl_async([parsed])
        else:
            chat = ChatParams(chat_template_kwargs={"add_generation_prompt": True})
            _, [prompt] = await llm.renderer.render_chat_async([request.messages], chat)
        return prompt

    def _sampling(self, request: Request, prompt_tokens: int) -> SamplingParams:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        values = self._defaults | _vllm_names(request.options)
        values["max_tokens"] = answer_tokens(
            request, prompt_tokens, self.max_model_len, values.get("max_tokens")
        )
        return SamplingParams(**values, output_kind=RequestOutputKind.DELTA)

    def _as_tripod_error(self, error: Exception, request: Request) -> Exception:
        from vllm.exceptions import VLLMClientError, VLLMValidationError
        from vllm.v1.engine.exceptions import EngineDeadError

        if isinstance(error, BadRequest | EngineError):
            return error
        if isinstance(error, EngineDeadError):
            return EngineDead("the engine died")
        if isinstance(error, VLLMValidationError) and error.parameter == "input_tokens":
            return too_long(request, f"at least {error.value}", self.max_model_len)
        if isinstance(error, VLLMValidationError) and error.parameter == "input_text":
            return too_long(request, f"the {error.value} characters' many", self.max_model_len)
        field = field_of(request)
        if isinstance(error, VLLMClientError | ValueError | TypeError | KeyError):
            return BadRequest(f"{field} or options: {_first_line(error)}")
        cause = error.__cause__ or error
        log.error("the engine failed on a request", exc_info=cause)
        return EngineError(f"the engine failed on this job: {_first_line(cause)}")


def _environment_for_vllm() -> None:
    """Defaults that vLLM reads from the environment; what the user has set stays."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # vLLM sets up its own logging late; until then runpod's handler would show its lines.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if len(os.sched_getaffinity(0)) > 1:
        # Only read on CPUs: OpenMP threads on every core would starve this process.
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "1")


def _cpu_defaults(args: AsyncEngineArgs, given: dict[str, Any]) -> None:
    """On a CPU: start without compiling, and leave memory to the rest of the machine."""
    import psutil

    names = set(map(underscored, given))
    if "enforce_eager" not in names:
        args.enforce_eager = True
    sized = names & {"kv_cache_memory_bytes", "gpu_memory_utilization"}
    if not sized and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        args.kv_cache_memory_bytes = min(CPU_KV_CACHE, psutil.virtual_memory().available // 8)


def _parsed(settings: Settings) -> Namespace:
    """ENGINE_ARGS through the parser of `vllm serve`, which checks the values."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> Any:
            sentence = re.sub(r" \[type=.*", "", " ".join(message.split()))
            raise SettingsError([f"ENGINE_ARGS: {sentence}"])

    arguments = ["--served-model-name", settings.served_model_name or settings.model]
    if settings.mode_to_run != "api":
        arguments.append("--disable-log-stats")  # only /metrics reads them
    for name, value in settings.engine_args.items():
        option = "--" + dashed(name)
        if isinstance(value, bool):
            arguments.append(option if value else option.replace("--", "--no-", 1))
        elif isinstance(value, list):
            arguments += [option, *map(str, value)]
        elif value is not None:
            arguments += [option, json.dumps(value) if isinstance(value, dict) else str(value)]
    parsed: Namespace = make_arg_parser(Parser()).parse_args(arguments)
    return parsed


def _vllm_names(options: Options) -> dict[str, Any]:
    """The options that were given, as SamplingParams takes them."""
    from vllm.sampling_params import StructuredOutputsParams

    given = options.model_dump(
        exclude_none=True,
        exclude={"max_tokens", "max_new_tokens", "response_format", "logit_bias"},
    )
    if options.logit_bias is not None:
        if wrong := next((key for key in options.logit_bias if not key.isdecimal()), None):
            raise BadRequest(f"options.logit_bias: {wrong!a} is not allowed; it must be a token id")
        given["logit_bias"] = {int(key): bias for key, bias in options.logit_bias.items()}
    wanted = options.response_format
    if wanted and wanted.json_schema:
        given["structured_outputs"] = StructuredOutputsParams(json=wanted.json_schema.schema_)
    elif wanted and wanted.type == "json_object":
        given["structured_outputs"] = StructuredOutputsParams(json_object=True)
    return given


def _check_shared_memory() -> None:
    try:
        free = shutil.disk_usage("/dev/shm").free
    except FileNotFoundError:
        return
    if free < SHARED_MEMORY:
        raise EngineStartError(
            f"/dev/shm has {free >> 20} MiB free, but vLLM needs {SHARED_MEMORY >> 20} MiB; "
            "start the container with --shm-size 1g"
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
