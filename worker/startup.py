"""The start of the modes that serve: the engine, then the handler, unless told to stop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import threading
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from prometheus_client import Gauge

from preload.weights import WeightsError
from worker import engines
from worker.engines.base import Engine
from worker.errors import EngineStartError, SettingsError, TripodError
from worker.loading import Handler
from worker.settings import Settings

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)

AT_ONCE = Gauge("tripod_concurrency", "Requests that the engine would run at once.")


async def start_unless(
    stopped: asyncio.Event, settings: Settings, handler: Handler | None = None
) -> Engine | int:
    """`start`, unless the process is told to stop before the engine is ready.

    Returns:
        the engine, or the exit code of the process: 0 told to stop, 1 the start failed, 2 it
        failed by the settings; the log says why.
    """
    stop = asyncio.create_task(stopped.wait())
    starting = asyncio.create_task(start(settings, handler))
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
        log.error("%s", error, exc_info=error.__cause__)
        return 2 if isinstance(error, SettingsError) else 1


async def start(settings: Settings, handler: Handler | None = None) -> Engine:
    """Find the weights, load the engine, warm it on this event loop, and set the handler up.

    Raises:
        WeightsError: the model is nowhere to be had.
        EngineStartError: the engine is not ready after STARTUP_TIMEOUT seconds, or never will be.
        SetupFailed: the handler's `setup` raised.
    """
    begin = time.monotonic()
    try:
        async with asyncio.timeout(settings.startup_timeout):
            engine = await _in_daemon_thread(engines.load, settings)
            await engine.warm_up()
            engine.phases["warm-up"] = time.monotonic() - begin - sum(engine.phases.values())
            if handler and handler.setup:
                await _set_up(handler, engine)
    except TimeoutError:
        raise EngineStartError(
            f"the engine was not ready after STARTUP_TIMEOUT={settings.startup_timeout:g} seconds"
        ) from None
    _keep_from_collection()
    AT_ONCE.set_function(lambda: 0 if engine.is_dead() else engine.unfinished() + engine.room())
    seconds = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in engine.phases.items())
    log.info("ready after %.1f s: %s", time.monotonic() - begin, seconds)
    return engine


async def _set_up(handler: Handler, engine: Engine) -> None:
    begin = time.monotonic()
    try:
        await handler.set_up(engine)
    except BaseException:
        engine.stop()
        raise
    engine.phases["setup"] = time.monotonic() - begin


def delivery_reserve(grace: float) -> float:
    """Of `grace` seconds to end in, those that stay for delivery and for stopping the engine."""
    return min(5.0, grace * 0.4)


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
