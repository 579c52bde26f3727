"""For the tests of a handler: an engine without a model, and one job run through the handler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, cast

from worker import loading
from worker.engines.base import Engine
from worker.job.types import Delta, Request, Usage


class FakeEngine:
    """Answers what it is told, word by word, and remembers what it was asked.

    Args:
        answers: the texts of the answers in turn, or functions that get the Request.
    """

    model_name = "fake"
    max_model_len = 2048

    def __init__(self, *answers: str | Callable[[Request], str]) -> None:
        self.requests: list[Request] = []
        self._answers = answers

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """See worker.engines.base.Engine."""
        self.requests.append(request)
        if len(self.requests) > len(self._answers):
            raise AssertionError(
                f"request {len(self.requests)} of the handler finds no answer: FakeEngine was "
                f"given {len(self._answers)}"
            )
        answer = self._answers[len(self.requests) - 1]
        text = answer if isinstance(answer, str) else answer(request)
        *words, last = text.split(" ")
        for word in words:
            yield Delta(word + " ")
            await asyncio.sleep(0)
        asked = request.prompt or str(request.messages)
        yield Delta(last, 0, "stop", Usage(len(asked.split()), len(words) + 1))


def run(handler: str | Path, job_input: object, engine: FakeEngine) -> list[Any]:
    """Load a handler as HANDLER does, set it up, and run one job.

    Args:
        handler: its file, folder or module.

    Returns:
        what it yields.

    Raises:
        SettingsError: it does not load.
        TripodError: the job failed, by its input or by what the handler yielded.
    """

    async def answer() -> list[Any]:
        loaded = loading.load(str(handler))
        try:
            await loaded.set_up(cast(Engine, engine))
            job = {"id": "test", "input": job_input}
            return [chunk async for chunk in loaded.answer(job, cast(Engine, engine))]
        finally:
            loading.unload(loaded)  # many a handler's file has the same name

    return asyncio.run(answer())
