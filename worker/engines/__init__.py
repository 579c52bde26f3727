"""Engine name → constructor, and the one way to start an engine."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from preload import model, weights
from preload.weights import WeightsError
from worker.errors import EngineStartError, SettingsError, TripodError

P = ParamSpec("P")
T = TypeVar("T")

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.engines.base import Engine
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
        from worker.engines.vllm import engine as vllm

        return vllm.argument_problems(args)
    from worker.engines.servers.presets import PRESETS

    return PRESETS[engine].argument_problems(args)


def delivery_reserve(grace: float) -> float:
    """Of `grace` seconds to end in, those that stay for delivery and for stopping the engine."""
    return min(5.0, grace * 0.4)


async def start_unless(stopped: asyncio.Event, settings: Settings) -> Engine | int:
    """Start the engine, unless the process is told to stop before it is ready.

    Returns:
        the engine, or the exit code of the process: 0 told to stop, 1 the start failed, 2 it
        failed by the settings; the log says why.
    """
    stop = asyncio.create_task(stopped.wait())
    starting = asyncio.create_task(start(settings))
    await asyncio.wait({starting, stop}, return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if not starting.done():
        log.info("told to stop while the engine was starting")
        starting.cancel()
        await asyncio.wait({starting})
        return 0
    try:
        return starting.result()
    except (TripodError, WeightsError) as error:
        return failed_start(error)


def failed_start(error: TripodError | WeightsError) -> int:
    """Log why the engine did not start; returns the exit code of the process."""
    log.error("%s", error, exc_info=error.__cause__)
    return 2 if isinstance(error, SettingsError) else 1


def jobs_at_once(engine: Engine, settings: Settings) -> int:
    """CONCURRENCY_MODIFIER, with `auto` decided by the engine."""
    wanted = settings.concurrency_modifier
    return engine.slots if wanted == "auto" else wanted


async def start(settings: Settings) -> Engine:
    """Find the weights, load the engine and warm it on this event loop.

    Raises:
        WeightsError: the model is nowhere to be had.
        EngineStartError: the engine is not ready after STARTUP_TIMEOUT seconds, or never will be.
    """
    begin = time.monotonic()
    try:
        async with asyncio.timeout(settings.startup_timeout):
            engine = await _in_daemon_thread(load, settings)
            await engine.warm_up()
    except TimeoutError:
        raise EngineStartError(
            f"the engine was not ready after STARTUP_TIMEOUT={settings.startup_timeout:g} seconds"
        ) from None
    _keep_from_collection()
    engine.phases["warm-up"] = time.monotonic() - begin - sum(engine.phases.values())
    seconds = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in engine.phases.items())
    log.info("ready after %.1f s: %s", time.monotonic() - begin, seconds)
    return engine


def load(settings: Settings) -> Engine:
    """Find the weights and load the engine, which `warm_up` then completes on a loop; blocks.

    Raises:
        WeightsError, EngineStartError: as `start` does.
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
    weighed = time.monotonic()
    engine = _create(name, settings, found)
    engine.phases["weights"] = weighed - begin
    engine.load()
    return engine


def _create(name: str, settings: Settings, found: weights.Weights | None) -> Engine:
    if name == "vllm":
        from worker.engines.vllm import catalog
        from worker.engines.vllm.engine import VllmEngine

        assert found is not None
        if found.catalog:
            settings = catalog.applied(settings, found.catalog)
        return VllmEngine(settings, str(found.folder))
    from worker.engines.servers.engine import ServerEngine
    from worker.engines.servers.presets import PRESETS

    return ServerEngine(settings, PRESETS[name](settings, found))


def _keep_from_collection() -> None:
    """Let the garbage collector pass over all that is loaded: it took half a second of a stream."""
    gc.collect()
    gc.freeze()


async def _in_daemon_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Like asyncio.to_thread, but the process can end while the function still runs."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:  # noqa: BLE001 - whatever it is, the caller must hear of it
            future.set_exception(error)
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=run, name=function.__name__, daemon=True).start()
    await ended.wait()
    return future.result()
