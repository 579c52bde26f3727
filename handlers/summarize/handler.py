"""A summary in two calls of the engine: first the text's key points, then prose made of them."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from pydantic import BaseModel, Field

from worker.engines.base import Engine
from worker.job.chunks import text_of
from worker.job.types import Options, Request


class Input(BaseModel):
    """What `job["input"]` is."""

    text: str = Field(min_length=1)
    words: int = Field(60, ge=10, le=500)
    language: str = "English"


async def handler(job: dict[str, Any], engine: Engine) -> AsyncGenerator[dict[str, Any], None]:
    """Yields the summary as it is generated, and at last the points that it was made of."""
    wanted: Input = job["input"]
    points = await text_of(
        engine.generate(ask(f"List the key points of this text:\n\n{wanted.text}", 400))
    )
    task = f"Write {wanted.words} words in {wanted.language} that say this:\n\n{points}"
    async with aclosing(engine.generate(ask(task, 4 * wanted.words))) as deltas:
        async for delta in deltas:
            yield {"text": delta.text}
    yield {"text": "", "points": points}


def ask(task: str, max_tokens: int) -> Request:
    messages = [{"role": "user", "content": task}]
    return Request(None, messages, True, Options(max_tokens=max_tokens, temperature=0.3))
