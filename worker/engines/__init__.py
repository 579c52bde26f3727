"""Engine name → constructor, and the one way to start an engine."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from preload import model, weights
from worker.errors import EngineStartError

P = ParamSpec("P")
T = TypeVar("T")

if TYPE_CHECKING:
    from collections.abc import Callable

    from worker.engines.base import Engine
    from worker.settings import Settings

IN_THIS_BUILD = ("vllm",)

log = logging.getLogger(__name__)


def argument_problems(engine: str, args: dict[str, Any]) -> list[str]:
    """What is wrong with the names in ENGINE_ARGS, found without importing the engine."""
    from worker.engines import vllm

    return vllm.argument_problems(args)


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
            loaded = time.monotonic()
            await engine.warm_up()
    except TimeoutError:
        raise EngineStartError(
            f"the engine was not ready after STARTUP_TIMEOUT={settings.startup_timeout:g} seconds"
        ) from None
    engine.phases["warm-up"] = time.monotonic() - loaded
    seconds = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in engine.phases.items())
    log.info("ready after %.1f s: %s", time.monotonic() - begin, seconds)
    return engine


def load(settings: Settings) -> Engine:
    """Find the weights and load the engine, which `warm_up` then completes on a loop; blocks.

    Raises:
        WeightsError, EngineStartError: as `start` does.
    """
    from worker.engines.vllm import VllmEngine

    begin = time.monotonic()
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    found = weights.find(model.parse(settings.model, settings.model_revision or ""), token=token)
    log.info("weights: %s", found.why)
    engine = VllmEngine(settings, str(found.folder))
    engine.phases["weights"] = time.monotonic() - begin
    engine.load()
    return engine


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
