"""vLLM in this process; its engine core and its GPU workers are processes of their own."""

from __future__ import annotations

import asyncio
import logging
import time
from argparse import Namespace
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any

import httpx

from preload.errors import first_line
from worker.asgi import App
from worker.engines.limits import answer_tokens, field_of, not_served, too_long
from worker.engines.transport import StreamingASGITransport
from worker.engines.vllm import lora
from worker.engines.vllm.answers import Reader, answers
from worker.engines.vllm.arguments import parsed
from worker.engines.vllm.config import (
    check_shared_memory,
    configuration,
    import_parsers,
    set_environment,
)
from worker.engines.vllm.occupancy import Occupancy
from worker.engines.vllm.questions import question, rendered
from worker.engines.vllm.warmup import avoid_compiling, warm
from worker.errors import (
    BadRequest,
    EngineDead,
    EngineError,
    EngineStartError,
    TripodError,
)
from worker.job.chunks import piled
from worker.job.types import Delta, Request
from worker.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

log = logging.getLogger(__name__)


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
        self._occupancy: Occupancy
        self._defaults: dict[str, Any] = {}

    def load(self) -> None:
        check_shared_memory()
        with self._phase("imports"):
            set_environment()
            from vllm.usage.usage_lib import UsageContext
            from vllm.v1.engine.async_llm import AsyncLLM
        with self._phase("engine"):
            try:
                self._args = parsed(self._settings)
                self._args.model = self._folder
                import_parsers(self._args)
                config = configuration(self._args, self._settings)
                avoid_compiling(config)
                is_auto = self._settings.concurrency_modifier == "auto"
                quiet = self._args.disable_log_stats
                self._llm = AsyncLLM.from_vllm_config(
                    config,
                    usage_context=UsageContext.OPENAI_API_SERVER,
                    enable_log_requests=self._args.enable_log_requests,
                    aggregate_engine_logging=self._args.aggregate_engine_logging,
                    disable_log_stats=quiet and not is_auto,
                )
                self._occupancy = Occupancy(self._llm, config, counts_tokens=not quiet)
            except TripodError:
                raise
            except Exception as error:
                raise EngineStartError(f"vLLM did not start: {first_line(error)}") from error
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
        await llm.reset_mm_cache()  # vLLM's warm-up leaves its dummy pictures there
        tasks = await llm.get_supported_tasks()
        self._args.model = self.model_name
        app = build_app(self._args, tasks, llm.model_config)
        try:
            await init_app_state(llm, app.state, self._args, tasks)
        except ValueError as error:
            raise lora.start_error(error, self._args, app.state) from error
        self._app = app
        self.client = httpx.AsyncClient(
            transport=StreamingASGITransport(app), base_url="http://engine", timeout=None
        )
        llm._run_output_handler()
        if "generate" in tasks:
            await warm(self.client, llm.vllm_config)
        if self.is_dead():
            raise EngineStartError("vLLM died in its warm-up")
        self._occupancy.forget()

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        llm = self._running()
        try:
            asked = question(request)
            prompt = await rendered(asked, self._app.state.online_renderer)
            tokens: list[int] = prompt["prompt_token_ids"]
            limit = answer_tokens(
                request, len(tokens), self.max_model_len, self._defaults.get("max_tokens")
            )
            params = asked.to_sampling_params(limit, self._defaults)
            reader = None if request.prompt is not None else self._reader(asked)
            outputs = llm.generate(
                prompt,
                params,
                asked.request_id,
                lora_request=self._adapter(request.model),
                **(reader.engine_hints(tokens) if reader else {}),
            )
            deltas = answers(outputs, params.n, reader)
            # A parser must see each token by itself, however slowly its chunks are delivered.
            async with aclosing(piled(deltas) if reader else deltas) as given:
                async for delta in given:
                    yield delta
        except Exception as error:
            raise self._as_tripod_error(error, request) from error

    async def available(self) -> None:
        return

    def room(self) -> int:
        return self._occupancy.room()

    def unfinished(self) -> int:
        return int(self._running().get_num_unfinished_requests())

    def is_dead(self) -> bool:
        return self._llm is None or self._llm.errored

    async def died(self) -> None:
        handler = self._running().output_handler
        assert handler is not None, "the warm-up starts it"
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

    def _report_fit(self, config: VllmConfig) -> None:
        self.max_model_len = config.model_config.max_model_len
        self.batch = config.scheduler_config.max_num_seqs
        self.slots = self._occupancy.at_full_length
        log.info(
            "max_model_len is %d tokens (MAX_MODEL_LEN=%d); the KV cache holds %d tokens, "
            "which is %d requests of that length",
            self.max_model_len,
            self._settings.max_model_len,
            self._occupancy.tokens,
            self.slots,
        )

    def _reader(self, chat: Any) -> Reader | None:
        """What reads the answers to `chat`, where the model has a parser."""
        renderer = self._app.state.online_renderer
        if renderer.parser is None:
            return None
        kwargs = renderer.effective_chat_template_kwargs(chat)
        tokenizer = renderer.renderer.get_tokenizer()
        config = renderer.model_config
        parsers = [
            renderer.parser(tokenizer, chat.tools, chat_template_kwargs=kwargs, model_config=config)
            for _ in range(chat.n)
        ]
        return Reader(parsers, chat, kwargs, is_auto=renderer.enable_auto_tools)

    def _adapter(self, name: str | None) -> LoRARequest | None:
        """The LoRA adapter that is served as `name`; None for the model itself.

        Raises:
            BadRequest: there is no such name.
        """
        models = self._app.state.openai_serving_models
        if name is None or models.is_base_model(name):
            return None
        if found := models.lora_requests.get(name):
            return found
        raise not_served(name, [self.model_name, *models.lora_requests])

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
            return BadRequest(f"{field} or options: {first_line(error)}")
        cause = error.__cause__ or error
        log.error("the engine failed on a request", exc_info=cause)
        return EngineError(f"the engine failed on this job: {first_line(cause)}")
