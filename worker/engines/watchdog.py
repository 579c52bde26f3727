"""Whether an engine gets on while requests run: one watchdog for all engines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager


class Watchdog:
    """Counts the requests that run, and sees when none of them gets on.

    Args:
        limit: seconds without progress after which the engine has stalled.
        works: asked after a quarter of them whether the model gets on although no token has come;
            gets the seconds that it may take.
    """

    def __init__(self, limit: float, works: Callable[[float], Awaitable[bool]]) -> None:
        self.limit = limit
        self._works = works
        self._requests: dict[object, bool] = {}
        self._busy = asyncio.Event()
        self._progress = 0.0

    @contextmanager
    def running(self, *, shows_tokens: bool) -> Iterator[None]:
        """Around one request; `shows_tokens` where its answer comes token by token."""
        mark = object()
        if not self._requests:
            self.progressed()
        self._requests[mark] = shows_tokens
        self._busy.set()
        try:
            yield
        finally:
            del self._requests[mark]
            if not self._requests:
                self._busy.clear()

    @property
    def requests(self) -> int:
        """How many run."""
        return len(self._requests)

    @property
    def sees_tokens(self) -> bool:
        """Whether at least one of them shows its tokens."""
        return any(self._requests.values())

    def progressed(self) -> None:
        """A token has come."""
        self._progress = time.monotonic()

    async def stalled(self) -> None:
        """Return when requests run and the engine has not got on for `limit` seconds."""
        while True:
            await self._busy.wait()
            quiet = time.monotonic() - self._progress
            if quiet < self.limit / 4:
                await asyncio.sleep(self.limit / 4 - quiet)
            elif quiet >= self.limit:
                return
            elif await self._works(self.limit - quiet):
                self.progressed()
